"""Triton program of QK norm, rotation and cache write."""

import triton
import triton.language as tl


@triton.jit
def _normalise_and_rotate(
    x,
    weight,
    table,
    heads,
    dims,
    stride_n,
    eps,
    width,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    mask,
):
    """RMS norm over all heads of one token, then its rotation; float32 in registers."""
    dtype = x.dtype.element_ty
    values = tl.load(x + heads[:, None] * stride_n + dims[None, :], mask=mask, other=0.0)
    values = values.to(tl.float32)
    mean = tl.sum(tl.sum(values * values, 1), 0) / width
    gain = tl.load(weight + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    normed = (values * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32) * gain.to(tl.float32)
    normed = normed.to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, [BLOCK_N, BLOCK_D // 2, 2]))
    turn = tl.load(table + dims, mask=dims < HEAD_DIM, other=0.0)
    cos, sin = tl.split(tl.reshape(turn, [BLOCK_D // 2, 2]))
    cos = cos[None, :]
    sin = sin[None, :]
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, [BLOCK_N, BLOCK_D]).to(dtype)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_slots"])
def norm_rope(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    q_weight,
    k_weight,
    table,
    slots,
    eps,
    num_tokens,
    num_heads,
    num_slots,
    table_stride_l,
    q_stride_b,
    q_stride_l,
    q_stride_n,
    k_stride_b,
    k_stride_l,
    k_stride_n,
    v_stride_b,
    v_stride_l,
    v_stride_n,
    q_out_stride_b,
    q_out_stride_l,
    q_out_stride_n,
    k_out_stride_b,
    k_out_stride_l,
    k_out_stride_n,
    v_out_stride_b,
    v_out_stride_l,
    v_out_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_CACHE: tl.constexpr,
):
    """One token of q (role 0), of k (role 1) or, with ``WRITE_CACHE``, of v (role 2).

    Grid ``(B * L, roles)``. With ``WRITE_CACHE`` k and v go to ``slots[token]`` of a cache; a slot
    outside of it is not written.
    """
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    role = tl.program_id(1)
    heads = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads[:, None] < num_heads) & (dims[None, :] < HEAD_DIM)
    width = num_heads * HEAD_DIM
    table += token * table_stride_l
    if role == 0:
        q += batch * q_stride_b + token * q_stride_l
        result = _normalise_and_rotate(
            q,
            q_weight,
            table,
            heads,
            dims,
            q_stride_n,
            eps,
            width,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            mask,
        )
        q_out += batch * q_out_stride_b + token * q_out_stride_l
        tl.store(q_out + heads[:, None] * q_out_stride_n + dims[None, :], result, mask=mask)
    else:
        slot = token
        if WRITE_CACHE:
            slot = tl.load(slots + token).to(tl.int64)
            mask = mask & (slot >= 0) & (slot < num_slots)
        if role == 1:
            k += batch * k_stride_b + token * k_stride_l
            result = _normalise_and_rotate(
                k,
                k_weight,
                table,
                heads,
                dims,
                k_stride_n,
                eps,
                width,
                HEAD_DIM,
                BLOCK_N,
                BLOCK_D,
                mask,
            )
            k_out += batch * k_out_stride_b + slot * k_out_stride_l
            tl.store(k_out + heads[:, None] * k_out_stride_n + dims[None, :], result, mask=mask)
        elif WRITE_CACHE:
            v += batch * v_stride_b + token * v_stride_l
            values = tl.load(v + heads[:, None] * v_stride_n + dims[None, :], mask=mask)
            v_out += batch * v_out_stride_b + slot * v_out_stride_l
            tl.store(v_out + heads[:, None] * v_out_stride_n + dims[None, :], values, mask=mask)
