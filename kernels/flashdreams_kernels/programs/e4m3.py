"""Triton programs of quantization to e4m3: single values, rows with a scale, GELU."""

import triton
import triton.language as tl


@triton.jit
def to_e4m3(scaled, INTERPRETED: tl.constexpr):
    """Convert to e4m3, to nearest, ties to even; saturates, and NaN stays NaN."""
    scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:  # the interpreter's conversion truncates, a GPU rounds
        bits = scaled.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        subnormal = (scaled + 24576.0) - 24576.0  # the unit in the last place is 2 ** -9
        scaled = tl.where(tl.abs(scaled) < 0.015625, subnormal, bits.to(tl.float32, bitcast=True))
    return scaled.to(tl.float8e4nv)


@triton.jit
def store_row(values, out, out_scale, columns, mask, INTERPRETED: tl.constexpr):
    """Write a row in e4m3 and the smallest power of two that brings its largest value to 448.

    ``values`` are float32 and zero outside of ``mask``. The scale is computed from the bits, so
    that it is exact: 0x1FFFFF carries a mantissa above 1.75 into the exponent; 448 is 1.75 * 2**8.
    """
    largest = tl.maximum(tl.max(tl.abs(values), 0), 7.888609052210118e-31)  # 2 ** -100
    bits = ((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - 0x4000000
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    tl.store(out_scale, bits.to(tl.float32, bitcast=True))
    tl.store(out + columns, to_e4m3(values * inverse, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gelu_quantize(
    x, out, out_scale, num_tokens, x_stride_b, x_stride_l,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One token: the tanh form of GELU, in e4m3 with a scale; grid ``(B * L,)``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x += row // num_tokens * x_stride_b + row % num_tokens * x_stride_l
    values = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)); the factor is 2 * sqrt(2 / pi)
    twice = 1.5957691216057308 * (values + 0.044715 * values * values * values)
    values = values / (1.0 + tl.exp(-twice))
    store_row(values, out + row * WIDTH, out_scale + row, columns, mask, INTERPRETED)
