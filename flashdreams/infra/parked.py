"""Rollouts parked in host memory, to free the device for others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams.runtime.region import (
    Region,
    TensorPart,
    intersect,
    positions_in,
    region_shape,
    select_region,
)


@dataclass(frozen=True)
class ParkedRollout:
    """A rollout in host memory: this rank's part of every tensor.

    Made by ``pipeline.park``; ``pipeline.unpark`` takes it back on the same ranks.
    """

    values: Mapping[str, Any]
    """The state's values, as `flashdreams.infra.state.StateEncoder` gives them."""
    parts: Mapping[str, tuple[Region, Tensor]]
    """By path: the region that is held, and its values; pinned if there is a GPU."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory on this rank."""
        return sum(x.nbytes for _, x in self.parts.values())

    def take(self, path: str, shape: tuple[int, ...], region: Region, dtype: torch.dtype) -> Tensor:
        """The entries of a region of a tensor, on the CPU; arguments as for `TakePart`.

        Raises:
            ValueError: this rank has not parked them.
        """
        held, x = self.parts[path]
        if held == region and x.dtype == dtype:
            return x
        shared = intersect(held, region)
        if shared is None or region_shape(shared) != region_shape(region) or x.dtype != dtype:
            raise ValueError(f"{path}: this rank has parked another part of {list(shape)} {dtype}.")
        return select_region(x, positions_in(held, region))


def park_parts(
    values: Mapping[str, Any], parts: Mapping[str, TensorPart], device: torch.device
) -> ParkedRollout:
    """Copy this rank's parts of a rollout's tensors to host memory, one tensor at a time.

    Args:
        values: of the state.
        parts: of its tensors.
        device: where the pipeline runs. With CUDA the copies are pinned and queued; all have
            arrived when this returns.
    """
    pinned = device.type == "cuda"
    copies: dict[str, tuple[Region, Tensor]] = {}
    for path, part in parts.items():
        x = part.read()
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned and x.is_cuda)
        copies[path] = (part.region, copy.copy_(x, non_blocking=True))
    if pinned:
        torch.cuda.current_stream(device).synchronize()
    return ParkedRollout(values, copies)
