"""PyTorch references of the kernels.

Shape letters: B batch, L query tokens, S key slots, N heads, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk to the first ``visible`` slots of a cache, in float32.

    Args:
        q: ``[B, L, N, D]``.
        k: ``[B, S, N, D]``.
        v: ``[B, S, N, D]``.
        scale: factor on the scores; None means ``D ** -0.5``.
        visible: one integer, the number of leading slots to attend to; None means all.

    Returns:
        ``[B, L, N, D]`` in the dtype of ``q``, and the natural logarithm of the sums of
        exponentials, ``[B, N, L]`` float32. Without a visible slot: zeros and minus infinity.
    """
    length = k.shape[1] if visible is None else max(0, min(int(visible), k.shape[1]))
    queries, keys, values = (x.transpose(1, 2).float() for x in (q, k[:, :length], v[:, :length]))
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.softmax(scores, dim=-1) @ values
    return out.transpose(1, 2).to(q.dtype), lse


def fp8_weights_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention with softmax weights rounded to e4m3 as in FP8 kernels, and their sum unrounded.

    Args:
        q: ``[B, L, N, D]``.
        k: ``[B, S, N, D]``.
        v: like ``k``.
        scale: factor on the scores.

    Returns:
        ``[B, L, N, D]`` in the dtype of ``q``.

    Source: FlashAttention-3, arXiv:2407.08608, section 3.3; weights are first multiplied by 2**8.
    """
    queries, keys, values = (x.transpose(1, 2).float() for x in (q, k, v))
    scores = queries @ keys.transpose(-1, -2) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (weights * 256).to(torch.float8_e4m3fn).float() / 256
    out = (rounded @ values) / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over all heads together.

    Args:
        x: ``[B, L, N, D]``.
        weight: ``[N * D]``.
        eps: added to the mean square.

    Returns:
        Like ``x``; the statistics are float32, the normalized value is rounded before the weight.
    """
    wide = x.flatten(2).float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * scale).to(x.dtype) * weight).view(x.shape)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs.

    Args:
        x: ``[B, L, N, D]``.
        table: ``[L or 1, D/2, 2]`` float32, cosine and sine.

    Returns:
        Like ``x``; the arithmetic is float32.
    """
    cos, sin = table[:, None].unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm and rotation of queries and keys; arguments as :func:`rms_norm` and :func:`rotate`."""
    return (
        rotate(rms_norm(q, q_weight, eps), table),
        rotate(rms_norm(k, k_weight, eps), table),
    )


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize ``x / scale`` to e4m3, to nearest, ties to even; large values saturate.

    Args:
        x: ``[B, L, N, D]``.
        scale: ``[B, N]`` float32, powers of two.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    scaled = x.float() / scale[:, None, :, None]
    return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)


def qk_norm_rope_quantize(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qk_norm_rope`, then :func:`quantize` with scales ``[B, 3, N]``, the last argument."""
    *norm, scales = rest
    q, k = qk_norm_rope(q, k, *norm)
    of_q, of_k, of_v = (quantize(x, s) for x, s in zip((q, k, v), scales.unbind(1), strict=True))
    return of_q, of_k, of_v


def qk_norm_rope_write_fp8(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """:func:`qk_norm_rope_quantize`, then :func:`kv_write`; arguments in the kernel's order."""
    norm, cache, scales = rest[:4], rest[4:7], rest[7]
    q, k, v = qk_norm_rope_quantize(q, k, v, *norm, scales)
    kv_write(k, v, *cache)
    return q


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values ``[B, L, N, D]`` into ``slots`` ``[L]`` of caches ``[B, S, N, D]``.

    Slots outside the cache are skipped.
    """
    inside = (slots >= 0) & (slots < k_cache.shape[1])
    for cache, x in ((k_cache, k), (v_cache, v)):
        if cache.dtype == torch.float8_e4m3fn:  # not every build of PyTorch can index it
            cache, x = cache.view(torch.uint8), x.view(torch.uint8)
        cache[:, slots[inside]] = x[:, inside]


def qk_norm_rope_write(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """:func:`qk_norm_rope`, then :func:`kv_write`.

    Args:
        q: ``[B, L, N, D]``.
        k: like ``q``.
        v: like ``q``.
        rest: the other arguments of both, in order: weights, table and eps; caches and slots.

    Returns:
        Queries, ``[B, L, N, D]``.
    """
    norm, cache = rest[:4], rest[4:]
    q, k = qk_norm_rope(q, k, *norm)
    kv_write(k, v, *cache)
    return q


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` in float32.

    Args:
        x: ``[B, L, dim]``.
        shift: ``[B, L or 1, dim]``.
        scale: like ``shift``.
        eps: added to the variance.
        dtype: dtype of the result; None: that of ``x``.

    Returns:
        ``[B, L, dim]``.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()) + shift.float()).to(dtype or x.dtype)


def layer_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``layer_norm(x) * weight + bias`` in float32, ``[B, L, dim]`` and ``[dim]``, rounded once."""
    wide = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return wide.to(dtype or x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to e4m3 with a scale per row, to nearest, ties to even; NaN stays NaN.

    Args:
        x: ``[..., dim]``.

    Returns:
        ``[..., dim]`` e4m3 and ``[..., 1]`` float32, whose product is ``x``. A scale is the
        smallest power of two that brings the row's largest magnitude to 448 or less.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    wide = x.float()
    bits = wide.abs().amax(-1, keepdim=True).clamp_(min=2.0**-100).view(torch.int32)
    scale = (((bits + 0x1FFFFF) & 0x7F800000) - 0x4000000).view(torch.float32)
    return (wide / scale).clamp_(-limit, limit).to(torch.float8_e4m3fn), scale


def layer_norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, added: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` of ``layer_norm(x) * (added + scale) + shift`` in float32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return quantize_rows(normed * (added + scale.float()) + shift.float())


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` of the tanh form of GELU in float32."""
    return quantize_rows(F.gelu(x.float(), approximate="tanh"))


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``(x + y * gate) * scale + shift``, the product and the sum rounded to the dtype of ``x``.

    Args:
        x: ``[B, L, dim]``.
        y: ``[B, L, dim]``.
        gate: ``[B or 1, L or 1, dim]``; None is 1.
        scale: like ``gate``; if it and ``shift`` are None, the sum is returned.
        shift: like ``gate``.

    Returns:
        Like ``x``.
    """
    total = x + (y if gate is None else y.float() * gate.float()).to(x.dtype)
    if scale is None or shift is None:
        return total
    return (total.float() * scale.float() + shift.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` of ``[..., K]`` and ``[N, K]``, in float32, rounded once."""
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)
