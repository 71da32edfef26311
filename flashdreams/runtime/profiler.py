"""Stage times of AR steps, measured without synchronizing the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

STAGES = ("encode", "diffuse", "decode", "finalize")
"""Stages that every record has a time for, in order; 0.0 where a stage did not run."""

_NO_TIMES = {**{f"{name}_ms": 0.0 for name in STAGES}, "total_ms": 0.0}

MAX_RECORDS = 1024
"""Records that a timer keeps; older ones are dropped, so that memory stays bounded."""


class StageTimer:
    """Times the stages of one rollout into one plain record per AR step.

    On a CPU a span is read from the clock. On CUDA it is a pair of events on the stream that is
    current when the span begins and ends; they are read at the beginning of a later step once they
    have passed, and :meth:`flush` waits for the rest. Until then they are missing from the
    record's figures.

    A record holds ``autoregressive_index``, ``<stage>_ms`` for :data:`STAGES` and any other stage
    timed, ``total_ms`` and what :meth:`note` added. ``total_ms`` is the span of the step itself
    plus the stages that ran after it (finalize), without what the caller did between them::

        with timer.step(0):
            with timer.stage("encode"):
                ...
        with timer.stage("finalize"):
            ...

    A stage outside a step belongs to the step last begun. `records` has the last
    :data:`MAX_RECORDS` steps.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.records: list[dict[str, Any]] = []
        self._clock = _CudaClock(self.device) if self.device.type == "cuda" else _HostClock()
        self._in_step = False

    def step(self, autoregressive_index: int) -> AbstractContextManager[None]:
        """A context for one AR step; it begins the record.

        Raises:
            ValueError: the last step has not ended.
        """
        if self._in_step:
            raise ValueError(
                f"AR step {autoregressive_index} begins while AR step "
                f"{self.records[-1]['autoregressive_index']} has not ended. "
                "Steps follow one another; a second rollout needs its own timer."
            )
        self._clock.collect(wait=False)
        record: dict[str, Any] = {"autoregressive_index": autoregressive_index, **_NO_TIMES}
        self.records.append(record)
        del self.records[:-MAX_RECORDS]
        return self._span(record, ("total_ms",), is_step=True)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context for one stage. A stage entered again in the same step adds to its time.

        Raises:
            ValueError: no step has begun.
        """
        if not self.records:
            raise ValueError(f"stage {name!r} is outside an AR step: enter timer.step(0).")
        keys = (f"{name}_ms",) if self._in_step else (f"{name}_ms", "total_ms")
        return self._span(self.records[-1], keys)

    @contextmanager
    def _span(
        self, record: dict[str, Any], keys: tuple[str, ...], is_step: bool = False
    ) -> Iterator[None]:
        """Add what the context takes to ``keys`` of a record."""
        self._in_step |= is_step
        begin = self._clock.mark()
        try:
            yield
        finally:
            self._in_step &= not is_step
            self._clock.span(record, keys, begin, self._clock.mark())

    def note(self, **values: Any) -> None:
        """Put further values into the record of the step last begun (frames, memory, ...)."""
        self.records[-1].update(values)

    def has_all_times(self, record: dict[str, Any]) -> bool:
        """Whether every stage that has been timed so far is in a record; never waits."""
        self._clock.collect(wait=False)
        return not self._clock.is_outstanding(record)

    def flush(self) -> list[dict[str, Any]]:
        """The records with all times; on CUDA this waits for the spans that have not passed."""
        self._clock.collect(wait=True)
        return self.records


class _HostClock:
    """Marks are seconds; a span is known at once."""

    def mark(self) -> Any:
        return time.perf_counter()

    def span(self, record: dict[str, Any], keys: tuple[str, ...], begin: Any, end: Any) -> None:
        for key in keys:
            record[key] = record.get(key, 0.0) + (end - begin) * 1e3

    def collect(self, *, wait: bool) -> None:
        """Nothing is ever outstanding."""

    def is_outstanding(self, record: dict[str, Any]) -> bool:
        """No span is."""
        return False


class _CudaClock:
    """Marks are events, reused once read; a span is known when its second event has passed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []
        self._outstanding: deque[tuple[dict[str, Any], tuple[str, ...], Any, Any]] = deque()

    def mark(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def span(self, record: dict[str, Any], keys: tuple[str, ...], begin: Any, end: Any) -> None:
        self._outstanding.append((record, keys, begin, end))

    def is_outstanding(self, record: dict[str, Any]) -> bool:
        return any(waiting is record for waiting, *_ in self._outstanding)

    def collect(self, *, wait: bool) -> None:
        while self._outstanding:
            record, keys, begin, end = self._outstanding[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            elapsed_ms = begin.elapsed_time(end)
            for key in keys:
                record[key] = record.get(key, 0.0) + elapsed_ms
            self._outstanding.popleft()
            self._free += (begin, end)
