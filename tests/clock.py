"""Time that passes when a test says so."""

import threading
from types import ModuleType

import pytest

from flashdreams.parallel.watchdog import Watchdog


class Clock:
    """In the place of the module ``time``: stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        """Let ``module`` read this clock."""
        monkeypatch.setattr(module, "time", self)
        self.now_s = 1000.0
        self.reads = 0
        self._followers: list[tuple[Watchdog, _Rounds]] = []

    def monotonic(self) -> float:
        self.reads += 1
        return self.now_s

    time = perf_counter = monotonic

    def led(self, watchdog: Watchdog) -> Watchdog:
        """A watchdog of a single rank that looks at this clock all the time, not every period."""
        watchdog._stopped = rounds = _Rounds()
        self._followers.append((watchdog, rounds))
        return watchdog

    def move(self, seconds: float) -> None:
        """Let time pass, and every watchdog look at it or end its watch."""
        self.now_s += seconds
        for watchdog, rounds in self._followers:
            (watch,) = watchdog._threads
            rounds.forget()
            for _ in range(2):  # the first may have looked before the clock was moved
                while watch.is_alive() and not rounds.begun.acquire(timeout=0.01):
                    pass


class _Rounds(threading.Event):
    """The event that a watchdog waits for between two looks; counts the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.release()
        return super().wait(0.001)

    def forget(self) -> None:
        while self.begun.acquire(blocking=False):
            pass
