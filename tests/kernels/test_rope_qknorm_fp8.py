"""Norm, rotation and cache write in e4m3, against the references.

Float32 inputs: both sides round the same numbers up to 1e-6, so a few at a border between two
e4m3 numbers may be neighbours there; all others are equal.
"""

import pytest
import torch
from flashdreams_kernels import reference, rope_qknorm
from torch import Tensor

from tests.kernels.test_rope_qknorm import EPS, inputs

FP8 = torch.float8_e4m3fn
NEIGHBOUR = 2**-3
"""Relative distance of two e4m3 numbers that are next to each other, at most."""


def scales_for(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``[B, 3, N]``: other powers of two for every batch entry, role and head."""
    size = (shape[0], 3, shape[2])
    exponents = torch.arange(size[0] * size[1] * size[2], device=device).reshape(size) % 7 - 6
    return torch.exp2(exponents.float())


def same_numbers(actual: Tensor, expected: Tensor) -> bool:
    a, b = actual.float(), expected.float()
    near = (a - b).abs() <= NEIGHBOUR * b.abs() + 2**-9
    return bool(near.all()) and (a == b).float().mean().item() > 0.99


@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 32), (1, 1, 1, 16), (2, 5, 3, 24), (1, 2, 5, 64)], ids=str
)
def test_quantized_norm_and_rotation_equal_the_reference(shape, device: torch.device) -> None:
    tensors = inputs(shape, torch.float32, device)
    q, k, *norm = tensors.values()
    v, scales = q.flip(0) + 1, scales_for(shape, device)
    found = rope_qknorm.qk_norm_rope_quantize(q, k, v, *norm, EPS, scales)
    wanted = reference.qk_norm_rope_quantize(q, k, v, *norm, EPS, scales)
    for result, expected in zip(found, wanted, strict=True):
        assert result.dtype == FP8 and result.is_contiguous()
        assert same_numbers(result, expected)
    assert torch.equal(found[2].float(), wanted[2].float())  # values are not computed, only cut
    swapped = reference.qk_norm_rope_quantize(q, k, v, *norm, EPS, scales.flip(1))
    assert not same_numbers(found[0], swapped[0])


def test_rounding_is_to_nearest_even_and_saturates(device: torch.device) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    extremes = torch.tensor([449.0, 480.0, 1e9, 3e38, -464.0, -1e30, 0.0, 2.0**-11])
    values = torch.cat([numbers, middles, extremes])
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).to(device)
    v = values.view(1, -1, 2, 32)
    q = torch.ones_like(v)
    ones, table = torch.ones(64, device=device), torch.ones(v.shape[1], 16, 2, device=device)
    for scale in (1.0, 2.0**-20, 2.0**20):
        scales = torch.full((1, 3, 2), scale, device=device)
        scaled = (v * scale).clamp(-3e38, 3e38)
        _, _, found = rope_qknorm.qk_norm_rope_quantize(
            q, q, scaled, ones, ones, table, EPS, scales
        )
        expected = (scaled / scale).clamp(-448, 448).to(FP8)
        assert torch.equal(found.float(), expected.float())
    truncated = (v.view(torch.int32) & -0x100000).view(torch.float32)  # negative control
    assert not torch.equal(truncated.clamp(-448, 448), expected.float())


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 4, 3, 32), (1, 4, 1, 24)], ids=str)
def test_fused_write_of_fp8_fills_the_slots_of_a_wrapped_ring_and_nothing_else(
    shape, index_type: torch.dtype, device: torch.device
) -> None:
    batch, _, heads, head_dim = shape
    tensors = inputs(shape, torch.float32, device)
    q, k, *norm = tensors.values()
    v, scales = q.flip(1), scales_for(shape, device)
    slots = torch.tensor([5, 0, -1, 2], dtype=index_type, device=device)
    poison = torch.full((2, batch, 6, heads, head_dim), torch.nan, device=device).to(FP8)
    k_cache, v_cache = poison.clone().unbind(0)
    expected = poison.clone().unbind(0)
    found = rope_qknorm.qk_norm_rope_write_fp8(q, k, v, *norm, EPS, k_cache, v_cache, slots, scales)
    wanted = reference.qk_norm_rope_write_fp8(q, k, v, *norm, EPS, *expected, slots.long(), scales)
    assert same_numbers(found, wanted)
    written, others = [5, 0, 2], [1, 3, 4]
    for cache, stored in ((k_cache, expected[0]), (v_cache, expected[1])):
        assert same_numbers(cache.float()[:, written], stored.float()[:, written])
        assert cache.float()[:, others].isnan().all()
    assert not same_numbers(k_cache.float()[:, [0, 5, 2]], expected[0].float()[:, written])


def test_bfloat16_is_rounded_before_it_is_quantized(device: torch.device) -> None:
    shape = (1, 3, 2, 32)
    q, k, *norm = inputs(shape, torch.bfloat16, device).values()
    scales = scales_for(shape, device)
    found = rope_qknorm.qk_norm_rope_quantize(q, k, k, *norm, EPS, scales)
    wanted = reference.qk_norm_rope_quantize(q, k, k, *norm, EPS, scales)
    for result, expected in zip(found, wanted, strict=True):
        difference = (result.float() - expected.float()).abs()
        assert (difference <= NEIGHBOUR * expected.float().abs() + 2**-9).all()
    assert torch.equal(found[2].float(), wanted[2].float())


def test_quantized_kernels_keep_their_schema(device: torch.device) -> None:
    q, k, *norm = inputs((1, 2, 1, 16), torch.float32, device).values()
    scales, slots = torch.ones(1, 3, 1, device=device), torch.tensor([3, 1], device=device)
    caches = torch.zeros(2, 1, 4, 1, 16, device=device).to(FP8)
    ops, checks = torch.ops.flashdreams, ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.qk_norm_rope_quantize, (q, k, k, *norm, EPS, scales), test_utils=checks
    )
    arguments = (q, k, k, *norm, EPS, caches[0], caches[1], slots, scales)
    torch.library.opcheck(ops.qk_norm_rope_write_fp8, arguments, test_utils=("test_faketensor",))


def test_quantized_kernels_name_what_does_not_fit(device: torch.device) -> None:
    q, k, *norm = inputs((1, 4, 2, 16), torch.float32, device).values()
    with pytest.raises(ValueError, match=r"scales must be \[1, 3, 2\], got \[1, 2, 2\]"):
        scales = torch.ones(1, 2, 2, device=device)
        rope_qknorm.qk_norm_rope_quantize(q, k, k, *norm, EPS, scales)
    slots, scales = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(1, 3, 2)
    with pytest.raises(TypeError, match=r"k_cache is torch\.float32; allowed here: torch\.float8"):
        rope_qknorm.qk_norm_rope_write_fp8(q, k, k, *norm, EPS, q, q, slots, scales.to(device))
