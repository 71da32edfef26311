"""Attention backends and the measured choice among them (float32, atol 2e-6)."""

import dataclasses
import importlib.util
import json
import pickle

import pytest
import torch

from flashdreams.attention import backends
from flashdreams.attention.backends import (
    BACKENDS,
    resolve_backend,
    sdpa,
    usable_backends,
    why_unusable,
)
from flashdreams.attention.choose import (
    AttentionShape,
    choose_backend,
    draw_inputs,
    reference_attention,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(batch_size=1, queries=6, keys=15, num_heads=2, head_dim=8)
SCALE = SHAPE.head_dim**-0.5
ATOL = 2e-6
RIGHT = {name: BACKENDS[name] for name in ("sdpa", "sdpa_flash", "sdpa_math")}


@pytest.fixture
def inputs():
    return draw_inputs(SHAPE, CPU, torch.float32)


def drops_last_key(q, k, v, *, scale):
    return sdpa(q, k[:, :-1], v[:, :-1], scale=scale)


@pytest.mark.parametrize("name", RIGHT)
def test_backends_match_the_reference(name, inputs):
    expected = reference_attention(*inputs, SCALE)
    torch.testing.assert_close(
        RIGHT[name](*inputs, scale=SCALE), expected, atol=ATOL, rtol=0, check_stride=False
    )
    assert (drops_last_key(*inputs, scale=SCALE) - expected).abs().max() > 1000 * ATOL


@pytest.mark.parametrize("name", RIGHT)
def test_two_halves_merge_to_the_whole_by_their_sums(name, inputs):
    q, k, v = inputs
    halves = [
        RIGHT[name](q, k[:, part], v[:, part], scale=SCALE, return_lse=True)
        for part in (slice(0, 7), slice(7, None))
    ]
    lse = torch.stack([half[1] for half in halves])
    assert lse.shape == (2, 1, 2, 6) and lse.dtype == torch.float32
    weights = lse.softmax(0).transpose(2, 3)[..., None]
    merged = sum(w * half[0] for w, half in zip(weights, halves, strict=True))
    expected = reference_attention(q, k, v, SCALE)
    torch.testing.assert_close(merged, expected, atol=ATOL, rtol=0)
    assert ((halves[0][0] + halves[1][0]) / 2 - expected).abs().max() > 1000 * ATOL


def test_usable_backends_of_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert usable_backends(CPU, torch.float32) == list(RIGHT)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sdpa_cudnn", "needs a CUDA device, not cpu"), ("triton", "TRITON_INTERPRET=1")],
)
def test_an_impossible_wish_names_the_usable(name, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=reason) as caught:
        resolve_backend(name, CPU, torch.float32)
    assert "Usable on cpu with float32: sdpa, sdpa_flash, sdpa_math." in str(caught.value)


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"Allowed: sdpa, .*Did you mean 'flash_attn'"):
        resolve_backend("flash_atn")


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)
def test_flash_attention_says_how_to_install_it(inputs):
    with pytest.raises(ImportError, match="pip install flash-attn --no-build-isolation"):
        BACKENDS["flash_attn"](*inputs, scale=SCALE)
    assert "pip install" in why_unusable("flash_attn", CUDA, torch.bfloat16)


def test_types_and_heads_that_do_not_fit_are_said():
    assert "not float32" in why_unusable("sdpa_flash", CUDA, torch.float32)
    assert "not 260" in why_unusable("sdpa_cudnn", CUDA, torch.bfloat16, 260)
    assert why_unusable("sdpa_efficient", CUDA, torch.float32) is None


def test_a_lying_backend_is_refused_however_fast():
    def does_nothing(q, k, v, *, scale):
        return q

    def not_finite(q, k, v, *, scale):
        return torch.full_like(q, torch.nan)

    def breaks(q, k, v, *, scale):
        raise RuntimeError("no kernel image")

    def other_shape(q, k, v, *, scale):
        return q.transpose(1, 2)

    liars = (does_nothing, drops_last_key, not_finite, breaks, other_shape)
    candidates = {liar.__name__: liar for liar in liars} | {"sdpa_math": BACKENDS["sdpa_math"]}
    choice = choose_backend(SHAPE, CPU, torch.float32, candidates, repeats=1)
    assert choice.name == "sdpa_math"
    verdicts = {row.name: row.verdict for row in choice.rows}
    assert "differs by" in verdicts["does_nothing"] and "differs by" in verdicts["drops_last_key"]
    assert "not finite" in verdicts["not_finite"] and "no kernel image" in verdicts["breaks"]
    assert "wrong: gives [1, 2, 6, 8]" in verdicts["other_shape"]
    assert all(row.ms is None for row in choice.rows if row.name != "sdpa_math")


def test_one_missing_key_among_thousands_shows_in_bfloat16():
    shape = dataclasses.replace(SHAPE, queries=70, keys=3000)
    candidates = {"liar": drops_last_key, "sdpa": sdpa}
    choice = choose_backend(shape, CPU, torch.bfloat16, candidates, repeats=1)
    assert choice.name == "sdpa"


def test_over_a_quantized_cache_the_call_of_the_whole_core_is_measured():
    shape = dataclasses.replace(SHAPE, storage="int8")
    candidates = {"liar": drops_last_key, "sdpa": sdpa}
    choice = choose_backend(shape, CPU, torch.float32, candidates, repeats=1)
    assert choice.name == "sdpa"
    assert choice.rows[1].error < 1e-5 and "differs by" in choice.rows[0].verdict


def test_only_liars_leave_nothing_to_choose():
    with pytest.raises(ValueError, match="No attention backend is accurate"):
        choose_backend(SHAPE, CPU, torch.float32, {"liar": drops_last_key}, repeats=1)


def test_the_fastest_is_chosen_and_can_be_told_to_other_ranks():
    def slow(q, k, v, *, scale):
        for _ in range(20):
            out = BACKENDS["sdpa_math"](q, k, v, scale=scale)
        return out

    candidates = {"slow": slow, "sdpa": sdpa}
    choice = choose_backend(SHAPE, CPU, torch.float32, candidates, repeats=3)
    assert choice.name == "sdpa"
    assert pickle.loads(pickle.dumps(choice)) == choice
    assert choice.stats()["attention_backend"] == "sdpa"
    json.dumps(choice.stats())
    assert "sdpa" in choice.table() and "chosen" in choice.table()
