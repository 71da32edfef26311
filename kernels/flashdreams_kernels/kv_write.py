"""Write of keys and values into cache slots that a device tensor names.

Shape letters: B batch, L tokens, S slots, N heads, D head dim.
"""

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    FLOAT_TYPES,
    INDEX_TYPES,
    Launch,
    check_tensor,
    named_strides,
    next_power_of_2,
    target_of,
    warps_of,
)


@torch.library.custom_op("flashdreams::kv_write", mutates_args=("k_cache", "v_cache"))
def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write a chunk's keys and values into their slots, in place.

    The slots are read on the device, so a captured graph follows the ring. No two tokens may have
    the same slot. A slot below 0 or past the cache is not written: that is how padding tokens are
    dropped, and how a wrong slot stays harmless.

    Args:
        k: ``[B, L, N, D]``, bf16, fp16 or fp32; any strides with contiguous D, as for all.
        v: like ``k``.
        k_cache: ``[B, S, N, D]``, dtype and device of ``k``; is written.
        v_cache: like ``k_cache``; is written.
        slots: ``[L]``, int32 or int64, one slot per token.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    check_write(k, v, k_cache, v_cache, slots)
    if k.numel():
        target_of(k.device)
        plan(k, v, k_cache, v_cache, slots).run()


@kv_write.register_fake
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


def check_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Check the arguments of a cache write.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
    """
    check_tensor("k", k, (None, None, None, None), k, FLOAT_TYPES)
    batch, length, heads, head_dim = k.shape
    check_tensor("v", v, k.shape, k)
    check_tensor("k_cache", k_cache, (batch, None, heads, head_dim), k)
    check_tensor("v_cache", v_cache, k_cache.shape, k)
    check_tensor("slots", slots, (length,), k, INDEX_TYPES)


def plan(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Launch:
    """The launch of one call; arguments as :func:`kv_write`, checked."""
    batch, length, heads, head_dim = k.shape
    block_n, block_d = next_power_of_2(heads), next_power_of_2(head_dim)
    return Launch(
        "kv_write",
        "write_slots",
        (batch * length,),
        {
            "k": k,
            "v": v,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": slots,
            "num_tokens": length,
            "num_heads": heads,
            "num_slots": k_cache.shape[1],
            **named_strides("k", "bln", k.stride()[:3]),
            **named_strides("v", "bln", v.stride()[:3]),
            **named_strides("k_cache", "bsn", k_cache.stride()[:3]),
            **named_strides("v_cache", "bsn", v_cache.stride()[:3]),
        },
        {"HEAD_DIM": head_dim, "BLOCK_N": block_n, "BLOCK_D": block_d},
        num_warps=warps_of(block_n * block_d),
        device=k.device,
    )
