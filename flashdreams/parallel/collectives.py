"""Collectives of a group of ranks, and a meter of their bytes.

Gloo accepts GPU tensors only in some collectives: over a gloo group they are staged through
the host. That is slow and cannot be captured in a graph; it lets several ranks share one GPU, which
NCCL refuses.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renames all_gather_into_tensor; drop the second name once 2.12 is out of range.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def needs_host(device: torch.device, group: ProcessGroup) -> bool:
    """Whether tensors of a device are staged through the host: GPU tensors over gloo."""
    if device.type == "cpu":
        return False
    return _backends_of(dist.get_backend_config(group)).get(device.type) == "gloo"


@lru_cache(maxsize=16)
def _backends_of(config: str) -> dict[str, str]:
    """Device type -> backend, of a text such as ``cpu:gloo,cuda:nccl``; cached."""
    pairs = (pair.partition(":") for pair in config.split(","))
    return {kind: backend for kind, _, backend in pairs}


def _to_wire(x: Tensor, group: ProcessGroup) -> Tensor:
    """The tensor passed to the group for ``x``: itself, or a host copy."""
    return x.cpu() if needs_host(x.device, group) else x


def _plain(x: Tensor) -> Tensor:
    """The same storage in a dtype that all backends support: 8-bit floats as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def sent_bytes(collective: str, nbytes: int, size: int) -> int:
    """Bytes that one rank sends in one call, by the usual algorithm of that collective.

    Args:
        collective: ``"all_gather"``, ``"all_to_all"``, ``"all_reduce"`` or ``"rotate"``.
        nbytes: bytes of this rank's input tensor.
        size: number of ranks.

    Source: ring algorithms, Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.
    """
    others = size - 1
    times, parts = {
        "all_gather": (others, 1),
        "all_to_all": (others, size),
        "all_reduce": (2 * others, size),
        "rotate": (1, 1),
    }[collective]
    return nbytes * times // parts


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective and the bytes that this rank sent in them."""

    calls: int = 0
    bytes_sent: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls + other.calls, self.bytes_sent + other.bytes_sent)

    def __sub__(self, other: "Traffic") -> "Traffic":
        return self + other * -1

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(times * self.calls, times * self.bytes_sent)


@dataclass
class TrafficMeter:
    """What this rank sent, by name of the collective; counted on the host as calls are issued.

    A replayed CUDA graph issues no calls: whoever captures takes ``since(snapshot)`` of the capture
    and hands it to ``add_all`` at every replay. ``rewind`` drops the counts of warm-up.
    """

    counts: dict[str, Traffic] = field(default_factory=dict)
    """Name such as ``"ulysses.all_to_all"`` -> its traffic since the meter was made."""
    watch: Callable[[str, int, int], None] | None = field(default=None, repr=False, compare=False)
    """Called after each call with its name, bytes sent and its start ``time.time_ns``."""

    def add(self, name: str, bytes_sent: int) -> None:
        """Count one call."""
        self.counts[name] = self.counts.get(name, Traffic()) + Traffic(1, bytes_sent)

    @contextmanager
    def call(self, name: str, bytes_sent: int) -> Iterator[None]:
        """Count the enclosed call, and report it to ``watch``."""
        self.add(name, bytes_sent)
        with self.watched(name, bytes_sent):
            yield

    @contextmanager
    def watched(self, name: str, bytes_sent: int = 0) -> Iterator[None]:
        """Report the enclosed call to ``watch`` without counting it."""
        watch = self.watch
        start_ns = 0 if watch is None else time.time_ns()
        yield
        if watch is not None:
            watch(name, bytes_sent, start_ns)

    def add_all(self, counts: Mapping[str, Traffic]) -> None:
        """Count many calls at once."""
        for name, traffic in counts.items():
            self.counts[name] = self.counts.get(name, Traffic()) + traffic

    def snapshot(self) -> dict[str, Traffic]:
        """The counts as they are now."""
        return dict(self.counts)

    def rewind(self, snapshot: Mapping[str, Traffic]) -> None:
        """Drop the counts after a snapshot."""
        self.counts = dict(snapshot)

    def since(self, snapshot: Mapping[str, Traffic]) -> dict[str, Traffic]:
        """What was counted after a snapshot; names without new calls are left out."""
        new = {n: t - snapshot.get(n, Traffic()) for n, t in self.counts.items()}
        return {name: traffic for name, traffic in new.items() if traffic.calls}


@dataclass(frozen=True)
class Channel:
    """A group under a name, with the meter that counts what is sent over it."""

    name: str
    group: ProcessGroup
    meter: TrafficMeter

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Join the slices of all ranks along ``dim``, in the order of the group.

        Args:
            x: any shape; this rank's slice, the same shape and dtype on every rank.
            dim: dim along which the slices follow one another.

        Returns:
            ``x``'s shape with ``dim`` multiplied by the number of ranks.
        """
        with self._call("all_gather", x):
            sent = _plain(_to_wire(x.contiguous(), self.group))
            received = sent.new_empty((self.size * x.shape[0], *x.shape[1:]))
            _all_gather_single(received, sent, group=self.group)
            gathered = received.to(x.device).view(x.dtype)
            if dim == 0:
                return gathered
            return gathered.unflatten(0, (self.size, -1)).movedim(0, dim).flatten(dim, dim + 1)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send slice ``p`` of the first dim to rank ``p`` and receive one slice from each rank.

        Args:
            x: ``[P, ...]``, contiguous, for P ranks.

        Returns:
            ``[P, ...]``; slice ``p`` came from rank ``p``.
        """
        with self._call("all_to_all", x):
            sent = _plain(_to_wire(x, self.group))
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)
            return received.to(x.device).view(x.dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks.

        Args:
            x: any shape, the same on every rank; overwritten.

        Returns:
            Shaped like ``x``, the same values on every rank.
        """
        with self._call("all_reduce", x):
            summed = _to_wire(x, self.group)
            dist.all_reduce(summed, group=self.group)
            return summed.to(x.device)

    def start_rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """Start sending ``x`` to the next rank of a ring; the result waits for the previous rank's.

        Args:
            x: any shape, contiguous; the same shape and dtype on every rank; not to be written to
                before the result was called.
        """
        with self._call("rotate", x):
            sent = _to_wire(x, self.group)
            received = torch.empty_like(sent)
            operations = [
                dist.P2POp(dist.isend, sent, self._peer(self.rank + 1), self.group),
                dist.P2POp(dist.irecv, received, self._peer(self.rank - 1), self.group),
            ]
            pending = dist.batch_isend_irecv(operations)

        def finish() -> Tensor:
            with self.meter.watched(f"{self.name}.rotate (wait)"):
                for work in pending:
                    work.wait()
                operations.clear()  # they keep the sent tensor alive until here
                return received.to(x.device)

        return finish

    def exchange_edges(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Give ``left`` to the previous rank and ``right`` to the next one.

        Args:
            left: this rank's left edge, any shape, contiguous.
            right: this rank's right edge, like ``left``.

        Returns:
            The previous rank's right edge and the next rank's left edge; None where there is no
            such rank.
        """
        operations = []
        received: list[Tensor | None] = [None, None]
        with self._count_halo(left):
            for side, (edge, peer) in enumerate(((left, self.rank - 1), (right, self.rank + 1))):
                if 0 <= peer < self.size:
                    sent = _to_wire(edge, self.group)
                    received[side] = incoming = torch.empty_like(sent)
                    for way, tensor in ((dist.isend, sent), (dist.irecv, incoming)):
                        operations.append(dist.P2POp(way, tensor, self._peer(peer), self.group))
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
            before, after = (x if x is None else x.to(left.device) for x in received)
            return before, after

    def _peer(self, place: int) -> int:
        """Rank in the default group of a place in this one, counted around."""
        return dist.get_global_rank(self.group, place % self.size)

    def _call(self, collective: str, x: Tensor) -> AbstractContextManager[None]:
        sent = sent_bytes(collective, x.numel() * x.element_size(), self.size)
        return self.meter.call(f"{self.name}.{collective}", sent)

    def _count_halo(self, edge: Tensor) -> AbstractContextManager[None]:
        neighbours = (self.rank > 0) + (self.rank < self.size - 1)
        sent = neighbours * edge.numel() * edge.element_size()
        return self.meter.call(f"{self.name}.halo", sent)
