"""Stages of a pipeline as spans of a timeline."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flashdreams.parallel.mesh import Mesh
from flashdreams.parallel.watchdog import StageGuard
from flashdreams.runtime.trace import Tracer


def traced(guard: StageGuard, tracer: Tracer, mesh: Mesh) -> StageGuard:
    """A guard that also records the duration of each stage, and what it sent.

    If spans are recorded, each collective is one as well.

    Args:
        guard: watches the stages.
        tracer: takes the spans.
        mesh: whose collectives are counted.
    """

    def sent() -> dict[str, Any]:
        return {name: asdict(traffic) for name, traffic in mesh.meter.counts.items()}

    if tracer.keep:
        mesh.meter.watch = tracer.note_collective

    @contextlib.contextmanager
    def stage(name: str, index: int | None, limit_s: float | None = None, /) -> Iterator[None]:
        with tracer.span(name, index, sent), guard(name, index, limit_s):
            yield

    return stage
