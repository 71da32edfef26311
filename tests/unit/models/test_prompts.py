"""Hashed words."""

import pytest
import torch

from flashdreams.models.prompts import HashTextEncoder, HashTextEncoderConfig


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
