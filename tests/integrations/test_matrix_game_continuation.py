"""Matrix-Game from several known chunks: as the official code continues, and from a file."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdreams.integrations.matrix_game.config import TINY_RUNNER
from flashdreams.run import main
from tests.goldens import load_golden
from tests.unit.integrations.matrix_game.test_goldens import (
    ATOL,
    LEN_T,
    WHOLE,
    golden_actions,
    golden_pipeline,
)

SLUG = TINY_RUNNER.runner_name


def continued(initial: torch.Tensor, first_action: int = 0) -> torch.Tensor:
    """Latents of the golden rollout from some of its own chunks on; noise counts as there."""
    inputs = load_golden(WHOLE, "inputs.safetensors")

    def noise(index: int, step: int, shape) -> torch.Tensor:
        if step == 0:
            return inputs["noise"][:, :, LEN_T * index : LEN_T * (index + 1)]
        return inputs[f"renoise/chunk{index}/after_step{step - 1}"].transpose(0, 1)[None]

    pipeline = golden_pipeline()
    cache = pipeline.initialize_cache(
        image_tokens=inputs["visual_context"],
        condition=inputs["cond_concat"],
        noise=noise,
        initial_latent=initial,
    )
    latents = []
    for index in range(6):
        actions = golden_actions(index, inputs)
        if index < first_action:
            actions.keyboard.zero_()
        latents.append(pipeline.generate(index, cache, actions))
        pipeline.finalize(index, cache)
    return torch.cat(latents, dim=2)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_official_rollout_goes_on_from_its_own_chunks(chunks):
    """One pass at timestep 0 over each given chunk; conditions, positions and actions go on."""
    official = load_golden(WHOLE, "rollout.safetensors")["output"]
    initial = official[:, :, : LEN_T * chunks]
    output = continued(initial)
    assert torch.equal(output[:, :, : LEN_T * chunks], initial)
    torch.testing.assert_close(output, official, atol=ATOL, rtol=0)


def test_a_wrong_initial_latent_is_another_rollout():
    """Negative controls: the latents matter, and so do the actions that they were made under."""
    official = load_golden(WHOLE, "rollout.safetensors")["output"]
    initial = official[:, :, : 2 * LEN_T]
    for other in (continued(-initial), continued(initial, first_action=2)):
        later = slice(2 * LEN_T, None)
        assert (other[:, :, later] - official[:, :, later]).abs().max() > 100 * ATOL


def latents(folder, *flags: str) -> torch.Tensor:
    argv = [SLUG, "--test-image", "True", "--actions", "w20 wl40", "--device", "cpu", *flags]
    assert main([*argv, "--output-dir", str(folder), "--save-latents", "True"]) == 0
    return load_file(folder / f"latents_{SLUG}.safetensors")["latents"]


def test_a_run_goes_on_from_the_latents_of_another(tmp_path):
    whole = latents(tmp_path, "--total-blocks", "4")
    save_file({"latents": whole[:, :, :6].contiguous()}, tmp_path / "first.safetensors")
    flags = ["--total-blocks", "4", "--initial-latent", str(tmp_path / "first.safetensors")]
    assert torch.equal(latents(tmp_path, *flags), whole)
    assert not torch.equal(latents(tmp_path, *flags, "--seed", "1"), whole)  # negative control


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "cannot be read"),
        ({"other": torch.zeros(2)}, "holds other; a tensor named latents is wanted"),
        ({"latents": torch.zeros(1, 16, 4, 6, 10)}, "whole chunks, 3 frames each; got"),
        ({"latents": torch.zeros(1, 16, 3, 6, 12)}, "got [1, 16, 3, 6, 12]"),
        ({"latents": torch.full((1, 16, 3, 6, 10), torch.nan)}, "finite throughout"),
        ({"latents": torch.zeros(1, 16, 3, 6, 10).long()}, "floating point"),
        ({"latents": torch.zeros(1, 16, 9, 6, 10)}, "holds 3 chunks, and --total-blocks 2"),
    ],
)
def test_bad_files_are_refused_before_weights(tensors, message, tmp_path, capsys):
    path = tmp_path / "first.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors")
    else:
        save_file(tensors, path)
    argv = [SLUG, "--test-image", "True", "--total-blocks", "2", "--device", "cpu"]
    assert main([*argv, "--initial-latent", str(path), "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_claims_more_than_memory_is_refused_by_its_header(tmp_path, capsys):
    path, frames = tmp_path / "first.safetensors", 3 * 10**6
    size = 16 * frames * 6 * 10 * 4
    row = {"dtype": "F32", "shape": [1, 16, frames, 6, 10], "data_offsets": [0, size]}
    header = json.dumps({"latents": row}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # a hole
    argv = [SLUG, "--test-image", "True", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert main([*argv, "--initial-latent", str(path)]) == 2
    assert "holds 1000000 chunks, and --total-blocks" in capsys.readouterr().err
