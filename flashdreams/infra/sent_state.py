"""The state of a rollout on its way from rank zero to the other ranks."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.snapshot_header import SnapshotError
from flashdreams.infra.state import FORMAT, RolloutState, tensors_of
from flashdreams.parallel.environment import broadcast_from_rank_zero, group_rank
from flashdreams.parallel.state_layout import BRANCHES
from flashdreams.runtime.region import Region, select_region, whole_region


def values_of(state: RolloutState | None) -> dict[str, Any]:
    """The values of what ``state_dict`` has returned; to be called on rank zero.

    Raises:
        ValueError: it is something else, or of another format.
        SnapshotError: it is damaged.
    """
    if state is None or not {"format", "values", "tensors"} <= set(state):
        raise ValueError(
            "Rank zero needs the state of a rollout: what cache.state_dict() returned there."
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"The state has format {state['format']}; this release reads format {FORMAT}."
        )
    values, tensors = state["values"], state["tensors"]
    for path, shape, dtype in _tensors_in(values):
        x = tensors.get(path)
        if not isinstance(x, Tensor) or (tuple(x.shape), x.dtype) != (shape, dtype):
            raise SnapshotError(
                f"The state is damaged: it has no tensor {path} {dtype} {list(shape)}."
            )
    return values


class SentTensors:
    """The tensors of rank zero's form, sent to all ranks in their order; each a collective call."""

    def __init__(self, state: RolloutState | None, values: Mapping[str, Any]) -> None:
        """Nothing is sent yet.

        Args:
            state: on rank zero the canonical form; elsewhere it is ignored.
            values: of it, the same on all ranks.
        """
        self._tensors = state["tensors"] if state is not None and group_rank() == 0 else {}
        self._rest = deque(_tensors_in(values))

    def take(self, path: str, shape: tuple[int, ...], region: Region, dtype: torch.dtype) -> Tensor:
        """This rank's part of the next tensor."""
        self._rest.popleft()
        whole = broadcast_from_rank_zero(self._tensors.get(path), shape, dtype)
        return select_region(whole, region)

    def drop_rest(self) -> None:
        """Send or receive what this rank no longer needs, since it has failed."""
        while self._rest:
            path, shape, dtype = self._rest[0]
            self.take(path, shape, whole_region(shape), dtype)


def _tensors_in(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """The tensors of a canonical form, in the order of `restore_context` and `fill_rollout`."""
    names = ("context", "negative_text", "latent", "history", "carried", *BRANCHES)
    for name in (*names, "encoder", "decoder", "controller"):
        yield from tensors_of(values.get(name), name)
