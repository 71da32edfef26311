"""RMS norm over all heads and rotation of queries and keys, optionally with the cache write and
with quantization to e4m3.

Shape letters: B batch, L tokens, S slots, N heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    FLOAT_TYPES,
    INDEX_TYPES,
    Launch,
    check_tensor,
    named_strides,
    next_power_of_2,
    strided,
    warps_of,
)

FP8 = torch.float8_e4m3fn


@torch.library.custom_op("flashdreams::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm and rotate queries and keys in one pass over memory.

    The norm's statistics and the rotation are float32; between them values are rounded to the
    dtype of ``q``, as the unfused modules do.

    Args:
        q: ``[B, L, N, D]``, bf16, fp16 or fp32; any strides with contiguous D. All heads of the
            model: the norm runs over ``N * D``.
        k: like ``q``.
        q_weight: ``[N * D]``, dtype of ``q``.
        k_weight: like ``q_weight``.
        table: ``[L, D/2, 2]`` or ``[1, D/2, 2]`` float32, cosine and sine of each channel pair.
        eps: added to the mean square.

    Returns:
        Queries and keys, ``[B, L, N, D]`` contiguous.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or an odd D.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    _check(q, k, q_weight, k_weight, table)
    q_out, k_out = _empty(q), _empty(k)
    if q.numel():
        plan((q, k, k), (q_out, k_out, k_out), q_weight, k_weight, table, eps, None).run()
    return q_out, k_out


@qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), _empty(k)


@torch.library.custom_op("flashdreams::qk_norm_rope_write", mutates_args=("k_cache", "v_cache"))
def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values into the cache, in one launch.

    For cores with the whole chunk on one rank. If keys are first communicated between ranks, use
    :func:`qk_norm_rope` before the all-to-all and write after it.

    Args:
        q: as for :func:`qk_norm_rope`.
        k: as there.
        v: like ``k``; copied.
        q_weight: as there.
        k_weight: as there.
        table: as there.
        eps: as there.
        k_cache: ``[B, S, N, D]``, dtype of ``k``; written to.
        v_cache: like ``k_cache``; written to.
        slots: ``[L]`` int32 or int64, on the device, without duplicates; tokens whose slot
            is outside the cache are dropped.

    Returns:
        Queries, ``[B, L, N, D]`` contiguous.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or an odd D.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    _check(q, k, q_weight, k_weight, table)
    check_write(k, v, k_cache, v_cache, slots)
    q_out = _empty(q)
    if q.numel():
        plan((q, k, v), (q_out, k_cache, v_cache), q_weight, k_weight, table, eps, slots).run()
    return q_out


@qk_norm_rope_write.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _empty(q)


@torch.library.custom_op("flashdreams::qk_norm_rope_quantize", mutates_args=())
def qk_norm_rope_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    eps: float,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotate queries and keys, and quantize them and the values to e4m3, in one launch.

    For keys that are communicated between ranks before they are written.

    Args:
        q: as for :func:`qk_norm_rope`.
        k: as there.
        v: like ``k``.
        q_weight: as there.
        k_weight: as there.
        table: as there.
        eps: as there.
        scales: ``[B, 3, N]`` float32, powers of two from 2**-126 to 2**126: of queries, keys and
            values. Values above 448 times their scale saturate.

    Returns:
        Queries, keys and values divided by their scales, ``[B, L, N, D]`` e4m3 contiguous.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or an odd D.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    _check(q, k, q_weight, k_weight, table)
    check_tensor("v", v, k.shape, k)
    check_scales(scales, q)
    outputs = (_empty(q, FP8), _empty(q, FP8), _empty(q, FP8))
    if q.numel():
        plan((q, k, v), outputs, q_weight, k_weight, table, eps, None, scales).run()
    return outputs


@qk_norm_rope_quantize.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, FP8), _empty(q, FP8), _empty(q, FP8)


@torch.library.custom_op("flashdreams::qk_norm_rope_write_fp8", mutates_args=("k_cache", "v_cache"))
def qk_norm_rope_write_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    scales: Tensor,
) -> Tensor:
    """:func:`qk_norm_rope_write` into e4m3 caches; the queries are e4m3, too.

    Args:
        q: as there.
        k: as there.
        v: as there.
        q_weight: as there.
        k_weight: as there.
        table: as there.
        eps: as there.
        k_cache: ``[B, S, N, D]`` e4m3; written to.
        v_cache: like ``k_cache``; written to.
        slots: as there.
        scales: as for :func:`qk_norm_rope_quantize`.

    Returns:
        Queries divided by their scales, ``[B, L, N, D]`` e4m3 contiguous.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or an odd D.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    _check(q, k, q_weight, k_weight, table)
    check_write(k, v, k_cache, v_cache, slots, FP8)
    check_scales(scales, q)
    q_out = _empty(q, FP8)
    if q.numel():
        outputs = (q_out, k_cache, v_cache)
        plan((q, k, v), outputs, q_weight, k_weight, table, eps, slots, scales).run()
    return q_out


@qk_norm_rope_write_fp8.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _empty(q, FP8)


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor) -> None:
    check_tensor("q", q, (None, None, None, None), q, FLOAT_TYPES)
    _, length, heads, head_dim = q.shape
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2 for rotary embedding.")
    check_tensor("k", k, q.shape, q)
    check_tensor("q_weight", q_weight, (heads * head_dim,), q)
    check_tensor("k_weight", k_weight, (heads * head_dim,), q)
    rows = 1 if table.ndim == 3 and table.shape[0] == 1 else length
    check_tensor("table", table, (rows, head_dim // 2, 2), q, (torch.float32,))
    if head_dim > 2 and table.stride(1) != 2:
        raise ValueError(
            f"table has stride {table.stride(1)} between channel pairs, which must be 2; "
            "call table.contiguous()."
        )


def plan(
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    eps: float,
    slots: Tensor | None,
    scales: Tensor | None = None,
) -> Launch:
    """The launch of one call.

    Args:
        inputs: queries, keys and values (the last is read only with ``slots`` or ``scales``),
            checked.
        outputs: output tensors ``[B, L, N, D]``, or caches ``[B, S, N, D]`` for keys and values.
        q_weight: ``[N * D]``.
        k_weight: ``[N * D]``.
        table: ``[L or 1, D/2, 2]``.
        eps: added to the mean square.
        slots: ``[L]``; None writes no cache.
        scales: ``[B, 3, N]`` for e4m3 outputs; None keeps the dtype.
    """
    q, k, v = inputs
    q_out, k_out, v_out = outputs
    batch, length, heads, head_dim = q.shape
    block_n, block_d = next_power_of_2(heads), next_power_of_2(head_dim)
    return Launch(
        "rope_qknorm",
        "norm_rope",
        (batch * length, 2 if slots is None and scales is None else 3),
        {
            "q_weight": q_weight,
            "k_weight": k_weight,
            "table": table,
            "slots": slots,
            "scales": scales,
            "eps": eps,
            "num_tokens": length,
            "num_heads": heads,
            "num_slots": k_out.shape[1],
            "table_stride_l": 0 if len(table) == 1 else table.stride(0),
            **named_strides("scales", "br", (0, 0) if scales is None else scales.stride()[:2]),
            **strided("q", "bln", q),
            **strided("k", "bln", k),
            **strided("v", "bln", v),
            **strided("q_out", "bln", q_out),
            **strided("k_out", "bln", k_out),
            **strided("v_out", "bln", v_out),
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
            "WRITE_CACHE": slots is not None,
            "QUANTIZE": scales is not None,
            "INTERPRETED": q.device.type == "cpu",
        },
        num_warps=warps_of(block_n * block_d),
        device=q.device,
    )


def check_scales(scales: Tensor, q: Tensor) -> None:
    """Check the scales of e4m3 outputs.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
    """
    check_tensor("scales", scales, (len(q), 3, q.shape[2]), q, (torch.float32,))


def check_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Check the arguments of a cache write.

    Args:
        k: ``[B, L, N, D]``.
        v: like ``k``.
        k_cache: ``[B, S, N, D]``.
        v_cache: like ``k_cache``.
        slots: ``[L]``.
        cache_dtype: dtype of the caches; None: that of ``k``.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
    """
    check_tensor("k", k, (None, None, None, None), k, FLOAT_TYPES)
    batch, length, heads, head_dim = k.shape
    check_tensor("v", v, k.shape, k)
    cache_shape = (batch, None, heads, head_dim)
    check_tensor("k_cache", k_cache, cache_shape, k, (cache_dtype or k.dtype,))
    check_tensor("v_cache", v_cache, k_cache.shape, k, (k_cache.dtype,))
    check_tensor("slots", slots, (length,), k, INDEX_TYPES)
