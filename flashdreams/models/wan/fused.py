"""Small operations of a Wan block as Triton kernels, in the form in which the block calls them."""

from typing import Protocol

import torch
from flashdreams_kernels.adaln import gate_residual, layer_norm_affine, layer_norm_modulate
from flashdreams_kernels.fp8_rows import gelu_quantize, layer_norm_quantize
from flashdreams_kernels.rope_qknorm import (
    qk_norm_rope,
    qk_norm_rope_quantize,
    qk_norm_rope_write,
    qk_norm_rope_write_fp8,
)
from torch import Tensor, nn

from flashdreams.attention.backends import why_unusable
from flashdreams.attention.cache import KVCache
from flashdreams.models.wan.fp8_linear import QuantizedRows


class Norm(Protocol):
    """An RMS norm over all heads."""

    eps: float
    """Added to the mean square."""

    @property
    def weight(self) -> Tensor:
        """``[N * D]``."""


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `flashdreams.models.wan.blocks.modulated_norm`."""
    return layer_norm_modulate(x, shift, scale, eps, dtype)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `flashdreams.models.wan.blocks.gated_sum`."""
    return gate_residual(x, y, gate)


def gated_sum_affine(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``gated_sum(x, y, gate) * scale + shift``; scale and shift are ``[B or 1, L, dim]``."""
    return gate_residual(x, y, gate, scale, shift)


def branch_sum(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``; a kernel if the dtypes differ, because PyTorch's addition is slow then."""
    return x + y if x.dtype == y.dtype else gate_residual(x, y)


def affine_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """See `flashdreams.models.wan.blocks.affine_norm`; a kernel if the dtypes differ."""
    if x.dtype == dtype:
        return norm(x)
    return layer_norm_affine(x, norm.weight, norm.bias, norm.eps, dtype)


def quantized_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> QuantizedRows:
    """See `flashdreams.models.wan.fp8_linear.quantized_norm`."""
    return QuantizedRows(*layer_norm_quantize(x, shift, scale, eps))


def quantized_affine_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> QuantizedRows:
    """See `flashdreams.models.wan.fp8_linear.quantized_affine_norm`."""
    rows = norm.bias[None, None], norm.weight[None, None]
    return QuantizedRows(*layer_norm_quantize(x, *rows, norm.eps, 0.0))


def quantized_gelu(x: Tensor) -> QuantizedRows:
    """See `flashdreams.models.wan.fp8_linear.quantized_gelu`."""
    return QuantizedRows(*gelu_quantize(x))


def norm_rope(
    q: Tensor, k: Tensor, norm_q: Norm, norm_k: Norm, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """See `flashdreams.models.wan.blocks.norm_rope`; the norms must hold all heads."""
    return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, rope, norm_q.eps)


def norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Norm,
    norm_k: Norm,
    rope: Tensor,
    cache: KVCache,
) -> Tensor:
    """``norm_rope``, and the write of keys and values into the cache; returns the queries.

    For an fp8 cache with fixed scales the queries are e4m3, too.
    """
    norm = norm_q.weight, norm_k.weight, rope, norm_q.eps
    slots, scales = cache.cursor.slots, cache.scales
    if scales is None:
        return qk_norm_rope_write(q, k, v, *norm, cache.k, cache.v, slots)
    where = cache.k.values, cache.v.values, slots
    return qk_norm_rope_write_fp8(q, k, v, *norm, *where, scales[..., 0])


def norm_rope_quantize(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Norm, norm_k: Norm, rope: Tensor, cache: KVCache
) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_rope``, with all three results in e4m3 by the scales of the cache."""
    assert cache.scales is not None
    norm = norm_q.weight, norm_k.weight, rope, norm_q.eps
    return qk_norm_rope_quantize(q, k, v, *norm, cache.scales[..., 0])


def can_fuse_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a GPU; False on a CPU, where an interpreter replaces it."""
    return device.type == "cuda" and why_unusable("triton", device, dtype) is None


def check_fused_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse the kernels where they cannot run.

    Raises:
        ValueError: says what is missing.
    """
    reason = why_unusable("triton", device, dtype)
    if reason is not None:
        raise ValueError(f"fused_kernels=True cannot be used here: {reason}. Leave it off.")
