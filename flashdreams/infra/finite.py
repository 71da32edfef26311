"""Whether the values of an AR step are finite: computed on the device, read later."""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashdreams.runtime.transfer import start_host_copy

MAX_NAMED = 5
"""Most weights that an error names."""


class NotFiniteError(FloatingPointError):
    """An AR step has produced NaN or infinite values; names step and stage."""


class FiniteCheck:
    """Checks the values of one rollout without making the host wait for the device.

    Each AR step queues one sum per tensor, which is not finite if any value is not, and one
    copy of all sums, which is read when a later step begins: the next one on a CPU; on a GPU the
    first one that finds it ready, at the latest the second. So the host need not wait for the
    decoder before it queues the next step. Several threads may read.
    """

    def __init__(self) -> None:
        self._failure: str | None = None
        self._waiting: deque[_Sums] = deque()
        self._lock = threading.RLock()

    def submit(self, autoregressive_index: int, stages: Mapping[str, Any]) -> None:
        """Queue a check of the values of an AR step.

        Args:
            autoregressive_index: number of the AR step.
            stages: the output of each stage, by its name in data-flow order: tensors of any
                shape, also in mappings, sequences and dataclasses.
        """
        names: list[str] = []
        totals: list[float | None] = []
        on_gpu: list[Tensor] = []
        for name, made in stages.items():
            for x in (made,) if type(made) is Tensor else tensors_in(made):
                if x.is_floating_point():
                    total = x.sum(dtype=torch.float32)
                    names.append(name)
                    totals.append(None if total.is_cuda else total.item())
                    if total.is_cuda:
                        on_gpu.append(total)
        copied = start_host_copy(torch.stack(on_gpu)) if on_gpu else None
        self._waiting.append(_Sums(autoregressive_index, names, totals, copied))

    @property
    def is_settled(self) -> bool:
        """Whether all sums have arrived and are finite, so none has to be read."""
        with self._lock:
            return self.read(wait=False) is None and not self._waiting

    def read(self, *, wait: bool = True) -> str | None:
        """What is wrong with the AR steps submitted so far; None if nothing is.

        Args:
            wait: for the last step; without it, for the one before alone, if that has not arrived.
        """
        with self._lock:
            while self._failure is None and self._waiting:
                oldest = self._waiting[0]
                if not (wait or len(self._waiting) > 1 or oldest.have_arrived):
                    break
                self._failure = self._waiting.popleft().failure()
            return self._failure


class _Sums(NamedTuple):
    """One sum per tensor of an AR step."""

    autoregressive_index: int
    stages: list[str]
    totals: list[float | None]
    """None for those that come from a GPU."""
    copied: tuple[Tensor, torch.cuda.Event] | None

    @property
    def have_arrived(self) -> bool:
        return self.copied is None or self.copied[1].query()

    def failure(self) -> str | None:
        """Waits until they have arrived."""
        arrived: Iterator[float] = iter(())
        if self.copied is not None:
            sums, event = self.copied
            event.synchronize()
            arrived = iter(sums.tolist())
        totals = [next(arrived) if total is None else total for total in self.totals]
        if math.isfinite(sum(totals)):
            return None
        bad = next(
            n for n, total in zip(self.stages, totals, strict=True) if not math.isfinite(total)
        )
        return (
            f"AR step {self.autoregressive_index}: stage {bad!r} made values that are not finite."
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, at any depth of mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, own.name) for own in fields(value)]
    for part in parts:
        yield from tensors_in(part)


def name_bad_weights(module: nn.Module) -> str:
    """One sentence on non-finite weights of a module; called once a run has failed."""
    bad = [
        name
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())
    ]
    if not bad:
        return "All weights are finite, so the cause is an input or the range of the dtype."
    more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return (
        f"The weights {', '.join(bad[:MAX_NAMED])}{more} contain NaN or infinity: "
        "download their file again, or use another one."
    )
