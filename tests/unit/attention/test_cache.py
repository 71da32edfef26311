"""The KV cache against a plain list of frames (float32, atol 1e-5 where bits may differ)."""

import pytest
import torch

from flashdreams.attention.backends import resolve_backend, sdpa
from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.rope import RotaryEmbedding3D, apply_rope, time_rotation

ATOL = 1e-5
ROWS, COLUMNS, HEADS, HEAD_DIM = 1, 3, 2, 16
TOKENS = ROWS * COLUMNS

# (window, sink, chunk): the chunk divides them, and it does not.
COMBINATIONS = [
    (6, 0, 3),
    (7, 0, 3),
    (6, 3, 3),
    (5, 1, 3),
    (7, 2, 3),
    (4, 3, 2),
    (3, 4, 3),
    (5, 2, 1),
]


def new_cache(window: int, sink: int, relative: bool = False, dtype=torch.float32) -> KVCache:
    cursor = Cursor(sink, window, TOKENS)
    spec = KVCacheSpec(
        batch_size=1,
        sink_size_t=sink,
        window_size_t=window,
        tokens_per_frame=TOKENS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        relative_sink=relative,
    )
    return KVCache(spec, cursor)


def draw(seed: int, frames: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, frames * TOKENS, HEADS, HEAD_DIM)
    return list(torch.randn(shape, generator=generator))


def table(frames) -> torch.Tensor:
    rope = RotaryEmbedding3D(HEAD_DIM)
    return rope(torch.as_tensor(frames), ROWS, COLUMNS, torch.device("cpu"))


def held(end: int, window: int, sink: int) -> list[int]:
    return [f for f in range(end) if f < sink or f >= end - window]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("window", "sink", "chunk"), COMBINATIONS)
def test_attention_equals_that_over_an_ordered_window(window, sink, chunk, relative):
    """Absolute positions, or positions that number the slots: sink first, then the window.

    Unrotated keys are kept in a list; before every call the frames that are to be seen are put in
    order and rotated afresh.
    """
    cache, core = new_cache(window, sink, relative), AttentionCore(HEAD_DIM)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    drift = 0.0
    for index in range(8):
        start, end = index * chunk, (index + 1) * chunk
        cache.cursor.begin_step(chunk, torch.device("cpu"))
        cache.rotate_sink()
        for attempt in range(2):  # a denoising step, then the clean pass; the last one stays
            q, k, v = draw(10 * index + attempt, chunk)
            own = table(range(start, end))
            found = core(apply_rope(q, own), apply_rope(k, own), v, cache)
            seen = held(end, window, sink)
            all_k = [*keys, *k.split(TOKENS, 1)]
            all_v = [*values, *v.split(TOKENS, 1)]
            places = list(range(len(seen))) if relative else seen
            q_places = places[len(seen) - chunk :]
            expected = sdpa(
                apply_rope(q, table(q_places)),
                apply_rope(torch.cat([all_k[f] for f in seen], 1), table(places)),
                torch.cat([all_v[f] for f in seen], 1),
                scale=HEAD_DIM**-0.5,
            )
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
        if relative and sink and cache.cursor.evicted:
            absolute = apply_rope(torch.cat([all_k[f] for f in range(sink)], 1), table(range(sink)))
            drift = max(drift, (cache.k[:, : sink * TOKENS] - absolute).abs().max().item())
        cache.keep_sink()
        cache.cursor.advance()
        keys, values = all_k, all_v
    assert cache.cursor.evicted > 0
    assert not (relative and sink) or drift > 100 * ATOL  # negative control: the sink has moved


def test_frames_lie_in_the_slots_of_sink_and_ring():
    cursor = Cursor(sink_size_t=2, window_size_t=5, tokens_per_frame=1)
    assert cursor.frame_slots(0, 12) == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]
    for _ in range(3):
        cursor.begin_step(3, torch.device("cpu"))
        cursor.advance()
    assert cursor.past_frames() == [0, 1, 4, 5, 6, 7, 8] and cursor.evicted == 2
    cursor.begin_step(3, torch.device("cpu"))
    assert cursor.past_frames() == [0, 1, 7, 8]  # the new chunk takes the other three places


def test_nothing_is_moved_or_cloned():
    cache, core = new_cache(5, 1, relative=True), AttentionCore(HEAD_DIM)
    places = set()
    for index in range(6):
        cache.cursor.begin_step(3, torch.device("cpu"))
        cache.rotate_sink()
        before = cache.k.clone()
        core(*draw(index, 3), cache)
        changed = (before != cache.k).flatten(2).any(-1)[0].nonzero().flatten()
        assert set(changed.tolist()) <= set(cache.cursor.slots.tolist())
        cache.keep_sink()
        cache.cursor.advance()
        places.add((cache.k.data_ptr(), cache.v.data_ptr(), cache.cursor.slots.data_ptr()))
        visible = cache.visible()[0]
        assert visible.untyped_storage().data_ptr() == cache.k.untyped_storage().data_ptr()
    assert len(places) == 1


def test_the_sink_is_turned_from_its_stored_copy_only():
    """A hundred steps later it is still one rotation away: nothing adds up, also in bfloat16."""
    cache = new_cache(3, 2, relative=True, dtype=torch.bfloat16)
    for index in range(100):
        cache.cursor.begin_step(3, torch.device("cpu"))
        cache.rotate_sink()
        _, k, v = (x.bfloat16() for x in draw(index, 3))
        cache.update(k, v)
        cache.keep_sink()
        cache.cursor.advance()
        if index == 0:
            first = cache.k[:, : 2 * TOKENS].clone()
    assert torch.equal(cache.sink_k, first)
    cache.rotate_sink()
    delta = cache.cursor.evicted
    assert delta == 295
    expected = apply_rope(first, time_rotation(delta, HEAD_DIM))
    assert torch.equal(cache.k[:, : 2 * TOKENS], expected)
    assert not torch.equal(cache.k[:, : 2 * TOKENS], first)


def test_spec_states_the_bytes():
    cache = new_cache(5, 2, relative=True)
    tensors = (cache.k, cache.v, cache.sink_k)
    assert cache.spec.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert cache.spec.with_heads(1).nbytes * HEADS == cache.spec.nbytes


def test_published_size_of_the_cache():
    """21 latent frames at 480x832: 6.04 GB in bfloat16 for the 1.3B model."""
    spec = KVCacheSpec(
        batch_size=1,
        sink_size_t=0,
        window_size_t=21,
        tokens_per_frame=1560,
        num_heads=12,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    assert round(30 * spec.nbytes / 1e9, 2) == 6.04


def test_chunks_that_do_not_fit_are_refused():
    cache = new_cache(2, 1)
    with pytest.raises(ValueError, match="chunk of 3 latent frames does not fit window_size_t=2"):
        cache.cursor.begin_step(3, torch.device("cpu"))
    _, k, v = draw(0, 2)
    with pytest.raises(ValueError, match="expects 0 tokens of a chunk, got 6"):
        cache.update(k, v)
    cache.cursor.begin_step(1, torch.device("cpu"))
    with pytest.raises(ValueError, match="expects 3 tokens of a chunk, got 6"):
        cache.update(k, v)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"Unknown attention backend 'sdap'\. Allowed: sdpa"):
        resolve_backend("sdap")
