"""Linear layers in FP8: e4m3 weights with a scale per output, e4m3 inputs with a scale per token.

Norms and GELU have a form here whose result is such an input; `flashdreams.models.wan.fused` has
the same as Triton kernels. A CPU dequantizes and multiplies in float32, to look at the error.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from flashdreams_kernels import reference
from torch import Tensor, nn

from flashdreams.attention.fp8 import FP8


class QuantizedRows(NamedTuple):
    """Rows in e4m3; their product with the scale is meant."""

    values: Tensor
    """``[..., dim]`` e4m3."""
    scale: Tensor
    """``[..., 1]`` float32."""


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantize ``[..., dim]`` by rows; see `flashdreams_kernels.reference.quantize_rows`."""
    if x.is_meta:  # operations are counted, and this one joins those before it
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        return QuantizedRows(x.new_empty(x.shape, dtype=FP8), scale)
    return QuantizedRows(*reference.quantize_rows(x))


def quantized_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> QuantizedRows:
    """`flashdreams.models.wan.blocks.modulated_norm` for a `FP8Linear`; ``dtype`` is not read."""
    return QuantizedRows(*reference.layer_norm_quantize(x, shift, scale, eps))


def quantized_affine_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> QuantizedRows:
    """`flashdreams.models.wan.blocks.affine_norm` for a `FP8Linear`; ``dtype`` is not read."""
    return QuantizedRows(*reference.layer_norm_quantize(x, norm.bias, norm.weight, norm.eps, 0.0))


def quantized_gelu(x: Tensor) -> QuantizedRows:
    """The tanh form of GELU for a `FP8Linear`."""
    return QuantizedRows(*reference.gelu_quantize(x))


def fp8_linear(x: QuantizedRows | Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x: ``[..., K]``; a tensor is quantized first.
        weight: ``[N, K]`` e4m3, contiguous. K and N are multiples of 16.
        scale: ``[N]`` float32.
        bias: ``[N]`` in the type of the result; bf16 on a GPU.

    Returns:
        ``[..., N]`` in the type of ``bias``.
    """
    values, rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
    flat, rows = values.flatten(0, -2), rows.flatten(0, -2)
    multiply = emulated_mm if flat.device.type == "cpu" else scaled_mm
    return multiply(flat, weight, rows, scale, bias).unflatten(0, values.shape[:-1])


def emulated_mm(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What `scaled_mm` computes, in float32."""
    return (F.linear(x.float(), weight.float()) * rows * scale + bias).to(bias.dtype)


def scaled_mm(x: Tensor, weight: Tensor, rows: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One FP8 matmul of ``[M, K]`` and ``[N, K]`` with scales ``[M, 1]`` and ``[N]``.

    Sums stay in the accumulators of the tensor cores, as is usual for inference: with partial sums
    promoted to float32 row-wise kernels are much slower (pytorch/ao 1325).
    """
    return torch._scaled_mm(
        x, weight.t(), rows, scale.unsqueeze(0), bias, out_dtype=bias.dtype, use_fast_accum=True
    )


class FP8Linear(nn.Module):
    """A linear layer in the place of another, whose weight is quantized once and then dropped.

    Life: built where the weights have been loaded, merged with LoRAs and cut. It has a
    ``weight_scale`` beside the parameters of the other layer, so it does not load its checkpoint.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Any) -> Tensor:
        """Map ``[..., in_features]``, quantized or not, to ``[..., out_features]``."""
        return fp8_linear(x, self.weight, self.weight_scale, self.bias)
