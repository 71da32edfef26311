"""Prefixes of other programs: found without being told, said, and never invented."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    KeyMap,
    load_checkpoint,
)


def saved(tmp_path: Path, content: dict, **rules) -> CheckpointConfig:
    save_file(content, tmp_path / "w.safetensors")
    return CheckpointConfig(source=str(tmp_path / "w.safetensors"), **rules)


def prefixed(module: nn.Module, prefix: str) -> dict:
    return {prefix + name: torch.ones_like(x) for name, x in module.state_dict().items()}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_known_prefixes_are_dropped_and_said(tmp_path, prefix, caplog) -> None:
    module = nn.Linear(3, 2)
    caplog.set_level(logging.INFO, "flashdreams")
    report = load_checkpoint(module, saved(tmp_path, prefixed(module, prefix)))
    assert report.prefix == prefix and bool((module.weight == 1).all())
    assert f"names begin with {prefix!r}, which is dropped" in caplog.text


def test_a_module_keeps_the_prefix_that_is_its_own(tmp_path) -> None:
    module = nn.ModuleDict({"model": nn.Linear(3, 2)})
    report = load_checkpoint(module, saved(tmp_path, prefixed(module, "")))
    assert report.prefix == ""
    report = load_checkpoint(module, saved(tmp_path, prefixed(module, "model.")))
    assert report.prefix == "model."


def test_an_unknown_prefix_is_no_prefix(tmp_path) -> None:
    """Negative control."""
    module = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="2 missing in the file"):
        load_checkpoint(module, saved(tmp_path, prefixed(module, "net.")))


def test_the_other_networks_of_a_whole_pipeline_are_left_aside(tmp_path) -> None:
    module = nn.Linear(3, 2)
    content = prefixed(module, "model.diffusion_model.")
    content |= {"vae.conv1.bias": torch.ones(1), "text_encoders.t5.shared.weight": torch.ones(1)}
    assert load_checkpoint(module, saved(tmp_path, content)).tensors == 2
    content["model.diffusion_model.extra"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="1 unexpected in the file"):
        load_checkpoint(module, saved(tmp_path, content))


def test_a_prefix_comes_before_another_publishers_names(tmp_path) -> None:
    module = nn.Linear(3, 2)
    keys = KeyMap(name="other", marker="w$", rename=(("^w$", "weight"), ("^b$", "bias")))
    module.checkpoint_key_maps = (keys,)
    content = {"model.w": torch.ones(2, 3), "model.b": torch.ones(2)}
    report = load_checkpoint(module, saved(tmp_path, content))
    assert (report.prefix, report.key_map) == ("model.", "other")
