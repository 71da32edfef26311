"""Prompts that come as embeddings made beforehand."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.infra.prompt import load_prompt_embeds, save_prompt_embeds
from flashdreams.models import prompts
from flashdreams.runtime.checkpoint import CheckpointError


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def load(path: Path, **sizes: int) -> torch.Tensor:
    return load_prompt_embeds(path, **{"text_len": 6, "text_dim": 8, **sizes})


def test_load_prompt_embeds_returns_what_was_saved(tmp_path: Path) -> None:
    path, saved = tmp_path / "e.safetensors", embeds(2, 6, 8).bfloat16()
    save_prompt_embeds(path, saved)
    loaded = load(path)
    assert torch.equal(loaded, saved) and loaded.dtype == torch.bfloat16
    assert not torch.equal(loaded, saved.flip(0))


def test_load_prompt_embeds_fills_up_one_prompt_with_zero_rows(tmp_path: Path) -> None:
    path, saved = tmp_path / "e.safetensors", embeds(4, 8)
    save_file({"anything": saved}, path)
    loaded = load(path)
    assert loaded.shape == (1, 6, 8)
    assert torch.equal(loaded[0, :4], saved) and not loaded[0, 4:].any()


def test_load_prompt_embeds_takes_the_named_tensor_of_several(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"prompt_embeds": embeds(4, 8), "mask": torch.ones(4)}, path)
    assert torch.equal(load(path)[0, :4], embeds(4, 8))
    save_file({"a": embeds(4, 8), "b": embeds(4, 8)}, path)
    with pytest.raises(ValueError, match=r"holds 2 tensors \(a, b\)"):
        load(path)


@pytest.mark.parametrize("shape", [(4, 9), (7, 8), (0, 8), (2, 7, 8), (8,), (1, 1, 4, 8), (4, 7)])
def test_load_prompt_embeds_refuses_another_width_or_length(tmp_path: Path, shape: tuple) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"prompt_embeds": embeds(*shape)}, path)
    with pytest.raises(ValueError, match="this model takes") as caught:
        load(path)
    text = str(caught.value)
    assert str(list(shape)) in text and "[rows, 8]" in text and "1 to 6 rows" in text


def test_load_prompt_embeds_refuses_what_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"prompt_embeds": torch.ones(4, 8, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match="use floating point"):
        load(path)
    save_file({"prompt_embeds": torch.full((4, 8), float("nan"))}, path)
    with pytest.raises(ValueError, match="not finite"):
        load(path)


def test_load_prompt_embeds_refuses_an_absent_or_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(CheckpointError, match=r"e\.safetensors cannot be read: No such file"):
        load(path)
    save_prompt_embeds(path, embeds(1, 6, 8))
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="is truncated"):
        load(path)


@pytest.mark.parametrize("function", [load_prompt_embeds, save_prompt_embeds])
def test_the_former_place_warns(function) -> None:
    with pytest.warns(DeprecationWarning, match=r"moved .* to flashdreams\.infra\.prompt; "):
        assert getattr(prompts, function.__name__) is function
    with pytest.raises(AttributeError, match="no attribute 'load_prompt'"):
        prompts.load_prompt  # noqa: B018


def test_saved_embeddings_stay_whole_where_others_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, saved = tmp_path / "e.safetensors", embeds(1, 6, 8)
    save_prompt_embeds(path, saved)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_prompt_embeds(path, -saved)
    assert torch.equal(load(path), saved) and os.listdir(tmp_path) == [path.name]
