"""Attention of a chunk of queries over the ring KV cache.

Shape letters: B batch, L query tokens, S key slots, N heads, D head dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    CONSUMER,
    FLOAT_TYPES,
    INDEX_TYPES,
    Block,
    Launch,
    Target,
    ceil_div,
    check_tensor,
    generation_of,
    is_aligned,
    named_strides,
    next_power_of_2,
    strided,
    target_of,
)

MAX_HEAD_DIM = 256
MAX_SPLITS = 16


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and compiler options of the attention program."""

    block_l: int
    """Queries per tile."""
    block_s: int
    """Keys per step."""
    num_warps: int
    num_stages: int
    per_processor: int = 1
    """Tiles that fit on one multiprocessor at a time."""
    descriptors: bool = False
    """Load whole blocks of keys and values through tensor descriptors (TMA), if their layout
    allows it."""
    max_registers: int | None = None
    """Per thread; None leaves it to the compiler."""


TileTable = Mapping[tuple[int, int], TileConfig]
"""Tiles by (capability, padded head dim), for 16-bit inputs; see :func:`tile_config`."""

TILES: TileTable = {
    (80, 64): TileConfig(128, 64, 4, 3, 2),
    (80, 128): TileConfig(128, 64, 8, 3),
    (CONSUMER, 64): TileConfig(128, 64, 8, 2),
    (CONSUMER, 128): TileConfig(128, 64, 8, 2),
    (90, 64): TileConfig(128, 128, 8, 3),
    (90, 128): TileConfig(128, 128, 8, 2),
    (100, 64): TileConfig(128, 64, 4, 3, 2),
    (100, 128): TileConfig(128, 64, 8, 3),
}


def tile_config(
    target: Target, head_dim: int, itemsize: int, table: TileTable = TILES
) -> TileConfig:
    """Tiles for a GPU, a head dim and an element size; depends on nothing else.

    Uses the newest listed generation that is not newer than the GPU; consumer GPUs and head dims
    above 128 have separate configurations. Float32 uses small tiles and spills registers: it is
    for checks, not for speed.
    """
    if target.interpreted:
        return TileConfig(32, 32, 1, 1)
    padded = max(64, next_power_of_2(head_dim))
    if itemsize > 2:
        return TileConfig(32, 32, 4, 1) if padded <= 128 else TileConfig(16, 16, 4, 1)
    if padded > 128:
        return TileConfig(64, 32, 8, 2)
    return table[generation_of(target, table), padded]


def choose_num_splits(num_tiles: int, num_blocks: int, num_slots: int) -> int:
    """Number of KV splits for which the last wave is nearly full.

    Time is counted in steps (one block of keys for one tile). A wave of ``num_slots`` tiles takes
    the blocks of one split plus prologue and epilogue; a merge costs further steps.

    Args:
        num_tiles: tiles of queries over all heads and batch entries.
        num_blocks: blocks of keys.
        num_slots: tiles that run concurrently.
    """
    ends, merge = 2, 2

    def steps(splits: int) -> int:
        waves = ceil_div(num_tiles * splits, num_slots)
        return waves * (ceil_div(num_blocks, splits) + ends + (merge if splits > 1 else 0))

    return min(range(1, max(1, min(MAX_SPLITS, num_blocks)) + 1), key=steps)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the first ``visible`` slots of a KV cache, in slot order and without a mask.

    The number of visible slots is read on the device, so one captured graph serves every AR step.
    Accumulation is float32. Inference only: no gradient is defined.

    Args:
        q: ``[B, L, N, D]``, bf16, fp16 or fp32; any strides with contiguous D, as for ``k``, ``v``.
        k: ``[B, S, N, D]``, like ``q`` in dtype and device.
        v: ``[B, S, N, D]``.
        scale: positive factor on the scores; None means ``D ** -0.5``.
        visible: int32 or int64, one element, on the device of ``q``: number of leading slots to
            attend to, clamped to [0, S]. None means all S.
        return_lse: also return the log of the sums of exponentials, for merging.
        num_splits: number of KV splits, computed in parallel and merged; None chooses it from the
            shape and the GPU. Give a fixed number if the bits must not depend on L, N or the
            number of multiprocessors.

    Returns:
        ``[B, L, N, D]`` contiguous, in the dtype of ``q``; with ``return_lse`` also ``[B, N, L]``
        float32, natural logarithm. If no slot is visible: zeros and minus infinity.

    Raises:
        ValueError: shapes, strides, devices or a number that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.

    Source: FlashAttention-2, arXiv:2307.08691; split keys as in Flash-Decoding.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be [B, L, N, D], got {list(q.shape)}.")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    splits = 0 if num_splits is None else num_splits
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits} must be at least 1, or None to choose it.")
    out, lse = torch.ops.flashdreams.chunk_attention(q, k, v, visible, factor, return_lse, splits)
    return (out, lse) if return_lse else out


@torch.library.custom_op("flashdreams::chunk_attention", mutates_args=())
def _chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    out, lse = new_outputs(q, return_lse)
    check_attention(q, k, v, visible, scale)
    if out.numel():
        target = target_of(q.device)
        for launch in plan(q, k, v, visible, scale, out, lse, num_splits, target):
            launch.run()
    return out, lse


@_chunk_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    return new_outputs(q, return_lse)


def new_outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Allocate results, ``[B, L, N, D]``, and their log-sum-exp, empty if not requested."""
    batch, length, heads, _ = q.shape
    lse_shape = (batch, heads, length) if return_lse else (0,)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(lse_shape, dtype=torch.float32, device=q.device),
    )


def check_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> None:
    """Check the arguments of :func:`chunk_attention`.

    Raises:
        ValueError: shapes, strides, devices or a number that do not fit.
        TypeError: a dtype that does not fit.
    """
    batch, _, heads, head_dim = q.shape
    check_tensor("q", q, (None, None, None, None), q, FLOAT_TYPES)
    check_tensor("k", k, (batch, None, heads, head_dim), q)
    check_tensor("v", v, k.shape, q)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be between 1 and {MAX_HEAD_DIM}.")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale} must be positive and finite.")
    if batch * heads > 65535:
        raise ValueError(f"batch * heads = {batch} * {heads} must be at most 65535.")
    if visible is None:
        return
    if visible.numel() != 1:
        raise ValueError(f"visible must hold one integer, got shape {list(visible.shape)}.")
    check_tensor("visible", visible, visible.shape, q, INDEX_TYPES)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    num_splits: int,
    target: Target,
    tiles: TileConfig | None = None,
) -> list[Launch]:
    """The launches of one call: the tiles and, with more than one split, the merge.

    Args:
        q: checked, like all tensors; see :func:`chunk_attention`.
        k: as there.
        v: as there.
        visible: as there.
        scale: as there.
        out: ``[B, L, N, D]`` contiguous; written to.
        lse: ``[B, N, L]`` float32; written to unless it is empty.
        num_splits: 0 chooses it.
        target: GPU of the launches.
        tiles: tiles to use instead of those of the table.
    """
    tiles = tiles or tile_config(target, q.shape[-1], q.element_size())
    batch, length, heads, _ = q.shape
    if not num_splits:
        num_tiles = ceil_div(length, tiles.block_l) * batch * heads
        num_blocks = ceil_div(k.shape[1], tiles.block_s)
        num_slots = target.num_processors * tiles.per_processor
        num_splits = choose_num_splits(num_tiles, num_blocks, num_slots)
    inputs = (q, k, v, visible, scale)
    if num_splits == 1:
        strides: tuple[int, ...] = (0, heads * length, 1, length)
        constants = {"WRITE_LSE": lse.numel() > 0, "LSE_UNIT": math.log(2)}
        return [_attend_launch(inputs, tiles, target, out[None], lse, strides, constants)]
    shares = out.new_empty((num_splits, *out.shape), dtype=torch.float32)
    shares_lse = shares.new_empty(shares.shape[:-1])
    strides, constants = shares_lse.stride(), {"WRITE_LSE": True, "LSE_UNIT": 1.0}
    return [
        _attend_launch(inputs, tiles, target, shares, shares_lse, strides, constants),
        _merge_launch(shares, shares_lse, out, lse),
    ]


def _attend_launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float],
    tiles: TileConfig,
    target: Target,
    out: Tensor,
    lse: Tensor,
    lse_strides: tuple[int, ...],
    constants: dict[str, Any],
) -> Launch:
    """Attention in ``len(out)`` KV splits.

    Args:
        inputs: queries, keys, values, the number of visible keys, and the scale.
        tiles: their sizes.
        target: GPU of the launch.
        out: ``[splits, B, L, N, D]``.
        lse: output for the log-sum-exp.
        lse_strides: strides of ``lse`` over splits, B, L and N.
        constants: of the log-sum-exp.
    """
    q, k, v, visible, scale = inputs
    batch, length, heads, head_dim = q.shape
    in_blocks = tiles.descriptors and has_blocks(k) and has_blocks(v)
    block = (1, tiles.block_s, head_dim)
    return Launch(
        "attention",
        "attend",
        (ceil_div(length, tiles.block_l), len(out), batch * heads),
        {
            "lse": lse,
            "visible": visible,
            "num_queries": length,
            "num_heads": heads,
            "scale_log2": scale * math.log2(math.e),
            **strided("q", "bln", q),
            **strided("k", "bsn", k),
            **strided("v", "bsn", v),
            **strided("out", "sbln", out),
            **named_strides("lse", "sbln", lse_strides),
            "k_blocks": Block(k.flatten(2), block) if in_blocks else None,
            "v_blocks": Block(v.flatten(2), block) if in_blocks else None,
            "num_keys": k.shape[1],
        },
        {
            **constants,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, next_power_of_2(head_dim)),
            "BLOCK_L": tiles.block_l,
            "BLOCK_S": tiles.block_s,
            "HAS_VISIBLE": visible is not None,
            "UPCAST": target.interpreted and q.dtype != torch.float32,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
            "IN_BLOCKS": in_blocks,
        },
        tiles.num_warps,
        tiles.num_stages,
        q.device,
        tiles.max_registers,
    )


def has_blocks(x: Tensor) -> bool:
    """Whether a tensor descriptor can read keys or values ``[B, S, N, D]`` head by head."""
    heads, head_dim = x.shape[2:]
    beside = heads == 1 or x.stride(2) == head_dim
    return beside and next_power_of_2(head_dim) == head_dim >= 16 and is_aligned(x)


def _merge_launch(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """Merge ``[splits, B, L, N, D]`` into ``[B, L, N, D]``."""
    _, length, heads, head_dim = out.shape
    rows = out.numel() // head_dim
    block_r = 16
    return Launch(
        "attention",
        "merge_splits",
        (ceil_div(rows, block_r),),
        {
            "partial": partial,
            "partial_lse": partial_lse,
            "out": out,
            "lse": lse,
            "num_rows": rows,
            "num_queries": length,
            "num_heads": heads,
            "num_splits": len(partial),
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, next_power_of_2(head_dim)),
            "BLOCK_R": block_r,
            "WRITE_LSE": lse.numel() > 0,
            "LSE_UNIT": math.log(2),
        },
        device=out.device,
    )
