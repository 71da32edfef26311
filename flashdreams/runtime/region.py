"""Regions of tensors: which entries of a whole tensor a process holds, and how regions meet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Region = tuple[range, ...]
"""The entries of a tensor that a process holds: along each dim a start, a stop and a step."""


@dataclass(frozen=True)
class TensorPart:
    """A process's part of a tensor that may be cut over several."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    """Of the whole tensor, and of the part."""
    region: Region
    """The entries that are held here."""
    written: Region | None
    """The entries of these that this process writes to a file; None: others write them."""
    read: Callable[[], Tensor]
    """Gives the entries of ``region``; called when they are needed, so that memory holds one tensor
    at a time."""

    def read_written(self) -> Tensor:
        """The entries of ``written``, which is not None."""
        assert self.written is not None
        return select_region(self.read(), positions_in(self.region, self.written))


def whole_region(shape: Sequence[int]) -> Region:
    """All entries of a tensor of a shape."""
    return tuple(range(size) for size in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """Shape of the tensor that a region cuts out."""
    return tuple(len(entries) for entries in region)


def select_region(x: Tensor, region: Region) -> Tensor:
    """A view of the entries of a region; steps are at least 1."""
    return x[tuple(slice(r.start, r.stop, r.step) for r in region)]


def intersect(a: Region, b: Region) -> Region | None:
    """The entries that two regions of one tensor share; None if there are none."""
    shared = tuple(_intersect(x, y) for x, y in zip(a, b, strict=True))
    return shared if all(shared) else None


def positions_in(outer: Region, inner: Region) -> Region:
    """Where the entries of ``inner``, all of them in ``outer``, are in the tensor of ``outer``."""
    return tuple(_positions_in(x, y) for x, y in zip(outer, inner, strict=True))


def _intersect(a: range, b: range) -> range:
    late = a[max(0, -(-(b.start - a.start) // a.step)) :]
    first = next((entry for entry in late[: b.step] if entry in b), None)
    if first is None:
        return range(0)
    return range(first, min(a.stop, b.stop), math.lcm(a.step, b.step))


def _positions_in(outer: range, inner: range) -> range:
    if not inner:
        return range(0)
    start = outer.index(inner[0])
    step = max(1, inner.step // outer.step)
    return range(start, start + step * len(inner), step)
