"""Logging of a rank."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from flashdreams.parallel.environment import Environment

log = logging.getLogger(__name__)

QUIET_S = 1.0
"""Start-up phases shorter than this are not announced."""


class JsonFormatter(logging.Formatter):
    """Log records as JSON objects, one per line."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """``{"time": ISO 8601 UTC, "level", "rank", "logger", "message"}``, one line."""
        fields = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "rank": self.rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(
    environment: Environment, level: int = logging.INFO, *, as_json: bool = False
) -> None:
    """Log from ``level`` up on rank zero and from warnings up on others, with the rank's number.

    The level is that of this package. Messages of other packages, plug-ins among them, appear from
    warnings up, also with the rank. A program that has configured logging keeps its format.
    """
    mark = f"[rank {environment.rank}] " if environment.world_size > 1 else ""
    handler = logging.StreamHandler()
    form = logging.Formatter(f"{mark}%(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(environment.rank) if as_json else form)
    logging.basicConfig(handlers=[handler])
    quiet = max(level, logging.WARNING)
    logging.getLogger("flashdreams").setLevel(level if environment.is_rank_zero else quiet)


@contextmanager
def announced(phase: str, environment: Environment) -> Iterator[None]:
    """Log on rank zero that a start-up phase is running, and its duration at the end.

    Args:
        phase: what is going on, such as ``"loading weights"``.
        environment: of this process.
    """

    def say() -> None:
        said.set()
        log.info("%s ...", phase)

    said, start = threading.Event(), time.monotonic()
    timer = threading.Timer(QUIET_S, say)
    timer.daemon = True
    if environment.is_rank_zero:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        log.info("%s: done in %.1f s", phase, time.monotonic() - start)
