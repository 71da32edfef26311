"""Rollouts whose KV cache is INT8, against the same ones in float32."""

import pytest
import torch

from flashdreams.attention import quantized
from flashdreams.infra.snapshot_header import SnapshotError
from flashdreams.infra.weights import memory_estimate
from flashdreams.models.wan.transformer import SELF_ATTENTION
from tests import quantized_rollouts
from tests.quantized_rollouts import STEPS, begin, error, run
from tests.tiny import TEXT_DIM, tiny_pipeline, tiny_transformer

BOUND = 3e-3
"""Largest error of the latents over their largest entry: 2.5 times what was measured."""


def build(storage: str = "int8", **transformer):
    return quantized_rollouts.build(kv_cache_dtype=storage, **transformer)


def test_the_error_of_a_rollout_is_bounded(monkeypatch):
    exact, rounded = build("native"), build()
    expected = run(exact, begin(exact))
    latents = run(rounded, begin(rounded))
    assert torch.equal(latents[:, :, :2], expected[:, :, :2])  # nothing is cached yet
    assert 1e-5 < error(latents, expected) < BOUND

    monkeypatch.setattr(quantized, "LARGEST", 7.0)  # negative control: some three bits
    assert error(run(rounded, begin(rounded)), expected) > BOUND


def test_a_rollout_goes_on_with_the_same_bits():
    pipeline = build()
    cache = begin(pipeline)
    run(pipeline, cache, 4)
    state = cache.state_dict()
    assert {x.dtype for x in state["tensors"].values()} <= {torch.float32, torch.int64}
    other = pipeline.load_cache(state)
    assert torch.equal(run(pipeline, other), run(pipeline, cache))
    del state["tensors"][f"conditional/caches/{SELF_ATTENTION}/0/v"]
    with pytest.raises(SnapshotError, match=r"self_attn\.core/0/v"):
        pipeline.load_cache(state)


def test_a_rollout_may_go_on_in_another_storage():
    rounded, exact = build("int8"), build("native")
    cache = begin(rounded)
    run(rounded, cache, 4)
    latents = run(exact, exact.load_cache(cache.state_dict()))
    assert 0 < error(latents, run(rounded, cache)) < BOUND


def test_two_rollouts_interleave():
    pipeline = build()
    alone = [run(pipeline, begin(pipeline, seed)) for seed in (3, 4)]
    caches = [begin(pipeline, seed) for seed in (3, 4)]
    together = [[run(pipeline, cache, i + 1) for cache in caches] for i in range(STEPS)]
    for expected, parts in zip(alone, zip(*together, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim=2), expected)
    assert not torch.equal(*alone)


def test_a_prompt_update_writes_the_window_anew():
    pipeline = build("int8", relative_rope=False)
    changed, kept = begin(pipeline), begin(pipeline)
    for cache in (changed, kept):
        run(pipeline, cache, 4)
    pipeline.update_prompt(changed, torch.ones(1, 4, TEXT_DIM), reencode_window=True)
    layers = [c.diffusion.conditional.caches[SELF_ATTENTION][1] for c in (changed, kept)]
    assert not torch.equal(layers[0].v.values, layers[1].v.values)
    assert error(run(pipeline, changed), run(pipeline, kept)) > 1e-3


def test_the_estimate_knows_the_storage():
    def cache_bytes(**changes) -> int:
        return tiny_transformer(**changes).setup().cache_nbytes(1)

    assert cache_bytes(kv_cache_dtype="int8") * 48 == cache_bytes() * 13  # 12 + 1 bytes for 48
    sizes = dict(window_size_t=2_000_000)
    assert "KV cache 3.1 GB" in memory_estimate(tiny_pipeline(**sizes))
    assert "KV cache 832.0 MB" in memory_estimate(tiny_pipeline(kv_cache_dtype="int8", **sizes))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"kv_cache_dtype": "int4"}, "'native', 'int8'"),
        ({"kv_cache_dtype": "int8", "streaming": False}, "allowed is 'native'"),
    ],
)
def test_what_cannot_be_stored_is_refused(change, allowed):
    with pytest.raises(ValueError, match=allowed):
        tiny_transformer(**change)
