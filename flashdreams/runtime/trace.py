"""A timeline of a run in Chrome's trace format, which ui.perfetto.dev opens."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashdreams.runtime.files import readable_write_errors, write_whole

Guard = Callable[..., AbstractContextManager[None]]
"""Watches a stage: called with its name, its AR step and its time limit."""

MAX_EVENTS = 200_000
"""Spans that one rank keeps; later ones are dropped and counted, so that memory stays bounded."""

TRACKS = ("stages", "collectives")
"""Rows of a rank in the timeline."""

FIRST_THREAD = 1000
"""``tid`` of the first row of rank zero, beyond all ranks: Perfetto takes equal numbers of threads,
also in different processes, and of a process and a thread, for the same thread."""

MAX_STEPS = 1024
"""AR steps whose times a rank keeps."""


class Tracer:
    """Spans of one rank, by the host's clock; on CUDA a span is what the host spent on it."""

    def __init__(self, rank: int, keep: bool) -> None:
        """Prepare.

        Args:
            rank: of this process.
            keep: keep every span; else only the durations of the last AR steps.
        """
        self.rank = rank
        self.keep = keep
        self.events: list[dict[str, Any]] = []
        self.dropped = 0
        """Spans beyond :data:`MAX_EVENTS`."""
        self.steps_ms: deque[float] = deque(maxlen=MAX_STEPS)
        """Milliseconds of the last calls of ``generate``."""

    @contextmanager
    def span(
        self, name: str, index: int | None, sent: Callable[[], dict[str, Any]]
    ) -> Iterator[None]:
        """Record what happens inside as one span.

        Args:
            name: of the stage.
            index: the AR step that it belongs to.
            sent: bytes and calls of every collective so far, by name.
        """
        before = sent() if self.keep else {}
        start_ns = time.time_ns()
        try:
            yield
        finally:
            duration_us = (time.time_ns() - start_ns) / 1e3
            if name == "generate":
                self.steps_ms.append(duration_us / 1e3)
            if self.keep:
                step = {} if index is None else {"autoregressive_index": index}
                args = {**step, **_since(before, sent())}
                self._append(name, "stage", start_ns / 1e3, duration_us, 0, args)

    def note_collective(self, name: str, bytes_sent: int, start_ns: int) -> None:
        """Record a collective that has just returned as a span beside the stages.

        Args:
            name: such as ``"ulysses.all_to_all"``.
            bytes_sent: by this rank.
            start_ns: ``time.time_ns()`` at its begin.
        """
        duration_us = (time.time_ns() - start_ns) / 1e3
        args = {"bytes_sent": bytes_sent}
        self._append(name, "collective", start_ns / 1e3, duration_us, 1, args)

    def _append(
        self, name: str, category: str, start_us: float, duration_us: float, track: int, args: Any
    ) -> None:
        if len(self.events) >= MAX_EVENTS:
            self.dropped += 1
            return
        event = {"name": name, "cat": category, "ph": "X", "ts": start_us, "dur": duration_us}
        place = {"pid": self.rank, "tid": thread_id(self.rank, track)}
        self.events.append({**event, **place, "args": args})


def traced(guard: Guard, tracer: Tracer, meter: Any) -> Guard:
    """A guard that also records the duration of each stage, and what it sent.

    If spans are recorded, each collective is one as well.

    Args:
        guard: watches the stages.
        tracer: takes the spans.
        meter: counts the collectives, as ``Mesh.meter`` does.
    """

    def sent() -> dict[str, Any]:
        return {name: asdict(traffic) for name, traffic in meter.counts.items()}

    if tracer.keep:
        meter.watch = tracer.note_collective

    @contextmanager
    def stage(name: str, index: int | None, limit_s: float | None = None, /) -> Iterator[None]:
        with tracer.span(name, index, sent), guard(name, index, limit_s):
            yield

    return stage


def thread_id(rank: int, track: int) -> int:
    """The ``tid`` of a row, which no other row of any rank has."""
    return FIRST_THREAD * (rank + 1) + track


def _since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Calls and bytes of collectives that are new."""
    return {
        name: {key: value - before.get(name, {}).get(key, 0) for key, value in counts.items()}
        for name, counts in after.items()
        if counts != before.get(name)
    }


def write_trace(path: Path, ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Write the spans of all ranks into one file, whole or not at all.

    Args:
        path: the file, ``.json``.
        ranks: spans of each rank.

    Raises:
        OSError: it cannot be written.
    """
    events = [event for spans in ranks for event in spans]
    begin = min((event["ts"] for event in events), default=0.0)
    named = [_name("process_name", rank, 0, f"rank {rank}") for rank in range(len(ranks))]
    named += [
        _name("thread_name", rank, track, name)
        for rank in range(len(ranks))
        for track, name in enumerate(TRACKS)
    ]
    shifted = [{**event, "ts": event["ts"] - begin} for event in events]
    with readable_write_errors(path), write_whole(path) as file:
        text = json.dumps({"traceEvents": [*named, *shifted], "displayTimeUnit": "ms"})
        file.write(text.encode())


def _name(kind: str, rank: int, track: int, name: str) -> dict[str, Any]:
    place = {"pid": rank, "tid": thread_id(rank, track)}
    return {"name": kind, "ph": "M", **place, "args": {"name": name}}


def slowest_rank(steps_ms: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median milliseconds of each rank's own work, and the rank with the largest.

    Args:
        steps_ms: of each rank, its AR steps.
    """
    medians = [sorted(steps)[len(steps) // 2] if steps else 0.0 for steps in steps_ms]
    slowest = max(range(len(medians)), key=lambda rank: medians[rank])
    return {"p50_ms_by_rank": medians, "slowest_rank": slowest}
