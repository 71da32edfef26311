"""Forks of a rollout: several continuations of one state, in turn or as one batch."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashdreams.infra.rollout import (
    Parts,
    StreamInferencePipelineCache,
    encode_rollout,
    fill_rollout,
)
from flashdreams.infra.state import StateDecoder, StateEncoder
from flashdreams.parallel.environment import least_of_all_ranks, together
from flashdreams.parallel.state_layout import StateLayout
from flashdreams.runtime.noise import NoiseFunction
from flashdreams.runtime.region import TensorPart
from flashdreams.runtime.stats import BYTES_PER_GIB, free_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

Change = Callable[[str, Tensor], Tensor]
"""Maps name and tensor ``[B, ...]`` to a tensor for another batch size."""


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
        OSError: the free memory cannot be read.
        OtherRankError: the same on another rank.
    """
    free = together(lambda: free_bytes(device), "cannot tell its free memory")
    fits = least_of_all_ranks(free // max(each, 1))
    if fits < count:
        raise ValueError(
            f"{count} forks take {each / BYTES_PER_GIB:.2f} GiB each, {free / BYTES_PER_GIB:.2f} "
            f"GiB are free on {device}: {fits} fit. Fork fewer at a time, or save the rollout with "
            "pipeline.save and resume it for each branch."
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


def live_state(
    source: StreamInferencePipelineCache, layout: StateLayout
) -> tuple[dict[str, Any], StateDecoder]:
    """The values of a running rollout, KV caches included, and a reader of its tensors.

    Args:
        source: between AR steps.
        layout: how ranks hold the state.

    Raises:
        StateError: state of a component that does not declare how it is held.
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


@dataclass(frozen=True)
class ForkNoise:
    """The noise of one rollout, the same for each of its forks in a batch."""

    source: NoiseFunction
    forks: int

    def __call__(
        self, autoregressive_index: int, denoising_step: int, shape: Sequence[int]
    ) -> Tensor:
        """See `flashdreams.runtime.noise.NoiseSource`."""
        one = (shape[0] // self.forks, *shape[1:])
        drawn = self.source(autoregressive_index, denoising_step, one)
        return drawn.expand(self.forks, *drawn.shape).flatten(0, 1)


def repeated(batch_size: int, forks: int) -> Change:
    """Repeats what has ``batch_size`` entries for each of the forks."""

    def change(name: str, x: Tensor) -> Tensor:
        if x.ndim > 0 and x.shape[0] == 1:  # one control for the whole batch
            x = x.expand(batch_size, *x.shape[1:])
        if x.ndim == 0 or x.shape[0] != batch_size:
            raise ValueError(
                f"{name} {list(x.shape)} does not have the batch ({batch_size}) as its first dim, "
                "so this method cannot run a batch of forks. Run them in turn: cache.fork(n)."
            )
        return x.expand(forks, *x.shape).flatten(0, 1)

    return change


def rows_of(batch: StreamInferencePipelineCache, index: int) -> slice:
    """The batch entries of a fork.

    Raises:
        ValueError: no such fork, or the rollout is not a batch of forks.
    """
    if batch.forks is None:
        raise ValueError("This rollout is not a batch of forks; cache.fork_batch(n) makes one.")
    if not 0 <= index < batch.forks:
        raise ValueError(f"pick({index}): the batch has the forks 0 to {batch.forks - 1}.")
    size = batch.diffusion.batch_size // batch.forks
    return slice(index * size, (index + 1) * size)


def changed_context(context: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """A rollout's context for another number of batch entries.

    Tensors, also those in mappings and sequences, have the batch as their first dim; other values
    are shared.

    Args:
        context: by name, without ``batch_size``.
        change: of each tensor.
    """

    def of(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        if isinstance(value, Mapping):
            return {key: of(f"{name}/{key}", x) for key, x in value.items()}
        if type(value) in (list, tuple):
            return type(value)(of(f"{name}/{i}", x) for i, x in enumerate(value))
        return value

    return {name: of(name, value) for name, value in context.items()}


def fill_batch(
    source: StreamInferencePipelineCache,
    batch: StreamInferencePipelineCache,
    encoders: Sequence[Any],
    layout: StateLayout,
) -> None:
    """Copy a running rollout into a fresh batch, on the device and without collectives.

    Args:
        source: between AR steps.
        batch: fresh, under the repeated context.
        encoders: fresh state of the encoder, for each fork.
        layout: how ranks hold the state.

    Raises:
        ValueError: state without a batch dim.
        StateError: state of a component that does not declare how it is held.
    """
    values, whole = live_state(source, layout)
    change = repeated(source.diffusion.batch_size, len(encoders))
    many = replace(whole, take=lambda path, *at: change(path, whole.take(path, *at)))
    fill_rollout(batch, values | {"encoder": None, "controller": None}, many)
    batch.encoder = [whole.restore(values["encoder"], "encoder", fresh) for fresh in encoders]
    batch.controller = [copy.deepcopy(source.controller) for _ in encoders]
    batch.forks = len(encoders)


def fill_pick(
    batch: StreamInferencePipelineCache,
    index: int,
    rows: slice,
    into: StreamInferencePipelineCache,
    layout: StateLayout,
) -> None:
    """Bring a fresh rollout to where one fork of a batch is.

    Args:
        batch: between AR steps.
        index: of the fork.
        rows: its batch entries.
        into: fresh, under its part of the context.
        layout: how ranks hold the state.
    """
    values, whole = live_state(batch, layout)
    one = replace(whole, take=lambda *at: whole.take(*at)[rows], rows=rows)
    encoder, fresh = values["encoder"]["items"][index], into.encoder
    fill_rollout(into, values | {"encoder": None, "controller": None}, one)
    into.encoder = whole.restore(encoder, f"encoder/{index}", fresh)
    into.controller = copy.deepcopy(batch.controller[index])


def encode_each(
    encode: Callable[[Any, Any], Any], inputs: Any, batch: StreamInferencePipelineCache
) -> Any:
    """Encode the control input of each fork with the encoder state of that fork, as one batch.

    Args:
        encode: from control input and encoder state to the control.
        inputs: one per fork.
        batch: of forks.

    Raises:
        ValueError: a wrong number of inputs, or controls that cannot be batched.
    """
    forks = len(batch.encoder)
    if not isinstance(inputs, Sequence) or len(inputs) != forks:
        got = len(inputs) if isinstance(inputs, Sequence) else type(inputs).__name__
        raise ValueError(f"A batch of {forks} forks takes a list of {forks} inputs; got {got}.")
    controls = [encode(x, own) for x, own in zip(inputs, batch.encoder, strict=True)]
    return _joined(controls, batch.diffusion.batch_size // forks)


def _joined(controls: Sequence[Any], batch_size: int) -> Any:
    """Controls ``[B or 1, ...]`` of the forks, one after the other."""
    first = controls[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _joined([x[name] for x in controls], batch_size) for name in first}
    if not isinstance(first, Tensor) or first.ndim == 0 or first.shape[0] not in (1, batch_size):
        got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"The control of a fork must be a tensor [{batch_size} or 1, ...] to go into a batch; "
            f"got {got}. Run the forks in turn: cache.fork(n)."
        )
    return torch.cat([x.expand(batch_size, *x.shape[1:]) for x in controls])
