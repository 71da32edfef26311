"""Quantized weights beside scales of a kind that is not read: refused, whatever is ignored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint

FP8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float8_e5m2, "weight_scale_inv"),
        (FP8, "weight_scales"),
        (INT8, "scales"),
        (INT8, "weight.absmax"),
        (FP8, "weight.scale"),
    ],
)
@pytest.mark.parametrize("ignore", [(), (r".*scale.*", r".*absmax")])
def test_a_scaled_weight_is_refused(
    tmp_path: Path, dtype: torch.dtype, scale: str, ignore: tuple[str, ...]
) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    weight = module[0].weight.detach().clone()
    stored = (weight * 100).to(dtype)
    tensors = {"0.weight": stored, f"0.{scale}": torch.tensor(0.01)}
    save_file(tensors, tmp_path / "scaled.safetensors")
    config = CheckpointConfig(source=str(tmp_path / "scaled.safetensors"), ignore=ignore)
    with pytest.raises(CheckpointError, match=rf"0.weight is .*0\.{scale}|per block.*0\.weight"):
        load_checkpoint(module, config)
    assert torch.equal(module[0].weight, weight), "nothing was read"
    save_file({"0.weight": weight.bfloat16()}, tmp_path / "plain.safetensors")  # as it advises
    load_checkpoint(module, CheckpointConfig(source=str(tmp_path / "plain.safetensors")))


def test_what_only_sounds_like_a_scale_passes(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))
    module[1].register_buffer("scale", torch.ones(1))
    module.register_buffer("scale_shift_table", torch.ones(1))  # of diffusers' Wan
    module[0].float().weight.data.copy_(torch.eye(4))
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors["0.weight"] = tensors["0.weight"].to(FP8)  # plain numbers: no scale beside them
    save_file(tensors, tmp_path / "plain.safetensors")
    load_checkpoint(module, CheckpointConfig(source=str(tmp_path / "plain.safetensors")))
    assert torch.equal(module[0].weight, torch.eye(4))
