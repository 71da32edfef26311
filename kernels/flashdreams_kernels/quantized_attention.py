"""Attention of a chunk over a ring KV cache in eight bits, which is read in place.

Shape letters: B batch, L query tokens, T own tokens, P past tokens, S stored slots, N heads,
D head dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.attention import (
    CONSUMER,
    TileConfig,
    TileTable,
    attend_arguments,
    attend_constants,
    attend_grid,
    check_attention,
    new_outputs,
    plan_shares,
    splits_for,
    tile_config,
)
from flashdreams_kernels.launch import (
    INDEX_TYPES,
    Launch,
    Target,
    ceil_div,
    check_tensor,
    named_strides,
    target_of,
)

PAST_TYPES = (torch.int8, torch.float8_e4m3fn)
CONVERTS_FP8 = 89
"""The least capability whose instructions convert e4m3. Older chips move bits, and so does the
interpreter, whose conversion makes numbers of what is none."""

TILES: TileTable = {
    (80, 64): TileConfig(128, 32, 4, 3, 2),
    (80, 128): TileConfig(128, 32, 8, 3),
    (CONSUMER, 64): TileConfig(128, 32, 8, 2),
    (CONSUMER, 128): TileConfig(128, 32, 8, 2),
    (90, 64): TileConfig(128, 128, 8, 3),
    (90, 128): TileConfig(128, 128, 8, 2),
    (100, 64): TileConfig(128, 64, 8, 3),
    (100, 128): TileConfig(128, 64, 8, 3),
}
"""The largest that spill no registers; widening takes some more than plain attention has left."""

PAST_STAGES = 3
"""Steps of a past block that overlap: its slots are fetched one step before what lies there."""


@dataclass(frozen=True)
class Past:
    """Where past keys and values lie in eight bits; arguments of :func:`quantized_attention`."""

    k: Tensor
    v: Tensor
    k_exponents: Tensor
    v_exponents: Tensor
    slots: Tensor


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    k_exponents: Tensor,
    v_exponents: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to some slots of a KV cache in eight bits and to the chunk itself as it is.

    Past keys and values are widened tile by tile in registers; no wide copy of them is made.
    What is allocated beside the result is 8 bytes per head and past token, for their scales, and
    shares of the result where the keys are split. Inference only: no gradient is defined.

    Args:
        q: ``[B, L, N, D]``, bf16, fp16 or fp32; any strides with contiguous D, as for all.
        k: ``[B, T, N, D]``, the chunk's own keys, like ``q`` in dtype and device; T may be 0.
        v: like ``k``.
        past_k: ``[B, S, N, D]``, int8 or float8_e4m3fn.
        past_v: like ``past_k``, with the same strides.
        k_exponents: ``[B, S, N]`` int8, -126 to 126; a row of ``past_k`` counts times 2 to this
            power.
        v_exponents: like ``k_exponents``, with the same strides.
        slots: ``[P]``, int32 or int64, the slots that are read, in any order; they must lie in the
            ring. P may be 0. They are read on the device, so a captured graph follows the ring.
        scale: positive factor on the scores; None means ``D ** -0.5``.
        visible: int32 or int64, one element, on the device of ``q``: how many leading entries of
            ``slots`` are read, clamped to 0 and P. None means all.
        return_lse: also return the log of the sums of exponentials, for merging.
        num_splits: as of :func:`flashdreams_kernels.attention.chunk_attention`.

    Returns:
        ``[B, L, N, D]`` contiguous, in the dtype of ``q``; with ``return_lse`` also ``[B, N, L]``
        float32, natural logarithm. Where nothing is seen: zeros and minus infinity.

    Raises:
        ValueError: shapes, strides, devices or a number that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be [B, L, N, D], got {list(q.shape)}.")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits} must be at least 1, or None to choose it.")
    out, lse = torch.ops.flashdreams.quantized_attention(
        *(q, k, v, past_k, past_v, k_exponents, v_exponents, slots, visible),
        q.shape[-1] ** -0.5 if scale is None else scale,
        return_lse,
        num_splits or 0,
    )
    return (out, lse) if return_lse else out


@torch.library.custom_op("flashdreams::quantized_attention", mutates_args=())
def _quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    k_exponents: Tensor,
    v_exponents: Tensor,
    slots: Tensor,
    visible: Tensor | None,
    scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    past = Past(past_k, past_v, k_exponents, v_exponents, slots)
    check_attention(q, k, v, visible, scale)
    _check_past(q, past)
    out, lse = new_outputs(q, return_lse)
    if out.numel():
        target = target_of(q.device)
        for launch in plan(q, k, v, past, visible, scale, out, lse, num_splits, target):
            launch.run()
    return out, lse


@_quantized_attention.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_outputs(q, rest[-2])


def _check_past(q: Tensor, past: Past) -> None:
    batch, _, heads, head_dim = q.shape
    check_tensor("past_k", past.k, (batch, None, heads, head_dim), q, PAST_TYPES)
    check_tensor("past_v", past.v, past.k.shape, q, (past.k.dtype,))
    rows = past.k.shape[:3]
    check_tensor("k_exponents", past.k_exponents, rows, q, (torch.int8,))
    check_tensor("v_exponents", past.v_exponents, rows, q, (torch.int8,))
    check_tensor("slots", past.slots, (None,), q, INDEX_TYPES)
    pairs = {"past": (past.k, past.v), "exponents": (past.k_exponents, past.v_exponents)}
    for name, (keys, values) in pairs.items():
        if keys.stride() != values.stride():
            raise ValueError(
                f"{name} of keys and values have the strides {keys.stride()} and "
                f"{values.stride()}, which must be equal; allocate both alike."
            )
    if len(past.slots) and not rows[1]:
        raise ValueError(f"slots names {len(past.slots)} slots of a ring that has 0.")


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past,
    visible: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    num_splits: int,
    target: Target,
) -> list[Launch]:
    """The launches of one call: the scales, the tiles and, with more than one split, the merge.

    Args:
        q: checked, like all tensors; see :func:`quantized_attention`.
        k: as there.
        v: as there.
        past: as there.
        visible: as there.
        scale: as there.
        out: ``[B, L, N, D]`` contiguous, is written.
        lse: ``[B, N, L]`` float32, is written unless it is empty.
        num_splits: 0 chooses it.
        target: what the launches are for.
    """
    batch, _, heads, head_dim = q.shape
    tiles = tile_config(target, head_dim, q.element_size(), TILES)
    num_splits = num_splits or splits_for(q, (len(past.slots), k.shape[1]), tiles, target)
    scales = q.new_empty((2, batch * heads, len(past.slots)), dtype=torch.float32)
    gather = [_gather_launch(past, scales)] if scales.numel() else []
    attend = partial(_attend_launch, (q, k, v, visible, scale), past, scales, tiles, target)
    return [*gather, *plan_shares(out, lse, num_splits, attend)]


def _gather_launch(past: Past, scales: Tensor) -> Launch:
    """Write the scales of the slots, ``[2, B * N, P]`` of keys and of values."""
    block = 256
    _, rows, count = scales.shape
    return Launch(
        "quantized_attention",
        "gather_scales",
        (ceil_div(count, block), rows),
        {
            "k_exponents": past.k_exponents,
            "v_exponents": past.v_exponents,
            "slots": past.slots,
            "k_scales": scales[0],
            "v_scales": scales[1],
            "num_slots": count,
            "num_stored": past.k.shape[1],
            "num_heads": past.k.shape[2],
            **named_strides("exponents", "bsn", past.k_exponents.stride()),
        },
        {"BLOCK": block},
        device=scales.device,
    )


def _attend_launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float],
    past: Past,
    scales: Tensor,
    tiles: TileConfig,
    target: Target,
    out: Tensor,
    lse: Tensor,
    lse_strides: tuple[int, ...],
    constants: dict[str, Any],
) -> Launch:
    """Attend to ``len(out)`` shares of the keys; ``out`` is ``[splits, B, L, N, D]``."""
    q, k, _, visible, _ = inputs
    form = "int8" if past.k.dtype == torch.int8 else "fp8"
    if form == "fp8" and target.capability < CONVERTS_FP8:
        form = "fp8 by bits"
    return Launch(
        "quantized_attention",
        "attend",
        attend_grid(q, len(out), tiles),
        {
            **attend_arguments(inputs, out, lse, lse_strides),
            "past_k": past.k.view(torch.int8),
            "past_v": past.v.view(torch.int8),
            "k_scales": scales[0],
            "v_scales": scales[1],
            "slots": past.slots,
            "num_own": k.shape[1],
            "num_slots": len(past.slots),
            "num_stored": past.k.shape[1],
            **named_strides("past", "bsn", past.k.stride()[:3]),
        },
        {
            **constants,
            **attend_constants(q, visible, tiles, target),
            "FORM": form,
            "PAST_STAGES": PAST_STAGES,
        },
        tiles.num_warps,
        tiles.num_stages,
        q.device,
    )
