"""Inputs of FP8 matmuls: layer norm and GELU with results in e4m3 and a scale per token.

Shape letters: B batch, L tokens.
"""

import torch
from torch import Tensor

from flashdreams_kernels.adaln import check_modulation, plan_norm_modulate
from flashdreams_kernels.launch import (
    Launch,
    named_strides,
    next_power_of_2,
    target_of,
    warps_of,
)

FP8 = torch.float8_e4m3fn


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for e4m3 values and scales."""
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=FP8, device=x.device), scale


@torch.library.custom_op("flashdreams::layer_norm_quantize", mutates_args=())
def layer_norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, added: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``layer_norm(x) * (added + scale) + shift`` in e4m3, in one pass over memory.

    Nothing is rounded before the quantization. The scale of a token is the smallest power of two
    that brings its largest magnitude to 448 or less.

    Args:
        x: ``[B, L, dim]``, bf16, fp16 or fp32; any strides with contiguous last dim, as for all.
        shift: ``[B or 1, L or 1, dim]``, bf16, fp16 or fp32.
        scale: like ``shift``.
        eps: added to the variance.
        added: 1 for a modulation, 0 for a weight.

    Returns:
        ``[B, L, dim]`` e4m3 and ``[B, L, 1]`` float32, both contiguous; their product is the norm.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    check_modulation(x, {"shift": shift, "scale": scale})
    out, out_scale = _rows(x)
    if x.numel():
        target_of(x.device)
        plan_norm_modulate(x, shift, scale, eps, out, added, out_scale).run()
    return out, out_scale


@layer_norm_quantize.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, added: float = 1.0
) -> tuple[Tensor, Tensor]:
    return _rows(x)


@torch.library.custom_op("flashdreams::gelu_quantize", mutates_args=())
def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh form of GELU in e4m3, in one pass over memory; scales as `layer_norm_quantize`.

    Args:
        x: ``[B, L, dim]``, bf16, fp16 or fp32; any strides with contiguous last dim.

    Returns:
        ``[B, L, dim]`` e4m3 and ``[B, L, 1]`` float32, both contiguous.

    Raises:
        ValueError, TypeError, ImportError: as for :func:`layer_norm_quantize`.
    """
    check_modulation(x, {})
    out, out_scale = _rows(x)
    if x.numel():
        target_of(x.device)
        plan_gelu(x, out, out_scale).run()
    return out, out_scale


@gelu_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _rows(x)


def plan_gelu(x: Tensor, out: Tensor, out_scale: Tensor) -> Launch:
    """The launch of :func:`gelu_quantize`; arguments checked."""
    batch, length, width = x.shape
    block = next_power_of_2(width)
    return Launch(
        "e4m3",
        "gelu_quantize",
        (batch * length,),
        {
            "x": x,
            "out": out,
            "out_scale": out_scale,
            "num_tokens": length,
            **named_strides("x", "bl", x.stride()[:2]),
        },
        {"WIDTH": width, "BLOCK": block, "INTERPRETED": x.device.type == "cpu"},
        num_warps=warps_of(block),
        device=x.device,
    )
