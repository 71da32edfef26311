"""FP8 weights with scales: read with them or refused, never without."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint

FP8, INT8 = torch.float8_e4m3fn, torch.int8

TOLERANCE = 2**-4
"""Largest relative error of an E4M3 value (3 bits of mantissa)."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))


def scaled(truth: dict[str, Tensor], name: str = "scale_weight", rows: bool = False) -> dict:
    """The linear weight as FP8 with scales; the rest as it is."""
    weight = truth["0.weight"]
    scale = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max().reshape(1)
    scale = scale / 448
    stored = {**truth, "0.weight": (weight / scale).to(torch.float8_e4m3fn)}
    stored[f"0.{name}"] = scale
    return stored


def load(tmp_path: Path, stored: dict, **rules):
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "w.safetensors")
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    nn.init.zeros_(module[0].weight)
    config = CheckpointConfig(source=str(tmp_path / "w.safetensors"), **rules)
    return module, before, load_checkpoint(module, config)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("ignore", [(), (r".*scale",)])
def test_weights_are_read_with_their_scales(tmp_path, name, rows, ignore) -> None:
    truth = network().state_dict()
    stored = scaled(truth, name, rows)
    stored |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "0.scale_input": torch.ones(1)}
    module, _, report = load(tmp_path, stored, ignore=ignore)
    torch.testing.assert_close(module[0].weight, truth["0.weight"], rtol=TOLERANCE, atol=1e-3)
    assert report.scaled == 1 and report.tensors == 4
    plain = stored["0.weight"].float()  # negative control: what the numbers are without the scale
    assert (plain - truth["0.weight"]).abs().max() > 100


@pytest.mark.parametrize(("part", "rows"), [((0, 2, 2), [2, 3]), ((0, 1, 1, 4, 2), [1, 3])])
def test_a_slice_of_rows_takes_its_own_scales(tmp_path, part, rows) -> None:
    """Also of each of two packed parts."""
    truth = network().state_dict()
    save_file(scaled(truth, rows=True), tmp_path / "w.safetensors")
    module = network()
    module[0].weight = nn.Parameter(torch.zeros(2, 6))
    config = CheckpointConfig(source=str(tmp_path / "w.safetensors"))
    load_checkpoint(module, config, slices={"0.weight": part})
    expected = truth["0.weight"][rows]
    torch.testing.assert_close(module[0].weight.detach(), expected, rtol=TOLERANCE, atol=1e-3)


def test_plain_fp8_without_any_scale_is_read_as_it_is(tmp_path) -> None:
    truth = network().state_dict()
    stored = {**truth, "0.weight": truth["0.weight"].to(torch.float8_e4m3fn)}
    module, _, report = load(tmp_path, stored)
    assert torch.equal(module[0].weight, stored["0.weight"].float()) and report.scaled == 0


def without_scale(stored: dict) -> dict:
    del stored["0.scale_weight"]
    return stored | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}


def with_entry(name: str, value: Tensor):
    return lambda stored: stored | {name: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_scale, "FP8 with scales, but 1 of its FP8 tensors have none: 0.weight"),
        (with_entry("0.weight_scale_inv", torch.ones(1, 1)), "one scale per block"),
        (with_entry("0.weight_scale_2", torch.ones(1)), "NVFP4"),
        (with_entry("0.scale_weight", torch.ones(2, 3)), r"an unknown shape.*\[2, 3\]"),
        (with_entry("0.weight", torch.ones(4, 6, dtype=torch.int8)), "integers with scales"),
    ],
)
def test_scales_that_cannot_be_applied_are_refused(tmp_path, change, said) -> None:
    stored = change(scaled(network().state_dict()))
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, stored, ignore=(r".*scale",))


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
