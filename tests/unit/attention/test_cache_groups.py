"""Two chunks in one pass over the KV cache, against a plain list of frames (float32, atol 1e-5)."""

import pytest
import torch

from flashdreams.attention.backends import sdpa, sdpa_math
from flashdreams.attention.cache import CacheCursor, KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.merge import attend_ranges

ATOL = 1e-5
CPU = torch.device("cpu")
TOKENS, HEADS, HEAD_DIM = 3, 2, 16

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


def new_cache(window: int, sink: int, chunk: int, batch_size: int = 1) -> KVCache:
    spec = KVCacheSpec(
        batch_size=batch_size,
        sink_size_t=sink,
        window_size_t=window,
        tokens_per_frame=TOKENS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=CPU,
        staging_t=chunk,
    )
    return KVCache(spec, CacheCursor(sink, window, TOKENS))


def draw(seed: int, batch_size: int, frames: int) -> torch.Tensor:
    """Queries, keys and values ``[3, B, L, N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch_size, frames * TOKENS, HEADS, HEAD_DIM, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("window", "sink", "chunk"), COMBINATIONS)
def test_each_chunk_sees_its_own_sink_and_window(window, sink, chunk, batch_size):
    """Keys of the next chunk are those of noise, and replaced at once; clean ones remain."""
    cache, core = new_cache(window, sink, chunk, batch_size), AttentionCore(HEAD_DIM)
    clean: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def expected(q, end, own):
        seen = [f for f in range(end) if f < sink or f >= end - window]
        frames = [own.get(f) or clean[f] for f in seen]
        k, v = (torch.cat([frame[i] for frame in frames], 1) for i in (0, 1))
        return sdpa(q, k, v, scale=core.scale)

    def frames_of(first, k, v):
        parts = zip(k.split(TOKENS, 1), v.split(TOKENS, 1), strict=True)
        return {first + i: part for i, part in enumerate(parts)}

    for step in range(9):
        start, end = step * chunk, (step + 1) * chunk
        cache.cursor.place(chunk, CPU)
        own, following = draw(2 * step, batch_size, chunk), draw(2 * step + 1, batch_size, chunk)
        with cache.cursor.with_next(CPU):
            both = torch.stack([own, following], dim=2).flatten(1, 2)
            found = core(*both, cache).unflatten(0, (batch_size, 2))
        clean |= frames_of(start, *own[1:])
        noisy = frames_of(end, *following[1:])
        for i, (q, last, more) in enumerate(
            ((own[0], end, {}), (following[0], end + chunk, noisy))
        ):
            torch.testing.assert_close(found[:, i], expected(q, last, more), rtol=0, atol=ATOL)
        assert cache.cursor.groups == ()
        cache.cursor.advance()
    wrong = expected(own[0], end + chunk, noisy)  # negative control: what the other chunk sees
    assert (found[:, 0] - wrong).abs().max() > 100 * ATOL


@pytest.mark.parametrize("ranges", [[(0, 9)], [(2, 5)], [(0, 3), (5, 9)], [(0, 1), (3, 4), (6, 9)]])
@pytest.mark.parametrize("backend", [sdpa, sdpa_math])
def test_ranges_equal_their_keys_side_by_side(ranges, backend):
    q, k, v = draw(0, 2, 3)
    kept = torch.cat([torch.arange(*r) for r in ranges])
    found = attend_ranges(q, k, v, ranges, scale=0.3, backend=backend)
    expected = sdpa(q, k[:, kept], v[:, kept], scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    if len(kept) < 9:
        assert (found - sdpa(q, k, v, scale=0.3)).abs().max() > 100 * ATOL


def test_the_current_chunk_sees_a_prefix_and_staging_starts_when_frames_are_evicted():
    cursor = CacheCursor(1, 4, 1)
    groups = []
    for _ in range(6):
        cursor.place(2, CPU)
        with cursor.with_next(CPU):
            groups.append(cursor.groups)
        cursor.advance()
    assert groups == [
        (((0, 2),), ((0, 4),)),
        (((0, 4),), ((0, 1), (2, 6))),  # frame 4 fits, frame 5 evicts frame 1
        (((0, 5),), ((0, 2), (4, 7))),
        (((0, 5),), ((0, 1), (2, 4), (5, 7))),  # the hole goes round the ring
        (((0, 5),), ((0, 2), (4, 7))),
        (((0, 5),), ((0, 1), (2, 4), (5, 7))),
    ]
