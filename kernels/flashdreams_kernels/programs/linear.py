"""Triton programs of the batch-invariant linear layer.

Each row of the result is computed by the same sequence of operations, independent of its position
and of the number of rows: fixed tiles, a fixed order over K, no split of K.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; ``GROUP`` rows of tiles share weights in L2."""
    first = tile // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def multiply_add(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b^T`` in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def add_bias(acc, bias, columns, num_columns, HAS_BIAS: tl.constexpr):
    """Add the bias in float32, before the result is rounded."""
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[
            None, :
        ]
    return acc


@triton.jit
def store_tile(acc, out, rows, columns, num_rows, num_columns):
    """Write a tile of the result, ``[num_rows, num_columns]`` contiguous."""
    pointers = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_descriptors(
    x, weight, out, bias, num_rows, num_columns, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, PERSISTENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles of ``x weight^T + bias`` through tensor descriptors.

    Grid ``(programs,)``: each program computes every ``programs``-th tile. With ``PERSISTENT`` the
    loads of its next tile overlap the end of the previous one, and the result is written as a
    block; otherwise it is written through pointers, which takes no additional shared memory.
    """
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    first = tl.program_id(0)
    for tile in tl.range(first, tiles_m * tiles_n, tl.num_programs(0), flatten=PERSISTENT):
        m, n = place_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            a = x.load([m * BLOCK_M, k])
            b = weight.load([n * BLOCK_N, k])
            acc = multiply_add(a, b, acc, UPCAST, "tf32")
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_bias(acc, bias, columns, num_columns, HAS_BIAS)
        if PERSISTENT:
            out.store([m * BLOCK_M, n * BLOCK_N], acc.to(out.dtype))
        else:
            rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
            store_tile(acc, out, rows, columns, num_rows, num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def linear_pointers(
    x, weight, out, bias, num_rows, num_columns, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``x weight^T + bias`` through pointers; grid ``(tiles,)``.

    Rows and columns beyond the end repeat the last one and are not written, so that loads need a
    mask only along K, and with ``WHOLE_K`` none.
    """
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    m, n = place_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tiles_n, GROUP)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None]
    b_rows = tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None]
    a_pointers = x + a_rows * width + ks[None, :]
    b_pointers = weight + b_rows * width + ks[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        if WHOLE_K:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            mask = ks[None, :] < width - k
            a = tl.load(a_pointers, mask=mask, other=0.0)
            b = tl.load(b_pointers, mask=mask, other=0.0)
        acc = multiply_add(a, b, acc, UPCAST, PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K
    acc = add_bias(acc, bias, columns, num_columns, HAS_BIAS)
    store_tile(acc, out, rows, columns, num_rows, num_columns)
