"""Random weights of a component do not depend on the other components."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.integrations.wan21.config import I2V_TINY_PIPELINE
from flashdreams.runtime.checkpoint import CheckpointConfig

CHECKPOINT = CheckpointConfig(source="package:nowhere/w.safetensors")


def weights(config, part: str) -> dict[str, torch.Tensor]:
    return config.setup(device="cpu", load=False).components()[part].state_dict()


@pytest.mark.parametrize("part", ["transformer", "image_encoder", "decoder"])
def test_a_component_keeps_its_weights_when_others_get_checkpoints_or_go(part: str) -> None:
    overrides = {
        "text_encoder": {"text_encoder": None},
        "image_encoder": {"image_encoder": {"clip": {"checkpoint": CHECKPOINT}}},
        "transformer": {"diffusion_model": {"transformer": {"checkpoint": CHECKPOINT}}},
        "decoder": {"decoder": {"checkpoint": CHECKPOINT}},
    }
    plain = weights(I2V_TINY_PIPELINE, part)
    assert any(tensor.std() > 0 for tensor in plain.values())
    for other in overrides.keys() - {part}:
        found = weights(derive_config(I2V_TINY_PIPELINE, **overrides[other]), part)
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items()), other


def test_parts_of_a_component_do_not_depend_on_one_another() -> None:
    plain = weights(I2V_TINY_PIPELINE, "image_encoder")
    clip_on_meta = derive_config(
        I2V_TINY_PIPELINE, image_encoder={"vae": {"checkpoint": CHECKPOINT}}
    )
    found = weights(clip_on_meta, "image_encoder")
    mine = [name for name in plain if name.startswith("clip.")]
    assert mine and all(torch.equal(found[name], plain[name]) for name in mine)
    assert found[
        "vae." + next(n for n in plain if n.startswith("vae.")).removeprefix("vae.")
    ].is_meta


def test_building_a_pipeline_leaves_the_programs_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    I2V_TINY_PIPELINE.setup(device="cpu", load=False)
    assert torch.equal(torch.rand(4), expected)
