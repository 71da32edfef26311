"""Forks of a rollout: several continuations of one state."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from flashdreams.infra.rollout import (
    Parts,
    StreamInferencePipelineCache,
    encode_rollout,
    fill_rollout,
)
from flashdreams.infra.state import StateDecoder, StateEncoder
from flashdreams.parallel.environment import least_of_all_ranks
from flashdreams.parallel.state_layout import StateLayout
from flashdreams.runtime.region import TensorPart
from flashdreams.runtime.stats import BYTES_PER_GIB, free_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")


def copied_bytes(cache: StreamInferencePipelineCache, layout: StateLayout) -> int:
    """Bytes of a clone of a rollout on this rank: state that is written in place, without prompts.

    Args:
        cache: between AR steps.
        layout: how ranks hold the state.

    Raises:
        StateError: state of a component that does not declare how it is held.
    """
    sizes: list[int] = []

    def note(path: str, part: TensorPart) -> None:
        sizes.append(part.read().nbytes)

    values = encode_rollout(cache, StateEncoder(layout, note, in_process=True))
    return sum(sizes) + sum(found.nbytes for found in _caches(values))


def require_room(count: int, each: int, device: torch.device) -> None:
    """Refuse forks that do not fit in memory on some rank; a collective call.

    Args:
        count: requested forks.
        each: bytes of one of them on this rank.
        device: that will hold them.

    Raises:
        ValueError: states how many fit.
    """
    free = free_bytes(device)
    fits = least_of_all_ranks(count if free is None else free // max(each, 1))
    if fits < count:
        room = "" if free is None else f", {free / BYTES_PER_GIB:.2f} GiB are free on {device}"
        raise ValueError(
            f"{count} forks take {each / BYTES_PER_GIB:.2f} GiB each{room}: {fits} fit. Fork fewer "
            "at a time, or save the rollout with pipeline.save and resume it for each branch."
        )


def timed_forks(make: Callable[[], T], count: int, each: int, device: torch.device) -> T:
    """Make forks, and log time and size.

    Args:
        make: returns them.
        count: how many they are.
        each: bytes of one of them.
        device: that holds them.
    """
    _wait_for(device)
    start = time.perf_counter()
    forks = make()
    _wait_for(device)
    seconds, copied = time.perf_counter() - start, count * each
    rate = copied / BYTES_PER_GIB / max(seconds, 1e-9)
    figures = (count, "" if count == 1 else "s", copied / 2**20, seconds * 1e3, rate)
    logger.info("%d fork%s: %.1f MiB in %.1f ms (%.1f GiB/s)", *figures)
    return forks


def copy_rollout(
    source: StreamInferencePipelineCache, into: StreamInferencePipelineCache, layout: StateLayout
) -> None:
    """Copy a running rollout into fresh state, on the device and without collectives.

    Args:
        source: between AR steps.
        into: fresh, under the same context.
        layout: how ranks hold it.

    Raises:
        StateError: state of a component that does not declare how it is held.
    """
    if source.controller is not None:
        into.controller = copy.deepcopy(source.controller)
    fill_rollout(into, *live_state(source, layout))


def live_state(
    source: StreamInferencePipelineCache, layout: StateLayout
) -> tuple[dict[str, Any], StateDecoder]:
    """The values of a running rollout, and a reader of its tensors; arguments as above.

    KV caches are included as values.
    """
    parts: Parts = {}
    values = encode_rollout(source, StateEncoder(layout, parts.__setitem__, in_process=True))
    return values, StateDecoder(layout, lambda path, *_: parts[path].read(), in_process=True)


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
