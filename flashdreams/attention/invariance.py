"""Whether a backend's bits for a query are independent of the rest of the call."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.attention.backends import BACKENDS, AttentionBackend, bind_kv_splits
from flashdreams.attention.choose import (
    AttentionShape,
    BackendChoice,
    MeasuredBackend,
    check_backend,
    draw_inputs,
    kv_splits_of,
)
from flashdreams.attention.fp8 import attend, quantize

PROMPT_KEYS = 512
"""Keys of cross-attention to a prompt."""

PADDING = 24
"""Queries of zeros behind the true ones, as an uneven split leaves them."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that show all bits of an element of a size."""


def choose_invariant_backend(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> BackendChoice:
    """The first accurate and invariant backend; else the first accurate one, to be tiled.

    KV splits follow from the shape. Any number of ranks makes the same choice, because
    nothing is timed; rank zero's is broadcast.

    Args:
        shape: self-attention of the whole model once the window is full.
        device: where it runs.
        dtype: of queries, keys and values.
        names: of :data:`flashdreams.attention.backends.BACKENDS`, in the order of preference.

    Returns:
        The choice; ``tiled`` says that bits depend on the number of heads or rows.

    Raises:
        ValueError: no backend is accurate; the message has the table.
    """
    rows: list[MeasuredBackend] = []
    whole, right = "", ""
    for name in names:
        if whole:
            rows.append(MeasuredBackend(name, None, None, "not needed"))
            continue
        splits = kv_splits_of(name, shape, device, strict=True)
        backend = BACKENDS[name] if splits is None else bind_kv_splits(name, splits)
        row = check_backend(name, backend, shape, device, dtype)
        if row.verdict == "right":
            variance = find_variance(backend, shape, device, dtype)
            if variance is None and (splits or 1) > 1:  # cross-attention is not split
                variance = find_variance(bind_kv_splits(name, 1), shape, device, dtype)
            right = right or name
            whole = name if variance is None else ""
            row = replace(row, verdict=variance or "chosen")
        rows.append(row)
    chosen = whole or right
    splits = kv_splits_of(chosen, shape, device, strict=True)
    choice = BackendChoice(chosen, tuple(rows), splits, tiled=not whole)
    if not chosen:
        raise ValueError(f"No attention backend is accurate for {shape} here.\n{choice.table()}")
    return choice


@torch.no_grad()
def find_variance(
    backend: AttentionBackend, shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What else the bits of a query of one head depend on; None for an invariant backend.

    The backend is called at the whole shape and as other numbers of ranks would call it: with
    fewer heads, fewer queries, padded and permuted ones, over a full window, over one chunk and
    over a prompt. Libraries choose kernels by size, so small shapes would prove nothing.

    Args:
        backend: right at this shape.
        shape: self-attention of the whole model once the window is full.
        device: where it runs.
        dtype: of queries, keys and values.
    """
    q, keys, values = draw_inputs(shape, device, dtype)
    scale = shape.head_dim**-0.5
    for count in sorted({min(n, shape.keys) for n in (shape.keys, shape.queries, PROMPT_KEYS)}):
        k, v = keys[:, :count].contiguous(), values[:, :count].contiguous()
        whole = backend(q, k, v, scale=scale)
        for what, heads, places, padding in _shares(shape):
            places = places.to(device)
            share = pad_queries(q[:, places, heads], padding)
            pair = (x[:, :, heads].contiguous() for x in (k, v))
            found = backend(share, *pair, scale=scale)[:, : len(places)]
            if not same_bits(found, whole[:, places, heads]):
                return f"bits depend on {what}, with {count} keys"
    return None


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, num_splits: int = 1) -> Tensor:
    """Attention as over an fp8 cache, for unquantized inputs; see `fp8.attend`."""
    ones = q.new_ones((q.shape[0], q.shape[2]), dtype=torch.float32)
    return attend(
        quantize(q, ones),
        quantize(k, ones),
        quantize(v, ones),
        (ones, ones, ones),
        scale=scale,
        dtype=q.dtype,
        backend=BACKENDS["sdpa"],
        num_splits=num_splits,
    )


def check_fp8_invariance(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse strict runs over an fp8 cache if its attention depends on the ranks.

    Args:
        shape: as for `find_variance`.
        device: a GPU with FP8 attention.
        dtype: of the rest of the network.

    Raises:
        ValueError: says what its bits depend on.
    """
    splits = kv_splits_of("flash_attn_3", shape, device, strict=True) or 1
    variance = find_variance(partial(fp8_attention, num_splits=splits), shape, device, dtype)
    if variance is not None:
        raise ValueError(
            f"--parallel.strict True with precision='fp8': FP8 attention is not strict here, its "
            f"{variance}. Use precision='native'."
        )


def pad_queries(q: Tensor, count: int) -> Tensor:
    """Queries ``[B, L, N, D]``, contiguous, and ``count`` of zeros behind them."""
    return F.pad(q.contiguous(), (0, 0, 0, 0, 0, count))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits; zeros of two signs differ."""
    kind = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _shares(shape: AttentionShape) -> Iterator[tuple[str, slice, Tensor, int]]:
    """Description, heads, query indices and padding of the calls that some rank would make."""
    every, length, heads = slice(None), shape.queries, shape.num_heads
    places = torch.arange(length, dtype=torch.int64, device="cpu")
    yield "the call: two equal ones differ", every, places, 0
    for size in sorted({n for n in (1, heads // 3, heads // 2) if n and heads % n == 0}):
        what = f"the number of heads ({heads} and {size})"
        yield what, slice(heads - size, heads), places, 0
    half, third = -(-length // 2), length // 3
    for begin, end in ((0, half), (third, third + half), (length - 1, length)):
        yield f"the number of queries ({length} and {end - begin})", every, places[begin:end], 0
    yield "padding", every, places, PADDING
    yield "the order of queries", every, places.flip(0).roll(third), 0
