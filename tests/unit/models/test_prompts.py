"""Embeddings made beforehand, and hashed words."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.models.prompts import (
    HashTextEncoder,
    HashTextEncoderConfig,
    load_prompt_embeds,
    save_prompt_embeds,
)
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
    with pytest.raises(ValueError, match="floats are wanted"):
        load(path)
    save_file({"prompt_embeds": torch.full((4, 8), float("nan"))}, path)
    with pytest.raises(ValueError, match="not finite"):
        load(path)


def test_load_prompt_embeds_refuses_an_absent_or_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(CheckpointError, match=r"not found: .*e\.safetensors"):
        load(path)
    save_prompt_embeds(path, embeds(1, 6, 8))
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="is truncated"):
        load(path)


def test_hashed_words_depend_on_word_and_seed_alone() -> None:
    encoder = HashTextEncoder(HashTextEncoderConfig())
    first = encoder(["red wall  red", "wall"])
    assert first.shape == (2, 16, 64)
    assert torch.equal(first[0, 0], first[0, 2]) and torch.equal(first[0, 1], first[1, 0])
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not first[0, 3:].any() and not first[1, 1:].any()
    other = HashTextEncoder(HashTextEncoderConfig(seed=1))(["red wall red"])
    assert not torch.equal(other[0, 0], first[0, 0])
    values = first[0, :2]
    assert abs(values.mean()) < 0.3 and 0.7 < values.var() < 1.3


def test_hashed_words_are_the_same_on_every_machine() -> None:
    embedded = HashTextEncoder(HashTextEncoderConfig(text_dim=4))(["courtyard"])[0, 0]
    expected = torch.tensor([-0.716303, 0.639063, 0.463572, 1.422497])
    torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=0)


def test_hashed_words_leave_the_meta_device_and_take_the_dtype() -> None:
    with torch.device("meta"):
        encoder = HashTextEncoder(HashTextEncoderConfig(dtype="bfloat16"))
    encoder.init_buffers()
    assert encoder(["red"]).dtype == torch.bfloat16 and encoder(["red"]).device.type == "cpu"
    assert encoder.state_dict() == {}


def test_hashed_prompts_are_checked() -> None:
    encoder = HashTextEncoder(HashTextEncoderConfig(text_len=2))
    with pytest.raises(ValueError, match="prompt 0 has 3 words, 2 are allowed: shorten it by 1"):
        encoder(["one two three"])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        encoder([" "])
    assert not encoder([""]).any()
