"""Norm, sums and upsampling between convolutions, with channels innermost in memory.

Shape letters: B clips, F frames, N frames of all clips, R pixels, C channels, H W rows and columns.
All tensors are bf16, fp16 or fp32 of one dtype and device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    FLOAT_TYPES,
    Launch,
    ceil_div,
    next_power_of_2,
)

MAX_WIDTH = 8192
"""Maximum number of channels; one program holds them in registers."""
ELEMENTS = 2048
"""Values per program, unless the number of channels requires more."""


def norm_silu(
    x: Tensor, gain: Tensor, scale: float, least: float, out: Tensor, bias: Tensor | None = None
) -> None:
    """RMS norm over channels and SiLU in one pass, in float32, rounded once.

    ``silu(y / |y| * gain * scale)`` with ``y = x + bias``.

    Args:
        x: ``[B, R, C]``, contiguous.
        gain: C values.
        scale: factor on the gain: the square root of C.
        least: lower bound of the divisor ``|y|``.
        out: ``[B, R, C]``, each clip contiguous, any stride over clips; must not overlap ``x``.
        bias: C values; None adds nothing.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    _, pixels, width = _shape("x", x, 3)
    _check("out", out, x.shape, x, dense=False)
    if pixels > 1 and out.stride(1) != width:
        raise ValueError(f"Pixels of out are {out.stride(1)} values apart; they must be {width}.")
    _check_vectors(x, width, gain=gain, bias=bias)
    if x.numel():
        plan_norm_silu(x, gain, scale, least, out, bias).run()


def add_(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """``x + bias + residual`` in place in one pass, rounded once; optionally with ReLU.

    Args:
        x: ``[R, C]``, contiguous.
        bias: C values.
        residual: like ``x``.
        relu: whether to apply ReLU to the sum.

    Returns:
        ``x``.

    Raises:
        ValueError, TypeError, ImportError: as for ``norm_silu``.
    """
    _, width = _shape("x", x, 2)
    if residual is not None:
        _check("residual", residual, x.shape, x)
    _check_vectors(x, width, bias=bias)
    if x.numel():
        plan_add(x, bias, residual, relu).run()
    return x


def sum_halves(y: Tensor, last: Tensor, bias: Tensor, out: Tensor) -> None:
    """``relu(y[t, :C] + y[t - 1, C:] + bias)``: a convolution over a frame and the one before it.

    Args:
        y: ``[B, F, R, 2 C]``, contiguous: products of each frame with both halves of the weight.
        last: ``[B, R, C]``, contiguous: the second half of the frame before the first one.
        bias: C values.
        out: ``[B, F, R, C]``, contiguous.

    Raises:
        ValueError, TypeError, ImportError: as for ``norm_silu``.
    """
    batch, frames, pixels, both = _shape("y", y, 4)
    _check("last", last, (batch, pixels, both // 2), y)
    _check("out", out, (batch, frames, pixels, both // 2), y)
    _check_vectors(y, both // 2, bias=bias)
    if y.numel():
        plan_sum_halves(y, last, bias, out).run()


def spread_phases(
    y: Tensor, out: Tensor, bias: Tensor | None = None, *, pairs: bool = False
) -> None:
    """Place the four phases of an upsampling convolution, and add its bias.

    Args:
        y: ``[N, H + 1, W + 1, G, 2, 2, C]``, contiguous. Phase (a, b) of the pixel (2 i + a,
            2 j + b) is at (i + a, j + b).
        out: ``[N, G, 2 H, 2 W, C]``, contiguous; with ``pairs`` ``[N / 2, 2 H, 2 W, 2, C]``.
        bias: C values; None adds nothing.
        pairs: interleave two frames pixel by pixel. N is even, G is 1.

    Raises:
        ValueError, TypeError, ImportError: as for ``norm_silu``.
    """
    count, rows, columns, growth, _, _, width = _shape("y", y, 7)
    if pairs and (count % 2 or growth != 1):
        raise ValueError(f"{count} frames that become {growth} each are not pairs.")
    large = 2 * rows - 2, 2 * columns - 2
    shape = (count // 2, *large, 2, width) if pairs else (count, growth, *large, width)
    _check("y", y, (count, rows, columns, growth, 2, 2, width), y)
    _check("out", out, shape, y)
    _check_vectors(y, width, bias=bias)
    if out.numel():
        plan_spread_phases(y, out, bias, pairs).run()


def _shape(name: str, x: Tensor, ndim: int) -> Sequence[int]:
    """Sizes of the first argument, checked to have few enough channels for one program."""
    if x.dtype not in FLOAT_TYPES:
        allowed = ", ".join(map(str, FLOAT_TYPES))
        raise TypeError(f"{name} is {x.dtype}; allowed here: {allowed}.")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dims, got {list(x.shape)}.")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"{x.shape[-1]} channels are more than {MAX_WIDTH}, the maximum.")
    _check(name, x, x.shape, x)
    return x.shape


def _check(name: str, x: Tensor, shape: Sequence[int], like: Tensor, dense: bool = True) -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype}, the others are {like.dtype}.")
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}.")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the others are on {like.device}.")
    if not (x if dense or not x.numel() else x[0]).is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {list(x.stride())}.")


def _check_vectors(like: Tensor, width: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None:
            _check(name, vector, (width,), like)


def _sizes(width: int, rows: int) -> tuple[tuple[int], dict[str, int], int]:
    """Grid, compile-time sizes and number of warps of a program over ``rows`` pixels."""
    block = next_power_of_2(width)
    count = max(1, ELEMENTS // block)
    warps = 4 if block <= ELEMENTS else 8
    return (ceil_div(rows, count),), {"WIDTH": width, "BLOCK": block, "ROWS": count}, warps


def _plan(program: str, x: Tensor, width: int, rows: int, arguments: dict[str, Any]) -> Launch:
    grid, constants, warps = _sizes(width, rows)
    switches = {name: value for name, value in arguments.items() if name.isupper()}
    arguments = {name: value for name, value in arguments.items() if name not in switches}
    return Launch(
        "channels",
        program,
        grid,
        {**arguments, "rows": rows},
        {**switches, **constants},
        num_warps=warps,
        device=x.device,
    )


def plan_norm_silu(
    x: Tensor, gain: Tensor, scale: float, least: float, out: Tensor, bias: Tensor | None
) -> Launch:
    """The launch of :func:`norm_silu`; arguments checked."""
    batch, pixels, width = x.shape
    arguments = {"x": x, "gain": gain, "bias": bias, "out": out, "scale": scale, "least": least}
    distance = out.stride(0) if batch > 1 else 0
    arguments |= {"rows_per_clip": pixels, "out_stride_b": distance}
    return _plan("norm_silu", x, width, batch * pixels, arguments)


def plan_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Launch:
    """The launch of :func:`add_`; arguments checked."""
    arguments = {"x": x, "bias": bias, "residual": residual, "RELU": relu}
    return _plan("add", x, x.shape[1], x.shape[0], arguments)


def plan_sum_halves(y: Tensor, last: Tensor, bias: Tensor, out: Tensor) -> Launch:
    """The launch of :func:`sum_halves`; arguments checked."""
    batch, frames, pixels, width = out.shape
    arguments: dict[str, Any] = {"y": y, "last": last, "bias": bias, "out": out}
    arguments |= {"pixels": pixels, "frames": frames}
    return _plan("sum_halves", y, width, batch * frames * pixels, arguments)


def plan_spread_phases(y: Tensor, out: Tensor, bias: Tensor | None, pairs: bool) -> Launch:
    """The launch of :func:`spread_phases`; arguments checked."""
    _, rows, columns, growth, _, _, width = y.shape
    arguments = {"y": y, "bias": bias, "out": out, "growth": growth}
    arguments |= {"height": rows - 1, "width": columns - 1, "PAIRS": pairs}
    return _plan("spread_phases", y, width, out.numel() // width, arguments)
