"""Layer norm with scale and shift, and addition of a branch to the residual.

Shape letters: B batch, L tokens.
"""

from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    FLOAT_TYPES,
    Launch,
    check_tensor,
    named_strides,
    next_power_of_2,
    strided,
    warps_of,
)

MAX_WIDTH = 16384
"""Maximum width of a token; one program holds it in registers."""


@torch.library.custom_op("flashdreams::layer_norm_modulate", mutates_args=())
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` with float32 statistics, in one pass over memory.

    Args:
        x: ``[B, L, dim]``, bf16, fp16 or fp32; any strides with contiguous last dim, as for all.
        shift: ``[B, L or 1, dim]``, bf16, fp16 or fp32.
        scale: like ``shift``.
        eps: added to the variance.
        dtype: dtype of the result, bf16, fp16 or fp32; None: that of ``x``.

    Returns:
        ``[B, L, dim]``, contiguous; rounded once.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.

    Source: adaLN of DiT, arXiv:2212.09748, section 3.2.
    """
    check_modulation(x, {"shift": shift, "scale": scale})
    return _normed(x, shift, scale, eps, dtype, 1.0)


@layer_norm_modulate.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@torch.library.custom_op("flashdreams::layer_norm_affine", mutates_args=())
def layer_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``layer_norm(x) * weight + bias`` with float32 statistics, rounded once to ``dtype``.

    Args:
        x: as for :func:`layer_norm_modulate`.
        weight: ``[dim]``, bf16, fp16 or fp32.
        bias: like ``weight``.
        eps: added to the variance.
        dtype: dtype of the result, bf16, fp16 or fp32; None: that of ``x``.

    Returns:
        ``[B, L, dim]``, contiguous.

    Raises:
        ValueError, TypeError, ImportError: as for :func:`layer_norm_modulate`.
    """
    check_modulation(x, {})
    for name, tensor in {"weight": weight, "bias": bias}.items():
        check_tensor(name, tensor, (x.shape[-1],), x, FLOAT_TYPES)
    return _normed(x, bias[None, None], weight[None, None], eps, dtype, 0.0)


@layer_norm_affine.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _normed(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None, added: float
) -> Tensor:
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype is {dtype}; allowed here: {', '.join(map(str, FLOAT_TYPES))}.")
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel():
        plan_norm_modulate(x, shift, scale, eps, out, added).run()
    return out


@torch.library.custom_op("flashdreams::gate_residual", mutates_args=())
def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``(x + y * gate) * scale + shift`` in one pass over memory.

    ``y * gate`` and the sum are each rounded to the dtype of ``x``, as in PyTorch.

    Args:
        x: ``[B, L, dim]``, bf16, fp16 or fp32; any strides with contiguous last dim, as for all.
        y: ``[B, L, dim]``, bf16, fp16 or fp32; the branch to be gated.
        gate: ``[B or 1, L or 1, dim]``, bf16, fp16 or fp32; None adds ``y`` ungated.
        scale: like ``gate``; None leaves the sum unscaled.
        shift: like ``gate``; given if and only if ``scale`` is.

    Returns:
        Like ``x``, contiguous.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or ``scale`` without ``shift``.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    given = {"gate": gate, "scale": scale, "shift": shift}
    if (scale is None) != (shift is None):
        alone = "shift" if scale is None else "scale"
        raise ValueError(f"{alone} is given alone; give scale and shift, or neither.")
    check_modulation(x, {name: tensor for name, tensor in given.items() if tensor is not None})
    check_tensor("y", y, x.shape, x, FLOAT_TYPES)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_gate_add(x, y, gate, out, scale, shift).run()
    return out


@gate_residual.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check_modulation(x: Tensor, modulation: dict[str, Tensor]) -> None:
    """Check tokens ``[B, L, dim]`` and the tensors that broadcast to them.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
    """
    check_tensor("x", x, (None, None, None), x, FLOAT_TYPES)
    batch, length, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"dim={width} is wider than {MAX_WIDTH}, the most one program holds.")
    for name, tensor in modulation.items():
        tokens = 1 if tensor.ndim == 3 and tensor.shape[1] == 1 else length
        clips = 1 if tensor.ndim == 3 and tensor.shape[0] == 1 else batch
        check_tensor(name, tensor, (clips, tokens, width), x, FLOAT_TYPES)


def _broadcast(name: str, x: Tensor | None) -> dict[str, Any]:
    """Arguments of a program for a tensor that is repeated over dims of size 1."""
    strides = [0, 0] if x is None else [x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1)]
    return {name: x, **named_strides(name, "bl", strides)}


def plan_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out: Tensor,
    added: float = 1.0,
    out_scale: Tensor | None = None,
) -> Launch:
    """The launch of :func:`layer_norm_modulate` into ``out``; arguments checked.

    ``added`` is added to ``scale``; it is 0 for :func:`layer_norm_affine`. With ``out_scale``,
    ``[B, L, 1]``, this is the launch of `fp8_rows.layer_norm_quantize`.
    """
    batch, length, width = x.shape
    block = next_power_of_2(width)
    return Launch(
        "adaln",
        "norm_modulate",
        (batch * length,),
        {
            "out": out,
            "out_scale": out_scale,
            "eps": eps,
            "num_tokens": length,
            **strided("x", "bl", x),
            **_broadcast("shift", shift),
            **_broadcast("scale", scale),
        },
        {
            "ADDED": added,
            "WIDTH": width,
            "BLOCK": block,
            "INTERPRETED": out_scale is not None and x.device.type == "cpu",
        },
        num_warps=warps_of(block),
        device=x.device,
    )


def plan_gate_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    out: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Launch:
    """The launch of :func:`gate_residual` into ``out``; arguments checked."""
    batch, length, width = x.shape
    block = next_power_of_2(width)
    return Launch(
        "adaln",
        "gate_add",
        (batch * length,),
        {
            "out": out,
            "num_tokens": length,
            **strided("x", "bl", x),
            **strided("y", "bl", y),
            **_broadcast("gate", gate),
            **_broadcast("scale", scale),
            **_broadcast("shift", shift),
        },
        {"WIDTH": width, "BLOCK": block},
        num_warps=warps_of(block),
        device=x.device,
    )
