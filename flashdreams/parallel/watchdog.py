"""A deadline for every stage, watched from the host, and the last report of each rank."""

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from flashdreams.parallel.environment import Environment
from flashdreams.runtime.termination import DEADLINE_EXIT_CODE, end_now
from flashdreams.runtime.text import say

STEP_DEADLINE_S = 60.0
"""Default limit of one stage of an AR step."""

EXIT_CODE = DEADLINE_EXIT_CODE
"""Exit code of a rank that its watchdog ended."""

_PERIOD_S = 0.25
_PEERS_S = 2.0
_AGAIN_S = 2.0
_LEAVE_S = 5.0


@dataclass(frozen=True)
class Heartbeat:
    """What a rank is doing."""

    rank: int
    stage: str
    autoregressive_index: int | None
    since: float
    """Unix time at which the stage began."""

    def describe(self, now: float) -> str:
        """One line for a person."""
        step = (
            "" if self.autoregressive_index is None else f" of AR step {self.autoregressive_index}"
        )
        return f"rank {self.rank}: {self.stage}{step}, for {now - self.since:.1f} s"


class StageGuard(Protocol):
    """Watches over one collective stage, such as a ``generate``."""

    def __call__(
        self, stage: str, autoregressive_index: int | None, limit_s: float | None = None, /
    ) -> AbstractContextManager[Any]:
        """The context of the stage; ``limit_s`` None: the limit of a stage of an AR step."""


def no_guard(*_: Any) -> AbstractContextManager[Any]:
    """The guard of a pipeline without a watchdog."""
    return nullcontext()


class Watchdog:
    """Ends this process when a stage outlives its deadline::

        with Watchdog(environment) as watchdog:
            with watchdog.stage("load", limit_s=LOAD_TIMEOUT_S):
                ...
            with watchdog.stage("generate", autoregressive_index=0):
                ...

    A thread watches the clock, so that it also sees a hang inside a replayed CUDA graph. Another
    publishes heartbeats to the ranks' store. Nothing is done per stage but noting the time. A hung
    process is ended without leaving its process group: that would wait for the others.
    """

    def __init__(
        self,
        environment: Environment,
        deadline_s: float = STEP_DEADLINE_S,
        end: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            environment: this rank, and the store for heartbeats if there is one.
            deadline_s: limit of a stage that names none.
            end: called with the report on expiry; None: print it and end the process.

        Raises:
            ValueError: a deadline that is not positive.
        """
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be positive, in seconds.")
        self.environment = environment
        self.deadline_s = deadline_s
        self._end = end or end_process
        self._beat = Heartbeat(environment.rank, "set-up", None, time.time())
        self._expires: float | None = None
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if environment.store is not None:
            publisher = threading.Thread(target=self._publish, name="heartbeat", daemon=True)
            self._threads.append(publisher)

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        # A failed run ends without leaving this context, and a thread that is stopped inside
        # the store's client aborts the process.
        atexit.register(self._stop)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=_PEERS_S)
        atexit.unregister(self._stop)

    @contextmanager
    def stage(
        self, name: str, autoregressive_index: int | None = None, limit_s: float | None = None
    ) -> Iterator[None]:
        """Watch a stage. Between stages no clock runs; a stage inside another has its own limit.

        Args:
            name: for the report.
            autoregressive_index: the AR step that it belongs to.
            limit_s: its deadline; None: the watchdog's own. Loading and warm-up want
                ``LOAD_TIMEOUT_S``.
        """
        rank, outer = self.environment.rank, (self._beat, self._expires)
        self._beat = Heartbeat(rank, name, autoregressive_index, time.time())
        self._expires = time.monotonic() + (limit_s or self.deadline_s)
        try:
            yield
        finally:
            beat, self._expires = outer
            after = Heartbeat(rank, f"after {name}", autoregressive_index, time.time())
            self._beat = after if self._expires is None else beat

    def report(self) -> str:
        """The last report of every rank, one line each, this one first."""
        now = time.time()
        lines = [self._beat.describe(now)]
        lines += [beat.describe(now) for beat in self._peers()]
        return "\n  ".join(lines)

    def _watch(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            expires, beat = self._expires, self._beat
            if expires is None or time.monotonic() < expires:
                continue
            self._expire(beat.describe(time.time()))
            return

    def _expire(self, own: str) -> None:
        say(f"flashdreams: deadline passed: {own}", beside=self.environment.rank > 0)
        atexit.unregister(self._stop)  # it would wait for this thread
        found: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the rank that holds the store may have ended
                found.append(self.report())

        # The store may hang with the rest of the run: do not wait for it indefinitely.
        reader = threading.Thread(target=ask, daemon=True)
        reader.start()
        reader.join(timeout=_PEERS_S)
        reports = found[0] if found else f"{own}\n  the other ranks' reports cannot be read"
        self._end(f"flashdreams: the ranks last reported:\n  {reports}")

    def _publish(self) -> None:
        store = self.environment.store
        published: Heartbeat | None = None
        again = 0.0
        while store is not None and not self._stopped.wait(_PERIOD_S):
            beat = self._beat
            if beat == published and time.monotonic() < again:
                continue
            try:
                store.set(_key(beat.rank), json.dumps(asdict(beat)))
            except RuntimeError:
                self._lose_store()
                return
            published, again = beat, time.monotonic() + _AGAIN_S

    def _lose_store(self) -> None:
        """The store has ended, and with it torchrun's agent or rank zero: also end this rank."""
        if not self._stopped.wait(_LEAVE_S):  # at the end of a run others may leave before this one
            rank = self.environment.rank
            say(f"flashdreams: rank {rank}: the ranks' store has gone; this rank ends", rank > 0)
            os.kill(os.getpid(), signal.SIGTERM)

    def _peers(self) -> list[Heartbeat]:
        store, beats = self.environment.store, []
        for rank in range(self.environment.world_size):
            key = _key(rank)
            if store is not None and rank != self.environment.rank and store.check([key]):
                beats.append(Heartbeat(**json.loads(store.get(key))))
        return beats


def end_process(report: str) -> None:
    """Print a report and end the process, whatever its main thread is doing."""
    say(report)
    end_now(EXIT_CODE)


def _key(rank: int) -> str:
    return f"rank{rank}"
