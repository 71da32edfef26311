"""Triton programs of layer norm with scale and shift, and of sums with the residual."""

import triton
import triton.language as tl

from flashdreams_kernels.programs.e4m3 import store_row


@triton.jit(do_not_specialize=["num_tokens"])
def norm_modulate(
    x,
    shift,
    scale,
    out,
    out_scale,
    eps,
    num_tokens,
    x_stride_b,
    x_stride_l,
    shift_stride_b,
    shift_stride_l,
    scale_stride_b,
    scale_stride_l,
    ADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One token: ``layer_norm(x) * (ADDED + scale) + shift``; grid ``(B * L,)``.

    In e4m3 with a scale per token if ``out_scale`` is not None.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_tokens
    token = row % num_tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x += batch * x_stride_b + token * x_stride_l
    values = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(mask, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    normed = centred * tl.rsqrt(variance + eps)
    shift += batch * shift_stride_b + token * shift_stride_l
    scale += batch * scale_stride_b + token * scale_stride_l
    factor = tl.load(scale + columns, mask=mask, other=0.0).to(tl.float32) + ADDED
    offset = tl.load(shift + columns, mask=mask, other=0.0).to(tl.float32)
    result = normed * factor + offset
    out += row * WIDTH
    if out_scale is not None:
        store_row(result, out, out_scale + row, columns, mask, INTERPRETED)
    else:
        tl.store(out + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_add(
    x,
    y,
    gate,
    scale,
    shift,
    out,
    num_tokens,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride_b,
    gate_stride_l,
    scale_stride_b,
    scale_stride_l,
    shift_stride_b,
    shift_stride_l,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: ``(x + y * gate) * scale + shift``; grid ``(B * L,)``.

    Rounded where PyTorch's operations would. ``gate``, and ``scale`` with ``shift``, may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_tokens
    token = row % num_tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = out.dtype.element_ty
    x += batch * x_stride_b + token * x_stride_l
    y += batch * y_stride_b + token * y_stride_l
    residual = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(y + columns, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        gate += batch * gate_stride_b + token * gate_stride_l
        branch *= tl.load(gate + columns, mask=mask, other=0.0).to(tl.float32)
    result = residual + branch.to(dtype).to(tl.float32)
    if scale is not None:
        scale += batch * scale_stride_b + token * scale_stride_l
        shift += batch * shift_stride_b + token * shift_stride_l
        factor = tl.load(scale + columns, mask=mask, other=0.0).to(tl.float32)
        offset = tl.load(shift + columns, mask=mask, other=0.0).to(tl.float32)
        result = result.to(dtype).to(tl.float32) * factor + offset
    tl.store(out + row * WIDTH + columns, result.to(dtype), mask=mask)
