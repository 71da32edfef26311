"""Explains errors that are caused by the death of another rank."""

import contextlib
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from flashdreams.parallel.environment import Environment, OtherRankError
from flashdreams.parallel.siblings import watch_processes

_KEY = "died"
_NEWS_S = 2.0
_CONSEQUENCES = ("gloo", "nccl", "connection", "broken pipe", "socket", "store", "peer")


class PeerWatch:
    """Watches the ranks of this node, so that a killed one is named instead of an address.

    The collectives of the other ranks fail at the same moment, with an error of their own that
    names only an address. So the error of a rank goes through `explain` before it is
    reported. Linux only; elsewhere nothing is known.
    """

    def __init__(self, environment: Environment) -> None:
        """Prepare.

        Args:
            environment: this rank, with the processes of its neighbours.
        """
        self.environment = environment
        self.died: dict[int, str] = {}
        """Descriptions of the ended ranks of this node."""
        self._stopped = threading.Event()

    def __enter__(self) -> "PeerWatch":
        others = dict(self.environment.local_pids)
        others.pop(self.environment.rank, None)
        watch_processes(others, self._note, self._stopped)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopped.set()

    def explain(self, error: BaseException) -> BaseException:
        """The error to report: the death of a rank, if the given error only follows from it."""
        # Errors of our own, such as a damaged file, are subclasses and have other causes.
        follows = type(error) is RuntimeError or isinstance(error, dist.DistError)
        text = str(error).lower()
        alone = self.environment.world_size == 1
        if alone or not follows or not any(word in text for word in _CONSEQUENCES):
            return error
        news = self._news()
        return error if news is None else OtherRankError(news)

    def _news(self) -> str | None:
        deadline = time.monotonic() + _NEWS_S
        while time.monotonic() < deadline:
            if self.died:
                return self.died[min(self.died)]
            store = self.environment.store
            with contextlib.suppress(RuntimeError):  # the rank that holds the store has ended
                if store is not None and store.check([_KEY]):
                    return store.get(_KEY).decode()
            time.sleep(0.05)
        return None

    def _note(self, rank: int, number: int, text: str) -> None:
        if self._stopped.is_set():
            return
        self.died[rank] = text
        store = self.environment.store
        with contextlib.suppress(RuntimeError):
            if store is not None:
                store.set_timeout(timedelta(seconds=_NEWS_S))
                store.compare_set(_KEY, "", text)
