"""Whether the values of an AR step are finite: computed on the device, read one step late."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.runtime.transfer import start_host_copy

MAX_NAMED = 5
"""Weights that an error names."""


class NotFiniteError(FloatingPointError):
    """An AR step has made NaN or infinite values; says which step and stage."""


class FiniteCheck:
    """Looks at the values of one rollout without making the host wait for the device.

    Each AR step queues one sum per tensor, which is not finite if it meets NaN or infinity, and one
    copy of all sums; they are read when the next step begins, when they have long arrived. On a CPU
    they are there at once.
    """

    def __init__(self) -> None:
        self._index = 0
        self._stages: list[str] = []
        self._totals: list[float | None] = []
        self._sums: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def submit(self, autoregressive_index: int, stages: Mapping[str, Any]) -> None:
        """Have the values of an AR step looked at.

        Args:
            autoregressive_index: number of the AR step.
            stages: what each stage made, by its name in the order of the data: tensors of any
                shape, also in mappings, sequences and dataclasses.
        """
        self._index, self._stages = autoregressive_index, []
        self._totals, self._sums, self._arrived = [], None, None
        on_gpu: list[Tensor] = []
        for name, made in stages.items():
            for x in (made,) if type(made) is Tensor else tensors_in(made):
                if x.is_floating_point():
                    total = x.sum(dtype=torch.float32)
                    self._stages.append(name)
                    self._totals.append(None if total.is_cuda else total.item())
                    if total.is_cuda:
                        on_gpu.append(total)
        if on_gpu:
            self._sums, self._arrived = start_host_copy(torch.stack(on_gpu))

    @property
    def is_settled(self) -> bool:
        """Whether the sums have arrived and all is finite, so that nobody needs to read them."""
        if self._arrived is not None and not self._arrived.query():
            return False
        return all(map(math.isfinite, self._arrived_totals()))

    def _arrived_totals(self) -> list[float]:
        arrived = iter([] if self._sums is None else self._sums.tolist())
        return [next(arrived) if total is None else total for total in self._totals]

    def read(self) -> str | None:
        """What is wrong with the AR step submitted last; None if nothing is. May wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self.is_settled:
            return None
        for name, total in zip(self._stages, self._arrived_totals(), strict=True):
            if not math.isfinite(total):
                return f"AR step {self._index}: stage {name!r} made values that are not finite."
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a value, at any depth of mappings, sequences, dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for own in fields(value):
            yield from tensors_in(getattr(value, own.name))


def name_bad_weights(module: nn.Module) -> str:
    """One sentence on the weights of a module that are not finite; asked once a run has failed."""
    bad = [
        name
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())
    ]
    if not bad:
        return "All weights are finite, so it comes from an input or from a number type too narrow."
    more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return (
        f"The weights {', '.join(bad[:MAX_NAMED])}{more} hold NaN or infinity: "
        "fetch their file again, or name another one."
    )
