"""Triton programs over activations with channels innermost in memory.

A program holds ROWS pixels of all channels. Pixel offsets are 64-bit, because a chunk of frames
can have more than 2^31 values.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "rows_per_clip"])
def norm_silu(
    x,
    gain,
    bias,
    out,
    scale,
    least,
    rows,
    rows_per_clip,
    out_stride_b,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``silu((x + bias) / |x + bias| * gain * scale)`` per pixel; grid ``(ceil(rows / ROWS),)``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    values = values.to(tl.float32)
    if bias is not None:
        added = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        values += added[None, :]
    norm = tl.sqrt(tl.sum(values * values, 1))
    norm = tl.where(norm < least, least, norm)  # NaN stays NaN
    factor = tl.load(gain + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) * scale
    normed = (values / norm[:, None]) * factor[None, :]
    result = normed / (1.0 + tl.exp(-normed))
    place = (row // rows_per_clip) * out_stride_b + (row % rows_per_clip) * WIDTH
    tl.store(out + place[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add(
    x,
    bias,
    residual,
    rows,
    RELU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``x + bias + residual`` in place, then optionally ReLU; grid ``(ceil(rows / ROWS),)``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    place = row[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        values += added[None, :]
    if residual is not None:
        values += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        values = tl.where(values < 0.0, 0.0, values)
    tl.store(x + place, values.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "pixels", "frames"])
def sum_halves(
    y,
    last,
    bias,
    out,
    rows,
    pixels,
    frames,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ReLU of the sum of a frame's first half, the previous frame's second half, and the bias.

    Rows are ordered by clip, frame and pixel; grid ``(ceil(rows / ROWS),)``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    own = tl.load(y + row[:, None] * (2 * WIDTH) + columns[None, :], mask=mask, other=0.0)
    frame = (row // pixels) % frames
    is_first = frame == 0
    before = (row - pixels)[:, None] * (2 * WIDTH) + WIDTH + columns[None, :]
    carried = ((row // pixels) // frames * pixels + row % pixels)[:, None] * WIDTH
    late = tl.load(y + before, mask=mask & (is_first == 0)[:, None], other=0.0).to(tl.float32)
    first = tl.load(last + carried + columns[None, :], mask=mask & is_first[:, None], other=0.0)
    added = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    values = own.to(tl.float32) + late + first.to(tl.float32) + added[None, :]
    values = tl.where(values < 0.0, 0.0, values)
    place = out + row[:, None] * WIDTH + columns[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "width", "growth"])
def spread_phases(
    y,
    bias,
    out,
    rows,
    height,
    width,
    growth,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write phases on a grid of ``height + 1`` x ``width + 1`` to frames of twice the size.

    Rows are pixels of the result, ``[N, growth, 2 height, 2 width]``, with ``PAIRS``
    ``[N / 2, 2 height, 2 width, 2]``; grid ``(ceil(rows / ROWS),)``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    pixel = row // 2 if PAIRS else row
    column = pixel % (2 * width)
    line = pixel // (2 * width) % (2 * height)
    frame = pixel // (4 * height * width)
    if PAIRS:
        frame = 2 * frame + row % 2
    down, right = line % 2, column % 2
    cell = frame // growth * (height + 1) + line // 2 + down
    cell = cell * (width + 1) + column // 2 + right
    phase = (frame % growth * 2 + down) * 2 + right
    source = (cell * (4 * growth) + phase) * WIDTH
    values = tl.load(y + source[:, None] + columns[None, :], mask=mask, other=0.0)
    if bias is not None:
        added = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        values = values.to(tl.float32) + added[None, :]
    place = out + row[:, None] * WIDTH + columns[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=mask)
