"""Triton program that scatters keys and values into their cache slots."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_slots"])
def write_slots(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    num_tokens,
    num_heads,
    num_slots,
    k_stride_b,
    k_stride_l,
    k_stride_n,
    v_stride_b,
    v_stride_l,
    v_stride_n,
    k_cache_stride_b,
    k_cache_stride_s,
    k_cache_stride_n,
    v_cache_stride_b,
    v_cache_stride_s,
    v_cache_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token of all heads; grid ``(B * L,)``. A slot outside the cache is not written."""
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    heads = tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < num_heads) & (dims < HEAD_DIM) & (slot >= 0) & (slot < num_slots)
    k += batch * k_stride_b + token * k_stride_l
    v += batch * v_stride_b + token * v_stride_l
    k_cache += batch * k_cache_stride_b + slot * k_cache_stride_s
    v_cache += batch * v_cache_stride_b + slot * v_cache_stride_s
    keys = tl.load(k + heads * k_stride_n + dims, mask=mask)
    values = tl.load(v + heads * v_stride_n + dims, mask=mask)
    tl.store(k_cache + heads * k_cache_stride_n + dims, keys, mask=mask)
    tl.store(v_cache + heads * v_cache_stride_n + dims, values, mask=mask)
