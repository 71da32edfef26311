"""Two chunks side by side, for a network call that serves both."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashdreams.models.wan.state import WanCache
from flashdreams.runtime.cuda_graph import copy_in_place


def pair_up(first: WanCache, second: WanCache, stored: WanCache | None = None) -> WanCache:
    """A rollout's state as a pass over two chunks reads it.

    Rotations are those of one chunk after the other; everything else has every batch entry twice
    in a row, first for the one chunk and then for the other.

    Args:
        first: prepared for one chunk.
        second: the same rollout, prepared for the other.
        stored: an earlier result, whose tensors are written anew.

    Raises:
        ValueError: one of the two is not prepared.
    """
    if first.rope is None or second.rope is None or first.control is None:
        raise ValueError("A chunk can be paired once it is prepared; call begin_step first.")
    batch_size = len(first.cross_attention[0][0][0])
    rope, inputs = (None, [None] * 3) if stored is None else (stored.rope, _inputs(stored))
    condition, tokens, blocks = (
        interleave(*values, batch_size)
        for values in zip(inputs, _inputs(first), _inputs(second), strict=True)
    )
    return replace(
        first,
        rope=copy_in_place(rope, torch.cat([first.rope, second.rope])),
        chunk_condition=condition,
        control=replace(first.control, tokens=tokens, blocks=blocks),
        pair=None,
    )


def _inputs(cache: WanCache) -> list[Any]:
    tokens, blocks = (cache.control.tokens, cache.control.blocks) if cache.control else (None, None)
    return [cache.chunk_condition, tokens, blocks]


def interleave(stored: Any, first: Any, second: Any, batch_size: int) -> Any:
    """Values of two chunks as those of a batch of twice the size: entry 0 of each, entry 1, ...

    Args:
        stored: an earlier result, written anew; None allocates.
        first: a tensor ``[batch_size or 1, ...]``, None, or a list or tuple of these.
        second: like ``first``.
        batch_size: entries of each.

    Raises:
        TypeError: something else.
    """
    if first is None:
        return None
    if isinstance(first, Tensor):
        shape = (2 * batch_size, *first.shape[1:])
        fits = stored is not None and stored.shape == shape and stored.dtype == first.dtype
        both = stored if fits else first.new_empty(shape)
        both[0::2], both[1::2] = first, second
        return both
    if isinstance(first, list | tuple):
        places = [None] * len(first) if stored is None else stored
        return [
            interleave(*values, batch_size) for values in zip(places, first, second, strict=True)
        ]
    raise TypeError(
        f"fuse_clean_pass can put tensors of two chunks side by side, and lists of them, but not a "
        f"{type(first).__name__}; embed_control returned one."
    )
