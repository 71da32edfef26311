"""Triton program of QK norm, rotation and cache write."""

import triton
import triton.language as tl

from flashdreams_kernels.programs.e4m3 import to_e4m3


@triton.jit
def load_heads(x, stride_n, heads, dims, mask):
    """All heads of one token, ``[BLOCK_N, BLOCK_D]``."""
    return tl.load(x + heads[:, None] * stride_n + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_heads(values, x, stride_n, heads, dims, mask):
    """Write all heads of one token."""
    tl.store(x + heads[:, None] * stride_n + dims[None, :], values, mask=mask)


@triton.jit
def normalise(values, eps, width):
    """RMS norm over all heads of one token, in float32."""
    values = values.to(tl.float32)
    mean = tl.sum(tl.sum(values * values, 1), 0) / width
    return values * tl.rsqrt(mean + eps)


@triton.jit
def rotate(values, turn, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate adjacent channel pairs by the cosines and sines of ``turn``, ``[BLOCK_D]``."""
    even, odd = tl.split(tl.reshape(values, [BLOCK_N, BLOCK_D // 2, 2]))
    cos, sin = tl.split(tl.reshape(turn, [BLOCK_D // 2, 2]))
    cos = cos[None, :]
    sin = sin[None, :]
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, [BLOCK_N, BLOCK_D])


@triton.jit
def normalise_and_rotate(
    x, stride_n, weight, table, heads, dims, mask, eps, width,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries or keys of one token, rounded where the modules round, to the dtype of ``x``."""
    dtype = x.dtype.element_ty
    normed = normalise(load_heads(x, stride_n, heads, dims, mask), eps, width).to(dtype)
    gain = load_heads(weight, HEAD_DIM, heads, dims, mask)
    scaled = (normed.to(tl.float32) * gain.to(tl.float32)).to(dtype)
    turn = tl.load(table + dims, mask=dims < HEAD_DIM, other=0.0)
    return rotate(scaled.to(tl.float32), turn, BLOCK_N, BLOCK_D).to(dtype)


@triton.jit
def quantize(values, scales, heads, num_heads, INTERPRETED: tl.constexpr):
    """``values / scale`` in e4m3, to nearest, ties to even; each head's scale is a power of two."""
    exponents = tl.load(scales + heads, mask=heads < num_heads, other=1.0).to(
        tl.int32, bitcast=True
    )
    inverse = (0x7F000000 - exponents).to(tl.float32, bitcast=True)
    return to_e4m3(values.to(tl.float32) * inverse[:, None], INTERPRETED)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_slots"])
def norm_rope(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, table, slots, scales, eps,
    num_tokens, num_heads, num_slots, table_stride_l, scales_stride_b, scales_stride_r,
    q_stride_b, q_stride_l, q_stride_n,
    k_stride_b, k_stride_l, k_stride_n,
    v_stride_b, v_stride_l, v_stride_n,
    q_out_stride_b, q_out_stride_l, q_out_stride_n,
    k_out_stride_b, k_out_stride_l, k_out_stride_n,
    v_out_stride_b, v_out_stride_l, v_out_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WRITE_CACHE: tl.constexpr, QUANTIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One token of q (role 0), of k (role 1) or of v (role 2).

    Grid ``(B * L, roles)``; v has a role with ``WRITE_CACHE`` or ``QUANTIZE``. With ``WRITE_CACHE``
    k and v are written to ``slots[token]`` of a cache; a slot outside the cache is skipped. With
    ``QUANTIZE`` all three are quantized to e4m3 with ``scales``, ``[B, 3, N]``.
    """
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    role = tl.program_id(1)
    heads = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads[:, None] < num_heads) & (dims[None, :] < HEAD_DIM)
    width = num_heads * HEAD_DIM
    table += token * table_stride_l
    if QUANTIZE:
        scales += batch * scales_stride_b + role * scales_stride_r
    if role == 0:
        q += batch * q_stride_b + token * q_stride_l
        result = normalise_and_rotate(
            q, q_stride_n, q_weight, table, heads, dims, mask, eps, width,
            HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if QUANTIZE:
            result = quantize(result, scales, heads, num_heads, INTERPRETED)
        q_out += batch * q_out_stride_b + token * q_out_stride_l
        store_heads(result, q_out, q_out_stride_n, heads, dims, mask)
    else:
        slot = token
        if WRITE_CACHE:
            slot = tl.load(slots + token).to(tl.int64)
            mask = mask & (slot >= 0) & (slot < num_slots)
        if role == 1:
            k += batch * k_stride_b + token * k_stride_l
            result = normalise_and_rotate(
                k, k_stride_n, k_weight, table, heads, dims, mask, eps, width,
                HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if QUANTIZE:
                result = quantize(result, scales, heads, num_heads, INTERPRETED)
            k_out += batch * k_out_stride_b + slot * k_out_stride_l
            store_heads(result, k_out, k_out_stride_n, heads, dims, mask)
        elif WRITE_CACHE or QUANTIZE:
            v += batch * v_stride_b + token * v_stride_l
            values = load_heads(v, v_stride_n, heads, dims, mask)
            if QUANTIZE:
                values = quantize(values, scales, heads, num_heads, INTERPRETED)
            v_out += batch * v_out_stride_b + slot * v_out_stride_l
            store_heads(values, v_out, v_out_stride_n, heads, dims, mask)
