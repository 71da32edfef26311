"""Triton programs of chunk attention over a past in eight bits, widened tile by tile."""

import triton
import triton.language as tl

from flashdreams_kernels.programs.attention import (
    add_values,
    attend_tile,
    count_visible,
    load_keys,
    load_queries,
    score,
    weigh,
    write_attention,
)


@triton.jit
def load_slots(slots, at, left, columns, num_stored, MASK_KEYS: tl.constexpr):
    """Which slots a block reads; what lies outside of the ring becomes the nearest inside."""
    if MASK_KEYS:
        found = tl.load(slots + at + columns, mask=columns < left, other=0)
    else:
        found = tl.load(slots + at + columns)
    return tl.minimum(tl.maximum(found, 0), num_stored - 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_stored", "num_heads"])
def gather_scales(
    k_exponents, v_exponents, slots, k_scales, v_scales, num_slots, num_stored, num_heads,
    exponents_stride_b, exponents_stride_s, exponents_stride_n, BLOCK: tl.constexpr,
):  # fmt: skip
    """``2 ** exponent`` of the slots in their order, ``[B * N, num_slots]`` float32.

    Grid ``(blocks of slots, B * N)``. So attention finds four bytes a key side by side, which it
    can fetch ahead; it cannot fetch single bytes ahead.
    """
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_slots
    found = load_slots(slots, 0, num_slots, columns, num_stored, True)
    base = row // num_heads * exponents_stride_b + row % num_heads * exponents_stride_n
    at = base + found * exponents_stride_s
    k_bits = tl.load(k_exponents + at, mask=mask, other=0).to(tl.int32) + 127 << 23
    v_bits = tl.load(v_exponents + at, mask=mask, other=0).to(tl.int32) + 127 << 23
    out = row * num_slots + columns
    tl.store(k_scales + out, k_bits.to(tl.float32, bitcast=True), mask=mask)
    tl.store(v_scales + out, v_bits.to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def widen_e4m3(bits):
    """Float32 of eight-bit floats by their bits, for GPUs that cannot convert them.

    Sign, exponent and mantissa move to their places in float32, whose exponents count from 120
    lower; subnormal numbers follow. All ones is not a number.
    """
    moved = (bits.to(tl.int32) << 20) & -0x78000001
    wide = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)


@triton.jit
def load_past(
    values, slots, stride_s, left, columns, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_KEYS: tl.constexpr,
    FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What some slots hold, ``[BLOCK_S, BLOCK_D]``, widened in registers and not scaled yet."""
    tile = load_keys(
        values + slots[:, None] * stride_s + dims[None, :],
        left, columns, dims, HEAD_DIM, BLOCK_D, MASK_KEYS,
    )  # fmt: skip
    if FORM == "fp8":
        tile = tile.to(tl.float8e4nv, bitcast=True)
    elif FORM == "fp8 by bits":
        tile = widen_e4m3(tile)
    return tile.to(DTYPE)


@triton.jit
def attend_past_block(
    q, past_k, past_v, k_scales, v_scales, slots, at, left,
    acc, row_max, row_sum, scale_log2, stride_s, num_stored, columns, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One block of past keys; their scales act on the scores, those of the values on the weights.

    Both are powers of two, so it does not matter where they act. Only float16 has too few
    exponents for scaled weights: there the values are scaled.
    """
    found = load_slots(slots, at, left, columns, num_stored, MASK_KEYS)
    mask = columns < left
    wide: tl.constexpr = tl.float32 if UPCAST else DTYPE
    if MASK_KEYS:
        k_scale = tl.load(k_scales + at + columns, mask=mask, other=0.0)
        v_scale = tl.load(v_scales + at + columns, mask=mask, other=0.0)
    else:
        k_scale = tl.load(k_scales + at + columns)
        v_scale = tl.load(v_scales + at + columns)
    k = load_past(
        past_k, found, stride_s, left, columns, dims, HEAD_DIM, BLOCK_D, MASK_KEYS, FORM, wide
    )
    v = load_past(
        past_v, found, stride_s, left, columns, dims, HEAD_DIM, BLOCK_D, MASK_KEYS, FORM, wide
    )
    scores = score(q, k, mask, False, UPCAST, PRECISION) * (k_scale * scale_log2)[None, :]
    if MASK_KEYS:
        scores = tl.where(mask[None, :], scores, float("-inf"))
    weights, decay, row_max, row_sum = weigh(scores, 1.0, row_max, row_sum)
    if tl.float16 == DTYPE:
        v = v.to(tl.float32) * v_scale[:, None]
        v = tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(DTYPE)
    else:
        weights = weights * v_scale[None, :]
    acc = add_values(acc, decay, weights, v, UPCAST, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attend_past(
    q, past_k, past_v, k_scales, v_scales, slots, keys, first, last,
    acc, row_max, row_sum, scale_log2, stride_s, num_stored, columns, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The past blocks from ``first`` to ``last``; only the last one of all may need a mask."""
    whole = keys // BLOCK_S
    for block in tl.range(first, tl.minimum(last, whole), num_stages=STAGES):
        acc, row_max, row_sum = attend_past_block(
            q, past_k, past_v, k_scales, v_scales, slots, block * BLOCK_S, BLOCK_S,
            acc, row_max, row_sum, scale_log2, stride_s, num_stored, columns, dims,
            HEAD_DIM, BLOCK_D, False, UPCAST, PRECISION, FORM, DTYPE,
        )  # fmt: skip
    if (whole * BLOCK_S < keys) & (whole >= first) & (whole < last):
        at = whole * BLOCK_S
        acc, row_max, row_sum = attend_past_block(
            q, past_k, past_v, k_scales, v_scales, slots, at, keys - at,
            acc, row_max, row_sum, scale_log2, stride_s, num_stored, columns, dims,
            HEAD_DIM, BLOCK_D, True, UPCAST, PRECISION, FORM, DTYPE,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def attend_own(
    q, k, v, keys, first, last, acc, row_max, row_sum, scale_log2,
    k_stride_s, v_stride_s, columns, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chunk's own blocks from ``first`` to ``last``."""
    k_tile = columns[:, None] * k_stride_s + dims[None, :]
    v_tile = columns[:, None] * v_stride_s + dims[None, :]
    for block in range(first, last):
        at = block * BLOCK_S
        left = keys - at
        acc, row_max, row_sum = attend_tile(
            q,
            load_keys(k + at * k_stride_s + k_tile, left, columns, dims, HEAD_DIM, BLOCK_D, True),
            load_keys(v + at * v_stride_s + v_tile, left, columns, dims, HEAD_DIM, BLOCK_D, True),
            acc, row_max, row_sum, scale_log2, columns < left, True, UPCAST, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_queries", "num_own", "num_slots", "num_stored", "num_heads"])
def attend(
    q, k, v, past_k, past_v, k_scales, v_scales, slots, out, lse, visible,
    num_queries, num_own, num_slots, num_stored, num_heads, scale_log2,
    q_stride_b, q_stride_l, q_stride_n,
    k_stride_b, k_stride_s, k_stride_n,
    v_stride_b, v_stride_s, v_stride_n,
    past_stride_b, past_stride_s, past_stride_n,
    out_stride_s, out_stride_b, out_stride_l, out_stride_n,
    lse_stride_s, lse_stride_b, lse_stride_l, lse_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, WRITE_LSE: tl.constexpr, LSE_UNIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr, PAST_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one share of the keys: the past first, then the chunk's own.

    Grid ``(tiles of queries, splits, B * N)``. Blocks of both kinds are counted through and dealt
    out to the shares.
    """
    pair = tl.program_id(2).to(tl.int64)
    batch = pair // num_heads
    head = pair % num_heads
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)

    keys = count_visible(visible, num_slots, HAS_VISIBLE)
    past_blocks = tl.cdiv(keys, BLOCK_S)
    blocks = past_blocks + tl.cdiv(num_own, BLOCK_S)
    share = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, blocks)

    mask = (rows[:, None] < num_queries) & (dims[None, :] < HEAD_DIM)
    q += batch * q_stride_b + head * q_stride_n
    q_tile = load_queries(q + rows[:, None] * q_stride_l + dims[None, :], mask, UPCAST)
    past_offset = batch * past_stride_b + head * past_stride_n
    scale_offset = pair * num_slots

    acc = tl.zeros([BLOCK_L, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_L], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_L], dtype=tl.float32)
    acc, row_max, row_sum = attend_past(
        q_tile, past_k + past_offset, past_v + past_offset,
        k_scales + scale_offset, v_scales + scale_offset, slots, keys, first, last,
        acc, row_max, row_sum, scale_log2, past_stride_s, num_stored, columns, dims,
        HEAD_DIM, BLOCK_D, BLOCK_S, UPCAST, PRECISION, FORM, q.dtype.element_ty, PAST_STAGES,
    )  # fmt: skip
    k += batch * k_stride_b + head * k_stride_n
    v += batch * v_stride_b + head * v_stride_n
    acc, row_max, row_sum = attend_own(
        q_tile, k, v, num_own, tl.maximum(first - past_blocks, 0), last - past_blocks,
        acc, row_max, row_sum, scale_log2, k_stride_s, v_stride_s, columns, dims,
        HEAD_DIM, BLOCK_D, BLOCK_S, UPCAST, PRECISION,
    )  # fmt: skip

    out += tl.program_id(1) * out_stride_s + batch * out_stride_b + head * out_stride_n
    lse += tl.program_id(1) * lse_stride_s + batch * lse_stride_b + head * lse_stride_n
    write_attention(
        acc, row_max, row_sum, out + rows[:, None] * out_stride_l + dims[None, :], mask,
        lse + rows * lse_stride_l, rows < num_queries, WRITE_LSE, LSE_UNIT,
    )  # fmt: skip
