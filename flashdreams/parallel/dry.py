"""A mesh without processes, to count the work of one rank on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.mesh import Axis, Mesh, ParallelConfig, ParallelDegrees


@dataclass(frozen=True)
class DryGroup:
    """The interface of a process group: its size, and this rank's index."""

    ranks: int
    place: int = 0

    def size(self) -> int:
        """Number of ranks."""
        return self.ranks

    def rank(self) -> int:
        """Place of this rank."""
        return self.place


@dataclass(frozen=True)
class DryChannel(Channel):
    """Collectives that count what they would send and return tensors of the right shapes."""

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """See `Channel.all_gather`."""
        shape = list(x.shape)
        shape[dim] *= self.size
        with self._call("all_gather", x):
            return x.new_empty(shape)

    def all_to_all(self, x: Tensor) -> Tensor:
        """See `Channel.all_to_all`."""
        with self._call("all_to_all", x):
            return x.new_empty(x.shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Channel.all_reduce`."""
        with self._call("all_reduce", x):
            return x

    def start_rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """See `Channel.start_rotate`."""
        with self._call("rotate", x):
            return lambda: x.new_empty(x.shape)

    def exchange_edges(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See `Channel.exchange_edges`."""
        before = right.new_empty(right.shape) if self.rank > 0 else None
        after = left.new_empty(left.shape) if self.rank < self.size - 1 else None
        with self._count_halo(left):
            return before, after


@dataclass(frozen=True)
class DryMesh(Mesh):
    """Rank zero of a mesh without processes."""

    def channel(self, axis: Axis) -> Channel:
        """The channel that counts."""
        if axis.group is None:
            raise ValueError(f"Axis {axis.name!r} has a single rank, so it has no channel.")
        return DryChannel(axis.name, axis.group, self.meter)


def dry_mesh(degrees: ParallelDegrees, config: ParallelConfig) -> DryMesh:
    """Rank zero of a mesh, without a process group.

    Args:
        degrees: of the mesh.
        config: strategy and strictness.
    """
    d = degrees
    sizes = {"cfg": d.cfg, "ring": d.ring, "ulysses": d.ulysses, "tp": d.tp}
    sizes |= {"sequence": d.sequence, "decode": d.world_size}
    axes: dict[str, Any] = {name: _axis(name, size) for name, size in sizes.items()}
    return DryMesh(degrees=degrees, config=config, device_type="meta", **axes)


def _axis(name: str, size: int) -> Axis:
    group: Any = DryGroup(size) if size > 1 else None
    return Axis(name, size, 0, group)
