"""Forks of a rollout: several futures from one state."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.rollout import StreamInferencePipelineCache, encode_rollout
from flashdreams.infra.state import StateEncoder
from flashdreams.parallel.environment import least_of_all_ranks
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.parallel.state_layout import StateLayout
from flashdreams.runtime.stats import BYTES_PER_GIB, free_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForkReport:
    """What forking took."""

    forks: int
    bytes: int
    """Copied on this rank, for all forks together."""
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes / 2**30 / max(self.seconds, 1e-9)
        return (
            f"{self.forks} forks: {self.bytes / 2**20:.1f} MiB in {self.seconds * 1e3:.1f} ms "
            f"({rate:.1f} GiB/s)"
        )


def copied_bytes(
    cache: StreamInferencePipelineCache,
    layout: StateLayout,
    device: torch.device,
    plan: ParallelPlan | None,
) -> int:
    """Bytes that a clone of a rollout takes on this rank: what is written in place, not prompts.

    Args:
        cache: between AR steps.
        layout: how ranks hold the state.
        device: where the pipeline runs.
        plan: of the transformer.

    Raises:
        StateError: state of a component that does not declare how it is held.
    """
    sizes: list[int] = []

    def note(path: str, x: Tensor) -> None:
        sizes.append(x.nbytes)

    encoder = StateEncoder(layout, device, note, in_process=True)
    values = encode_rollout(cache, encoder, lambda branch: replace(encoder), plan)
    return sum(sizes) + sum(found.nbytes for found in _caches(values))


def require_room(count: int, each: int, device: torch.device) -> None:
    """Refuse forks for which there is no memory, on any rank; a collective call.

    Args:
        count: forks that are asked for.
        each: bytes of one of them on this rank.
        device: that shall hold them.

    Raises:
        ValueError: it says how many fit.
    """
    free = free_bytes(device)
    fits = least_of_all_ranks(count if free is None else free // max(each, 1))
    if fits < count:
        room = "" if free is None else f", {free / BYTES_PER_GIB:.2f} GiB are free on {device}"
        raise ValueError(
            f"{count} forks take {each / BYTES_PER_GIB:.2f} GiB each{room}: {fits} fit. Fork fewer "
            "at a time, or save the rollout with pipeline.save and resume it for each branch."
        )


def timed_forks(
    cache: StreamInferencePipelineCache, count: int, each: int, device: torch.device
) -> tuple[list[StreamInferencePipelineCache], ForkReport]:
    """Clone a rollout several times, and say what that took."""
    _wait_for(device)
    start = time.perf_counter()
    forks = [cache.clone() for _ in range(count)]
    _wait_for(device)
    report = ForkReport(count, count * each, time.perf_counter() - start)
    logger.info("%s", report)
    return forks, report


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _caches(value: Any) -> Iterator[Any]:
    """The KV caches in the values of an encoder with ``in_process``."""
    if isinstance(value, dict):
        if value.get("kind") == "live_cache":
            yield value["cache"]
        for part in value.values():
            yield from _caches(part)
    elif isinstance(value, list):
        for part in value:
            yield from _caches(part)
