"""Which rank died of what: seen by its neighbours at once, and said before what follows from it."""

import contextlib
import os
import select
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from flashdreams.parallel.environment import Environment, OtherRankError
from flashdreams.runtime.text import say

_KEY = "died"
_PERIOD_MS = 250
_NEWS_S = 2.0
_CONSEQUENCES = ("gloo", "nccl", "connection", "broken pipe", "socket", "store", "peer")
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class PeerWatch:
    """Watches the ranks of this node, so that a killed one is named instead of an address.

    The collectives of the other ranks fail at the same moment, with an error of their own that
    knows nothing but an address. The lowest rank that is left on the node says who died; the error
    of a rank goes through `explain` before it is reported. Linux only; elsewhere nothing is known.
    """

    def __init__(self, environment: Environment) -> None:
        """Prepare.

        Args:
            environment: this rank, with the processes of its neighbours.
        """
        self.environment = environment
        self.died: dict[int, str] = {}
        """What is known of ranks of this node that are gone."""
        self._stopped = threading.Event()
        self._files: dict[int, int] = {}
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> "PeerWatch":
        if hasattr(os, "pidfd_open"):
            for rank, pid in self.environment.local_pids.items():
                with contextlib.suppress(OSError):  # not allowed here, or gone already
                    if rank != self.environment.rank:
                        self._files[os.pidfd_open(pid)] = rank
        if self._files:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()

    def explain(self, error: BaseException) -> BaseException:
        """The error to report: that a rank has died, where the given one only follows from it."""
        follows = isinstance(error, RuntimeError) and not isinstance(error, OtherRankError)
        text = str(error).lower()
        if not follows or not any(word in text for word in _CONSEQUENCES):
            return error
        news = self._news()
        return error if news is None else OtherRankError(news)

    def _news(self) -> str | None:
        deadline = time.monotonic() + _NEWS_S
        while time.monotonic() < deadline:
            if self.died:
                return self.died[min(self.died)]
            store = self.environment.store
            with contextlib.suppress(RuntimeError):  # the rank that holds the store has gone
                if store is not None and store.check([_KEY]):
                    return store.get(_KEY).decode()
            time.sleep(0.05)
        return None

    def _watch(self) -> None:
        poller = select.poll()
        for file in self._files:
            poller.register(file, select.POLLIN)
        while self._files and not self._stopped.is_set():
            for file, _ in poller.poll(_PERIOD_MS):
                poller.unregister(file)
                os.close(file)
                self._note(self._files.pop(file))
        for file in self._files:
            os.close(file)

    def _note(self, rank: int) -> None:
        if self._stopped.is_set():
            return
        number, text = _how_it_ended(rank, self.environment.local_pids[rank])
        self.died[rank] = text
        own = self.environment.rank
        left = [r for r in self.environment.local_pids if r not in self.died]
        if number and number not in _ASKED and own == min(left):
            say(f"flashdreams: error: {text}", beside=own > 0)
        store = self.environment.store
        with contextlib.suppress(RuntimeError):
            if store is not None:
                store.set_timeout(timedelta(seconds=_NEWS_S))
                store.compare_set(_KEY, "", text)


def _how_it_ended(rank: int, pid: int) -> tuple[int, str]:
    """The signal that killed a process (0: none, or not known), and a line about it.

    Its parent has usually not asked yet, so the kernel still knows.
    Source: proc_pid_stat(5), field 52.
    """
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1])
    except (OSError, ValueError, IndexError):
        return 0, f"Rank {rank} (process {pid}) has gone."
    number = status & 0x7F
    if number == 0:
        code = status >> 8
        return 0, f"Rank {rank} (process {pid}) ended with exit code {code} before the others."
    why = ", as the kernel does when memory is full" if number == signal.SIGKILL else ""
    name = signal.Signals(number).name if number in list(signal.Signals) else "unknown"
    return number, f"Rank {rank} (process {pid}) was killed by signal {number} ({name}){why}."
