"""Triton programs of chunk attention: the tile loop, and the merge of split keys."""

import triton
import triton.language as tl


@triton.jit
def count_visible(visible, num_keys, HAS_VISIBLE: tl.constexpr):
    """Number of leading keys to attend to; ``visible`` is on the device."""
    keys = num_keys
    if HAS_VISIBLE:
        keys = tl.minimum(tl.maximum(tl.load(visible).to(tl.int32), 0), num_keys)
    return keys


@triton.jit
def load_queries(pointers, mask, UPCAST: tl.constexpr):
    """A tile of queries, ``[BLOCK_L, BLOCK_D]``; zeros where the mask is false."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_keys(
    pointers, keys_left, columns, dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values, ``[BLOCK_S, BLOCK_D]``, with only the necessary masks."""
    if MASK_KEYS:
        mask = (columns[:, None] < keys_left) & (dims[None, :] < HEAD_DIM)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def load_whole(blocks, pointers, place, columns, dims, SIZES: tl.constexpr):
    """A fully visible tile of keys or values, through a descriptor or through pointers.

    ``place`` is the batch entry, the first key and the head; ``SIZES`` are ``HEAD_DIM``,
    ``BLOCK_D``, ``BLOCK_S`` and ``IN_BLOCKS``.
    """
    if SIZES[3]:
        at = [place[0].to(tl.int32), place[1], place[2].to(tl.int32) * SIZES[0]]
        tile = tl.reshape(blocks.load(at), [SIZES[2], SIZES[1]])
    else:
        tile = load_keys(pointers, 0, columns, dims, SIZES[0], SIZES[1], False)
    return tile


@triton.jit
def score(
    q, k, kept, MASK_KEYS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Attention scores, ``[BLOCK_L, BLOCK_S]``; with ``MASK_KEYS`` only of ``kept`` keys."""
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK_KEYS:
        scores = tl.where(kept[None, :], scores, float("-inf"))
    return scores


@triton.jit
def weigh(scores, factor, row_max, row_sum):
    """Weights of one block of keys, relative to the running maximum, and the running values.

    ``factor`` converts the scores to base 2. Returns the weights, the factor on earlier results,
    the new maximum and the new sum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def add_values(acc, decay, weights, v, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Add the weighted values of one block to the running sum."""
    acc = acc * decay[:, None]
    if UPCAST:
        acc = acc + tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def attend_tile(
    q, k, v, acc, row_max, row_sum, scale_log2, kept,
    MASK_KEYS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running maximum and sum (both base 2), weighted values."""
    scores = score(q, k, kept, MASK_KEYS, UPCAST, PRECISION)
    weights, decay, row_max, row_sum = weigh(scores, scale_log2, row_max, row_sum)
    acc = add_values(acc, decay, weights, v, UPCAST, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def write_attention(
    acc, row_max, row_sum, out_pointers, mask, lse_pointers, row_mask,
    WRITE_LSE: tl.constexpr, LSE_UNIT: tl.constexpr,
):  # fmt: skip
    """Write the weighted mean of the values and the log-sum-exp."""
    seen = row_sum > 0.0
    result = acc / tl.where(seen, row_sum, 1.0)[:, None]
    tl.store(out_pointers, result.to(out_pointers.dtype.element_ty), mask=mask)
    if WRITE_LSE:
        total = row_max + tl.log2(tl.where(seen, row_sum, 1.0))
        tl.store(lse_pointers, tl.where(seen, total * LSE_UNIT, float("-inf")), mask=row_mask)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def attend(
    q, k, v, k_blocks, v_blocks, out, lse, visible,
    num_queries, num_keys, num_heads, scale_log2,
    q_stride_b, q_stride_l, q_stride_n,
    k_stride_b, k_stride_s, k_stride_n,
    v_stride_b, v_stride_s, v_stride_n,
    out_stride_s, out_stride_b, out_stride_l, out_stride_n,
    lse_stride_s, lse_stride_b, lse_stride_l, lse_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, WRITE_LSE: tl.constexpr, LSE_UNIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one KV split.

    Grid ``(tiles of queries, splits, B * N)``. ``visible`` points to the number of visible keys;
    the split's range is computed here, so that a captured launch fits any number. With
    ``IN_BLOCKS`` whole blocks are read through descriptors of ``[B, S, N * D]``; the last block
    needs a mask for the visible keys and is read through pointers.
    """
    split = tl.program_id(1)
    batch = (tl.program_id(2) // num_heads).to(tl.int64)
    head = (tl.program_id(2) % num_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)

    keys = count_visible(visible, num_keys, HAS_VISIBLE)
    blocks = tl.cdiv(tl.cdiv(keys, BLOCK_S), tl.num_programs(1))
    first = tl.minimum(split * blocks * BLOCK_S, keys)
    last = tl.minimum(first + blocks * BLOCK_S, keys)
    whole = first + (last - first) // BLOCK_S * BLOCK_S

    mask = (rows[:, None] < num_queries) & (dims[None, :] < HEAD_DIM)
    q += batch * q_stride_b + head * q_stride_n
    q_tile = load_queries(q + rows[:, None] * q_stride_l + dims[None, :], mask, UPCAST)
    k += batch * k_stride_b + head * k_stride_n
    v += batch * v_stride_b + head * v_stride_n
    k_tile = columns[:, None] * k_stride_s + dims[None, :]
    v_tile = columns[:, None] * v_stride_s + dims[None, :]

    acc = tl.zeros([BLOCK_L, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_L], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_L], dtype=tl.float32)
    for start in range(first, whole, BLOCK_S):
        sizes: tl.constexpr = (HEAD_DIM, BLOCK_D, BLOCK_S, IN_BLOCKS)
        place = (batch, start, head)
        acc, row_max, row_sum = attend_tile(
            q_tile,
            load_whole(k_blocks, k + start * k_stride_s + k_tile, place, columns, dims, sizes),
            load_whole(v_blocks, v + start * v_stride_s + v_tile, place, columns, dims, sizes),
            acc, row_max, row_sum, scale_log2, columns, False, UPCAST, PRECISION,
        )  # fmt: skip
    if whole < last:
        left = last - whole
        k += whole * k_stride_s
        v += whole * v_stride_s
        acc, row_max, row_sum = attend_tile(
            q_tile,
            load_keys(k + k_tile, left, columns, dims, HEAD_DIM, BLOCK_D, True),
            load_keys(v + v_tile, left, columns, dims, HEAD_DIM, BLOCK_D, True),
            acc, row_max, row_sum, scale_log2, columns < left, True, UPCAST, PRECISION,
        )  # fmt: skip

    share = split.to(tl.int64)
    out += share * out_stride_s + batch * out_stride_b + head * out_stride_n
    lse += share * lse_stride_s + batch * lse_stride_b + head * lse_stride_n
    write_attention(
        acc, row_max, row_sum, out + rows[:, None] * out_stride_l + dims[None, :], mask,
        lse + rows * lse_stride_l, rows < num_queries, WRITE_LSE, LSE_UNIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_heads", "num_splits"])
def merge_splits(
    partial, partial_lse, out, lse,
    num_rows, num_queries, num_heads, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    WRITE_LSE: tl.constexpr, LSE_UNIT: tl.constexpr,
):  # fmt: skip
    """Merge the results of all splits, weighted by their base-2 sums of exponentials.

    A row is one (batch, query, head). Grid ``(tiles of rows,)``; ``partial`` is
    ``[splits, rows, HEAD_DIM]``, ``partial_lse`` ``[splits, rows]``.
    """
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (dims[None, :] < HEAD_DIM)
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    at = rows
    for _ in range(num_splits):
        share = tl.load(partial_lse + at, mask=row_mask, other=float("-inf"))
        top = tl.maximum(top, share)
        at += num_rows
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    at = rows
    for _ in range(num_splits):
        weight = tl.exp2(tl.load(partial_lse + at, mask=row_mask, other=float("-inf")) - top)
        values = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * values
        total += weight
        at += num_rows
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    result = acc / safe[:, None]
    tl.store(
        out + rows[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=mask,
    )
    if WRITE_LSE:
        head = rows % num_heads
        query = rows // num_heads % num_queries
        batch = rows // num_heads // num_queries
        merged = (top + tl.log2(safe)) * LSE_UNIT
        tl.store(
            lse + (batch * num_heads + head) * num_queries + query,
            tl.where(seen, merged, float("-inf")),
            mask=row_mask,
        )
