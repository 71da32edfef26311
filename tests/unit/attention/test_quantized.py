"""Keys and values in INT8: bounds from the formats, exact where nothing needs rounding."""

from dataclasses import replace

import pytest
import torch

from flashdreams.attention import quantized
from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.quantized import QuantizedTokens
from flashdreams.attention.rope import apply_rope, time_rotation

CPU = torch.device("cpu")
BOUND = 1 / 127
"""Largest error over the largest entry of a row: half a step, the range used to half at least."""
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-9, torch.float16: 2**-11}
"""Of the entries that the comparison itself computes in a type."""
TOKENS, HEADS, HEAD_DIM = 3, 2, 16
SPEC = KVCacheSpec(
    batch_size=2,
    sink_size_t=2,
    window_size_t=4,
    tokens_per_frame=TOKENS,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    dtype=torch.float32,
    device=CPU,
    relative_sink=True,
)


def draw(seed: int, tokens: int, dtype=torch.float32) -> torch.Tensor:
    """``[2, tokens, N, D]``, rows of very unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, HEADS, HEAD_DIM, generator=generator)
    return (x * torch.randn(2, tokens, HEADS, 1, generator=generator).mul(3).exp()).to(dtype)


def stored(x: torch.Tensor) -> QuantizedTokens:
    kept = QuantizedTokens(tuple(x.shape), x.dtype, CPU)
    kept.index_copy_(1, torch.arange(x.shape[1]), x)
    return kept


def new_cache(storage: str = "int8", **changes) -> KVCache:
    spec = replace(SPEC, storage=storage, **changes)
    return KVCache(spec, Cursor(spec.sink_size_t, spec.window_size_t, TOKENS))


def fill(cache: KVCache, steps: int, len_t: int = 2) -> None:
    for step in range(cache.cursor.start // len_t, steps):
        cache.cursor.begin_step(len_t, CPU)
        cache.rotate_sink()
        cache.update(*(draw(2 * step + i, len_t * TOKENS, cache.spec.dtype) for i in (0, 1)))
        cache.keep_sink()
        cache.cursor.advance()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rounding_stays_within_half_a_step(dtype):
    x = draw(0, 200, dtype)
    error = (stored(x)[:, :] - x).float().abs().amax(-1) / x.float().abs().amax(-1)
    assert BOUND / 4 < error.max() <= BOUND + ROUNDING[dtype]


def test_a_scale_of_the_whole_token_is_seen():
    """Negative control: heads of very unequal size need a scale each."""
    x = draw(0, 200)
    x[:, :, 1] *= 1e-3
    together = stored(x.flatten(2)[:, :, None])[:, :].view_as(x)
    error = (together - x).abs().amax(-1) / x.abs().amax(-1)
    assert error.max() > 2 * BOUND


@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_is_read_can_be_written_again_without_a_change(dtype):
    x = draw(1, 500, dtype)
    once = stored(x)[:, :]
    assert torch.equal(stored(once)[:, :], once)
    assert not torch.equal(once, x)


def test_extreme_rows_are_kept():
    x = torch.zeros(1, 4, 1, 8)
    x[0, 1], x[0, 2], x[0, 3, 0, 0] = 1e38, 1e-30, -448.0
    kept = stored(x)[:, :]
    assert torch.isfinite(kept).all() and (kept[0, 0] == 0).all()
    assert ((kept - x).abs() <= BOUND * x.abs()).all()


def test_rows_at_both_ends_of_float16_are_kept():
    largest = torch.finfo(torch.float16).max
    tops = torch.tensor([2.0**-24, 5 * 2.0**-24, 2.0**-15, 1.0, largest])
    x = (tops[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.0])).half()[None, :, None]
    kept = stored(x)
    error = (kept[:, :].float() - x.float()).abs()[0, :, 0] / tops[:, None]
    assert error.max() <= 2**-11
    powers = quantized.power_of_two(kept.exponents)
    in_float16 = kept.values.to(torch.float16) * powers.to(torch.float16)  # negative control
    assert (in_float16[0, 0] == 0).all() and in_float16[0, -1].isinf().any()


@pytest.mark.parametrize("storage", ["native", "int8"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_spec_knows_how_many_bytes_there_are(storage, relative, dtype):
    cache = new_cache(storage, relative_sink=relative, dtype=dtype)
    parts = [x for x in (cache.k, cache.v, cache.sink_k) if x is not None]
    assert cache.spec.nbytes == sum(x.nbytes for x in parts)
    if storage != "native":
        wide = replace(cache.spec, storage="native", head_dim=128)
        assert replace(wide, storage=storage).nbytes / wide.nbytes == 129 / (128 * dtype.itemsize)


def test_the_chunk_sees_itself_unrounded_and_the_past_rounded():
    cache, exact = new_cache(), new_cache("native")
    for other in (cache, exact):
        fill(other, 3)
        other.cursor.begin_step(2, CPU)
    own = draw(50, 2 * TOKENS), draw(51, 2 * TOKENS)
    for read, true, new in zip(cache.update(*own), exact.update(*own), own, strict=True):
        assert torch.equal(read[:, cache.cursor.slots], new)
        past = [i for i in range(read.shape[1]) if i not in cache.cursor.slots.tolist()]
        largest = true[:, past].abs().amax(-1, keepdim=True)
        error = ((read - true)[:, past].abs() / largest).amax()
        assert 0 < error <= BOUND
    assert not torch.equal(cache.visible()[0][:, cache.cursor.slots], own[0])


def test_the_sink_is_turned_from_what_was_stored_first():
    cache = new_cache()
    fill(cache, 1)
    first = cache.sink_k[:, :]
    fill(cache, 40)
    assert torch.equal(cache.sink_k[:, :], first)
    turned = apply_rope(first, time_rotation(cache.cursor.evicted, HEAD_DIM))
    sink = cache.k[:, : 2 * TOKENS]
    bound = BOUND * turned.abs().amax(-1, keepdim=True)
    assert ((sink - turned).abs() <= bound).all()
    assert ((sink - first).abs() > bound).any()


def test_a_cache_goes_on_with_the_same_bits_from_its_state():
    cache = new_cache()
    fill(cache, 6)
    state, frames = dict(cache.canonical_tensors()), cache.cursor.past_frames()
    assert state["k"].dtype == torch.float32
    other = new_cache()
    other.cursor.reset(cache.cursor.start)
    other.load_canonical(frames, state)
    for x, y in ((cache.k, other.k), (cache.v, other.v), (cache.sink_k, other.sink_k)):
        assert torch.equal(x[:, :], y[:, :])
    state["k"][:, -1] *= 1.1
    other.load_canonical(frames, state)
    assert not torch.equal(cache.k[:, :], other.k[:, :])


def test_frames_move_without_loss():
    cache, slots = new_cache(), [0, 1, 4, 5, 2]
    fill(cache, 3)
    before = [x[:, :].unflatten(1, (-1, TOKENS)) for x in (cache.k, cache.v)]
    cache.scatter(slots)
    for x, old in zip((cache.k, cache.v), before, strict=True):
        now = x[:, :].unflatten(1, (-1, TOKENS))
        assert torch.equal(now[:, slots], old[:, :5])
        assert not torch.equal(now, old)


def test_a_core_that_reads_an_fp8_cache_by_itself_is_refused():
    """Its scales would stay zero."""
    cache = new_cache("fp8")
    cache.cursor.begin_step(1, CPU)
    with pytest.raises(ValueError, match=r"storage=config\.kv_cache_dtype in cache_specs"):
        cache.update(draw(0, TOKENS), draw(1, TOKENS))
