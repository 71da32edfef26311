"""Cache writes against their reference and against the engine's cache."""

import pytest
import torch
from flashdreams_kernels import kv_write, reference
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from tests.kernels.guarded import Guarded


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    k, v = torch.randn(2, *shape, generator=generator).to(device, dtype)
    return k, v


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape,dtype",
    [
        ((2, 5, 3, 32), torch.float32),
        ((1, 1, 1, 24), torch.bfloat16),
        ((1, 3, 2, 64), torch.float16),
    ],
)
def test_write_puts_tokens_into_their_slots_and_nowhere_else(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    index_type: torch.dtype,
    device: torch.device,
) -> None:
    batch, length, heads, head_dim = shape
    k, v = inputs(shape, dtype, device)
    slots = torch.tensor([6, 0, 1, 4, 3][:length], dtype=index_type, device=device)
    caches = [Guarded((batch, 7, heads, head_dim), dtype, device) for _ in range(2)]
    expected = [guarded.tensor.clone() for guarded in caches]
    kv_write.kv_write(k, v, caches[0].tensor, caches[1].tensor, slots)
    reference.kv_write(k, v, *expected, slots.long())
    for guarded, wanted in zip(caches, expected, strict=True):
        assert torch.equal(guarded.tensor.nan_to_num(7), wanted.nan_to_num(7))
        assert guarded.intact()
    assert not torch.equal(caches[0].tensor[:, slots.long()], v)


def test_write_drops_tokens_without_a_slot(device: torch.device) -> None:
    k, v = inputs((1, 4, 2, 32), torch.float32, device)
    caches = [Guarded((1, 3, 2, 32), torch.float32, device) for _ in range(2)]
    slots = torch.tensor([-1, 2, 3, 2**40], device=device)
    kv_write.kv_write(k, v, caches[0].tensor, caches[1].tensor, slots)
    assert torch.equal(caches[0].tensor[:, 2], k[:, 1])
    assert torch.equal(caches[1].tensor[:, 2], v[:, 1])
    assert all(guarded.tensor[:, :2].isnan().all() for guarded in caches)
    assert all(guarded.intact() for guarded in caches)


def test_write_takes_views_as_they_are(device: torch.device) -> None:
    fused, _ = inputs((2, 3, 6, 32), torch.float32, device)
    k, v = fused[:, :, 2:4], fused[:, :, 4:6]
    storage = torch.zeros(2, 9, 4, 32, device=device)
    k_cache, v_cache = storage[:, 1:, 0:2], storage[:, 1:, 2:4]
    slots = torch.tensor([7, 0, 5], device=device)
    kv_write.kv_write(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[:, slots], k) and torch.equal(v_cache[:, slots], v)
    assert storage[:, 0].eq(0).all() and storage[:, [2, 3, 4, 5, 7]].eq(0).all()


def test_write_equals_the_cache_of_the_engine(device: torch.device) -> None:
    cursor = Cursor(sink_size_t=1, window_size_t=3, tokens_per_frame=2)
    spec = KVCacheSpec(
        batch_size=1,
        sink_size_t=1,
        window_size_t=3,
        tokens_per_frame=2,
        num_heads=2,
        head_dim=16,
        dtype=torch.float32,
        device=device,
    )
    cache = KVCache(spec, cursor)
    k_cache, v_cache = cache.k.clone(), cache.v.clone()
    for step in range(4):
        cursor.begin_step(2, device)
        k, v = inputs((1, 4, 2, 16), torch.float32, device)
        k, v = k + step, v - step
        cache.update(k, v)
        kv_write.kv_write(k, v, k_cache, v_cache, cursor.slots)
        cursor.advance()
        assert torch.equal(k_cache, cache.k) and torch.equal(v_cache, cache.v)
    assert not torch.equal(k_cache, v_cache)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_write_passes_through_compile(backend: str, device: torch.device) -> None:
    k, v = inputs((1, 2, 1, 16), torch.float32, device)
    slots = torch.tensor([3, 1], device=device)

    def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        kv_write.kv_write(k + 1, v, k_cache, v_cache, slots)
        return k_cache.sum()

    eager, compiled = torch.zeros(2, 2, 1, 4, 1, 16, device=device)
    expected = write(k, v, eager[0], eager[1])
    total = torch.compile(write, fullgraph=True, backend=backend)(k, v, compiled[0], compiled[1])
    assert torch.equal(compiled, eager) and torch.equal(total, expected)
    assert compiled.ne(0).any()


def test_write_declares_what_it_mutates(device: torch.device) -> None:
    k, v = inputs((1, 2, 1, 16), torch.float32, device)
    caches = torch.zeros(2, 1, 4, 1, 16, device=device)
    slots = torch.tensor([3, 1], device=device)
    torch.library.opcheck(
        torch.ops.flashdreams.kv_write,
        (k, v, caches[0], caches[1].clone(), slots),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_write_names_what_does_not_fit(device: torch.device) -> None:
    k, v = inputs((1, 2, 1, 16), torch.float32, device)
    cache, slots = torch.zeros(1, 4, 1, 16, device=device), torch.arange(2, device=device)
    with pytest.raises(ValueError, match=r"slots must be \[2\], got \[3\]"):
        kv_write.kv_write(k, v, cache, cache.clone(), torch.arange(3, device=device))
    with pytest.raises(ValueError, match=r"v_cache must be \[1, 4, 1, 16\]"):
        kv_write.kv_write(k, v, cache, cache[:, :3], slots)
    with pytest.raises(TypeError, match=r"k_cache is torch.float16; allowed here: torch.float32"):
        kv_write.kv_write(k, v, cache.half(), cache, slots)
    with pytest.raises(TypeError, match=r"slots is torch\.float32"):
        kv_write.kv_write(k, v, cache, cache.clone(), slots.float())
