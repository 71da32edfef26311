"""Chunk attention against its reference."""

import pytest
import torch
from flashdreams_kernels import attention, reference
from flashdreams_kernels.launch import Target, target_of
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from tests.kernels.guarded import TOLERANCE, Guarded, error


def inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, slots, heads, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, length), (batch, slots), (batch, slots))
    q, k, v = (torch.randn(*s, heads, head_dim, generator=generator) for s in sizes)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


CASES = {
    "odd": ((1, 5, 75, 2, 64), torch.float32, 71, 1),
    "odd, split": ((1, 35, 75, 1, 64), torch.float32, 71, 3),
    "one token": ((1, 1, 1, 1, 128), torch.float32, 1, 1),
    "batch, whole blocks": ((2, 3, 64, 2, 32), torch.float32, 64, 2),
    "more splits than blocks": ((1, 2, 40, 1, 32), torch.float32, 33, 5),
    "head dim padded": ((1, 4, 37, 2, 24), torch.float32, 20, 2),
    "bf16": ((1, 4, 70, 1, 128), torch.bfloat16, 66, 2),
    "fp16": ((1, 4, 70, 1, 64), torch.float16, 66, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_reference(case: str, device: torch.device) -> None:
    shape, dtype, length, splits = CASES[case]
    q, k, v = inputs(shape, dtype, device)
    visible = torch.tensor([length], device=device)
    out, lse = attention.chunk_attention(
        q, k, v, visible=visible, return_lse=True, num_splits=splits
    )
    expected, expected_lse = reference.chunk_attention(q, k, v, visible=visible)
    assert out.dtype == dtype and out.is_contiguous()
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(lse, expected_lse) < TOLERANCE[torch.float32]


def test_attention_error_sees_one_key_too_few(device: torch.device) -> None:
    q, k, v = inputs((1, 5, 75, 2, 64), torch.float32, device)
    out = attention.chunk_attention(q, k, v, visible=torch.tensor(71, device=device), num_splits=1)
    expected, _ = reference.chunk_attention(q, k, v, visible=torch.tensor(70))
    assert error(out, expected) > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 3])
def test_attention_writes_all_of_its_output_and_nothing_else(
    splits: int, device: torch.device
) -> None:
    q, k, v = inputs((1, 35, 40, 2, 32), torch.float32, device)
    visible = torch.tensor(37, dtype=torch.int32, device=device)
    expected, expected_lse = reference.chunk_attention(q, k, v, visible=visible)
    k[:, 37:], v[:, 37:] = torch.nan, torch.nan
    reads = [Guarded.around(x) for x in (q, k, v)]
    out = Guarded((1, 35, 2, 32), torch.float32, device)
    lse = Guarded((1, 2, 35), torch.float32, device)
    tensors = [guarded.tensor for guarded in reads]
    launches = attention.plan(
        *tensors, visible, 32**-0.5, out.tensor, lse.tensor, splits, target_of(device)
    )
    for launch in launches:
        launch.run()
    assert error(out.tensor, expected) < TOLERANCE[torch.float32]
    assert error(lse.tensor, expected_lse) < TOLERANCE[torch.float32]
    assert all(guarded.intact() for guarded in (*reads, out, lse))


BLOCKS = attention.TileConfig(32, 32, 4, 2, descriptors=True)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, splits: int, tiles=BLOCKS
) -> tuple[Tensor, bool]:
    """A call with tiles of its own, and whether it reads through descriptors."""
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    target, empty = target_of(q.device), q.new_empty(0, dtype=torch.float32)
    factor = q.shape[-1] ** -0.5
    launches = attention.plan(q, k, v, visible, factor, out, empty, splits, target, tiles)
    for launch in launches:
        launch.run()
    return out, launches[0].constants["IN_BLOCKS"]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("visible", [5, 64, 101, 110])
def test_attention_in_blocks_reads_what_pointers_read(
    splits: int, visible: int, device: torch.device
) -> None:
    """Also with two batch entries, other strides and poisoned keys behind the visible ones."""
    q, keys, values = inputs((2, 35, 120, 3, 32), torch.float16, device)
    k, v = keys[:, 10:], values[:, 10:]
    k[:, visible:], v[:, visible:] = torch.nan, torch.nan
    count = torch.tensor(visible, device=device)
    found, in_blocks = attend_in_blocks(q, k, v, count, splits)
    expected, _ = reference.chunk_attention(q, k, v, visible=count)
    assert in_blocks and error(found, expected) < TOLERANCE[torch.float16]
    wrong, _ = reference.chunk_attention(q, k, v.roll(1, 2), visible=count)
    assert error(found, wrong) > 0.1


def test_attention_takes_pointers_where_no_descriptor_can_be_made(device: torch.device) -> None:
    q, k, v = inputs((1, 5, 80, 4, 32), torch.float16, device)
    expected, in_blocks = attend_in_blocks(q[:, :, :2], k[:, :, 1:3], v[:, :, 1:3], None, 2)
    assert in_blocks  # some heads of more lie beside each other
    apart = torch.zeros(1, 80, 2, 40, dtype=k.dtype, device=device)[..., :32].copy_(k[:, :, 1:3])
    shifted = torch.zeros(1, 80, 65, dtype=k.dtype, device=device)[..., 1:].unflatten(-1, (2, 32))
    for other in (apart, shifted.copy_(k[:, :, 1:3])):
        found, in_blocks = attend_in_blocks(q[:, :, :2], other, v[:, :, 1:3], None, 2)
        assert not in_blocks and torch.equal(found, expected)
    narrow = inputs((1, 5, 80, 2, 24), torch.float16, device)
    assert not attend_in_blocks(*narrow, None, 1)[1]


def test_attention_reads_a_poisoned_key_that_is_visible(device: torch.device) -> None:
    q, k, v = inputs((1, 2, 40, 1, 32), torch.float32, device)
    k[:, 36] = torch.nan
    visible = torch.tensor(37, device=device)
    assert attention.chunk_attention(q, k, v, visible=visible).isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_attention_of_nothing_is_zero(splits: int, device: torch.device) -> None:
    q, k, v = inputs((1, 3, 40, 2, 32), torch.float32, device)
    out, lse = attention.chunk_attention(
        q,
        k,
        v,
        visible=torch.tensor(0, device=device),
        return_lse=True,
        num_splits=splits,
    )
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_attention_follows_a_length_that_changes_in_place(device: torch.device) -> None:
    q, k, v = inputs((1, 3, 70, 1, 32), torch.float32, device)
    visible = torch.tensor([12], device=device)
    results = []
    for length in (12, 70, 1000):
        visible.fill_(length)
        results.append(attention.chunk_attention(q, k, v, visible=visible))
        expected, _ = reference.chunk_attention(q, k[:, :length], v[:, :length])
        assert error(results[-1], expected) < TOLERANCE[torch.float32]
    assert error(results[0], results[1]) > 1e-2
    assert torch.equal(results[1], results[2])


def test_attention_over_a_wrapped_ring_equals_the_ordered_window(device: torch.device) -> None:
    sink, window, frames, tokens = 1, 3, 9, 6
    shape = (1, tokens, frames * tokens, 2, 32)
    q, keys, values = inputs(shape, torch.float32, device)
    k_cache = torch.full((1, (sink + window) * tokens, 2, 32), torch.nan, device=device)
    v_cache = k_cache.clone()
    for frame in range(frames):
        slot = frame if frame < sink else sink + (frame - sink) % window
        slots = slot * tokens + torch.arange(tokens, device=device)
        span = slice(frame * tokens, (frame + 1) * tokens)
        reference.kv_write(keys[:, span], values[:, span], k_cache, v_cache, slots)
    out = attention.chunk_attention(q, k_cache, v_cache)
    ordered = [*range(sink * tokens), *range((frames - window) * tokens, frames * tokens)]
    expected, _ = reference.chunk_attention(q, keys[:, ordered], values[:, ordered])
    assert error(out, expected) < TOLERANCE[torch.float32]
    shifted = [index - tokens if index >= sink * tokens else index for index in ordered]
    wrong, _ = reference.chunk_attention(q, keys[:, shifted], values[:, shifted])
    assert error(out, wrong) > 1e-2


def test_attention_takes_views_as_they_are(device: torch.device) -> None:
    fused = inputs((1, 4, 4, 6, 32), torch.float32, device)[0]
    q = fused[:, :, 0:2]
    storage_k, storage_v = inputs((1, 1, 90, 5, 32), torch.float32, device)[1:]
    k, v = storage_k[:, 7:47, 1:3], storage_v[:, 7:47, 3:5]
    out = attention.chunk_attention(q, k, v, num_splits=2)
    expected, _ = reference.chunk_attention(q, k, v)
    assert error(out, expected) < TOLERANCE[torch.float32]
    assert error(out, reference.chunk_attention(q, k, storage_v[:, 7:47, 1:3])[0]) > 1e-2


def test_attention_halves_merge_through_their_lse(device: torch.device) -> None:
    q, k, v = inputs((1, 3, 50, 2, 32), torch.float32, device)
    halves = [
        attention.chunk_attention(q, k[:, span], v[:, span], return_lse=True)
        for span in (slice(0, 20), slice(20, 50))
    ]
    lse = torch.stack([lse for _, lse in halves])
    weights = torch.softmax(lse, dim=0).transpose(2, 3)[..., None]
    merged = sum(out * weight for (out, _), weight in zip(halves, weights, strict=True))
    expected, expected_lse = reference.chunk_attention(q, k, v)
    assert error(merged, expected) < TOLERANCE[torch.float32]
    assert error(torch.logsumexp(lse, 0), expected_lse) < TOLERANCE[torch.float32]
    assert error(halves[0][0], expected) > 1e-2


def test_strict_attention_gives_the_same_bits_for_any_share_of_queries_and_heads(
    device: torch.device,
) -> None:
    q, k, v = inputs((1, 35, 140, 2, 32), torch.float32, device)
    splits = 4
    whole = attention.chunk_attention(q, k, v, num_splits=splits)
    share = attention.chunk_attention(q[:, 20:, 1:], k[:, :, 1:], v[:, :, 1:], num_splits=splits)
    assert torch.equal(whole[:, 20:, 1:], share)
    other = attention.chunk_attention(q[:, 20:, 1:], k[:, :, 1:], v[:, :, 1:], num_splits=1)
    assert not torch.equal(share, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_passes_through_compile(backend: str, device: torch.device) -> None:
    q, k, v = inputs((1, 3, 40, 1, 32), torch.float32, device)

    def attend(q: Tensor, visible: Tensor) -> Tensor:
        return attention.chunk_attention(2 * q, k, v, visible=visible, num_splits=1) + 1

    visible = torch.tensor(21, device=device)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)(q, visible)
    assert torch.equal(compiled, attend(q, visible))
    assert not torch.equal(compiled, attend(q, visible + 1))


def test_attention_keeps_its_schema(device: torch.device) -> None:
    q, k, v = inputs((1, 2, 5, 1, 32), torch.float32, device)
    torch.library.opcheck(
        torch.ops.flashdreams.chunk_attention,
        (q, k, v, None, 0.5, True, 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def refused(kind: type[Exception], text: str, device: torch.device, **changes) -> None:
    q, k, v = inputs((1, 2, 5, 1, 32), torch.float32, device)
    arguments = {"q": q, "k": k, "v": v} | changes
    with pytest.raises(kind, match=text):
        attention.chunk_attention(**arguments)


def test_attention_names_what_does_not_fit(device: torch.device) -> None:
    wide = torch.zeros(1, 5, 1, 64, device=device)
    refused(ValueError, r"k must be \[1, any, 1, 32\], got \[1, 5, 1, 64\]", device, k=wide)
    refused(ValueError, "v has stride 2 along its last dim", device, v=wide[..., ::2])
    refused(TypeError, "k is torch.float64", device, k=wide[..., :32].double())
    refused(TypeError, "q is torch.int64", device, q=wide[:, :2, :, :32].long())
    refused(ValueError, "q must be", device, q=wide[0])
    refused(ValueError, "scale=-1", device, scale=-1.0)
    refused(ValueError, "num_splits=0", device, num_splits=0)
    refused(ValueError, "visible must hold one", device, visible=torch.zeros(2, device=device))
    refused(TypeError, "visible is torch.float32", device, visible=torch.ones(1, device=device))


def test_splits_fill_the_last_wave() -> None:
    """The 1.3B model on an H200: 37 tiles of queries x 12 heads on 132 multiprocessors."""
    tiles, blocks, processors = 37 * 12, 256, 132

    def busy(splits: int) -> float:
        waves = -(-tiles * splits // processors)
        return tiles * splits / (waves * processors)

    chosen = attention.choose_num_splits(tiles, blocks, processors)
    assert busy(1) < 0.85 < 0.95 < busy(chosen)
    assert attention.choose_num_splits(tiles, 4, processors) == 1
    assert attention.choose_num_splits(12, blocks, processors) > 8
    assert attention.choose_num_splits(1, 1, processors) == 1


def test_tiles_depend_on_the_machine_and_not_on_the_shape() -> None:
    hopper = Target(90, 132)
    assert attention.tile_config(hopper, 96, 2) == attention.tile_config(hopper, 128, 2)
    assert attention.tile_config(hopper, 128, 2) != attention.tile_config(hopper, 128, 4)
    assert attention.tile_config(Target(103, 148), 128, 2) == attention.TILES[100, 128]
    assert attention.tile_config(Target(89, 128), 128, 2) != attention.TILES[80, 128]


def test_attention_is_a_backend_of_the_core(device: torch.device) -> None:
    spec = KVCacheSpec(
        batch_size=1,
        sink_size_t=1,
        window_size_t=2,
        tokens_per_frame=3,
        num_heads=2,
        head_dim=16,
        dtype=torch.float32,
        device=device,
    )
    cursors = [Cursor(1, 2, tokens_per_frame=3) for _ in range(2)]
    caches = [KVCache(spec, cursor) for cursor in cursors]
    cores = [AttentionCore(16), AttentionCore(16, backend=attention.chunk_attention)]
    for step in range(4):
        q, k, v = inputs((1, 3, 3, 2, 16), torch.float32, device)
        results = []
        for core, cache in zip(cores, caches, strict=True):
            cache.cursor.begin_step(1, device)
            results.append(core(q, k + step, v - step, cache))
            cache.cursor.advance()
        assert error(results[1], results[0]) < TOLERANCE[torch.float32]
    assert error(results[1], v - step) > 1e-2
