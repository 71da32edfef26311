"""Dispatch of orders from rank zero to all ranks; an error ends only its session if possible."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from flashdreams.infra.finite import NotFiniteError
from flashdreams.infra.snapshot_header import SnapshotError
from flashdreams.parallel.environment import group_size
from flashdreams.runtime.shortage import is_shortage
from flashdreams.runtime.text import reason_of
from flashdreams.serving.engine import Order, fails_alike
from flashdreams.serving.host import LiveHost
from flashdreams.serving.live import LiveSession

RESTS_AFTER_S = 1.0
"""Idle time after which the other ranks are told to wait outside of collectives."""

logger = logging.getLogger(__name__)


class OrderError(Exception):
    """An order could not be carried out on any rank; the message is for the client."""


class Dispatcher:
    """Sends orders to all ranks, one at a time; on rank zero's main thread."""

    def __init__(self, host: LiveHost) -> None:
        """Store the host, which has the requests of clients and the engine of this rank."""
        self.host = host
        self._resting = True
        self._active = time.monotonic()

    def tell(self, order: Order) -> Any:
        """Execute an order on all ranks; a collective call.

        Returns:
            The result of `SessionEngine.carry_out`.

        Raises:
            OrderError: it failed in the same way on all ranks, or this is the only rank.
        """
        self._resting, self._active = False, time.monotonic()
        try:
            return self.host.engine.tell(order)
        except Exception as error:
            if group_size() > 1 and not fails_alike(order, error):
                raise
            hint = "; flashdreams-plan SLUG says how many sessions fit" * is_shortage(error)
            text = f"{error or type(error).__name__}{hint}"
            logger.warning("%s of a session failed: %s", order.kind, text, exc_info=_odd(error))
            raise OrderError(for_people(error)) from error

    def succeeds(self, order: Order) -> bool:
        """Execute an order on all ranks; False: it failed, and the reason is logged."""
        try:
            self.tell(order)
            return True
        except OrderError:
            return False

    def attempt(self, live: LiveSession, task: Callable[[], Any]) -> bool:
        """Run a task for a session; if it fails, the session ends.

        Returns:
            Whether it succeeded.
        """
        try:
            task()
            return True
        except OrderError as error:
            cause = error.__cause__
            if isinstance(cause, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            with self.host.lock:
                live.failed = str(error)
                live.blameless = isinstance(cause, OSError) or is_shortage(cause or error)
            return False

    def rest(self) -> None:
        """Let the other ranks wait outside of collectives after a second without orders."""
        if not self._resting and time.monotonic() - self._active > RESTS_AFTER_S:
            self.tell(Order(kind="rest"))
            self._resting = True


def for_people(error: BaseException) -> str:
    """The text of an error for clients: no path, no traceback."""
    if is_shortage(error):
        return "The device has no memory left for this session."
    if isinstance(error, NotFiniteError):
        return str(error)
    if isinstance(error, SnapshotError):
        return "The snapshot is damaged, or was made by another method."
    if isinstance(error, OSError):
        return f"A file of the server failed: {reason_of(error)}."
    return f"It failed ({type(error).__name__}); see the server's log."


def _odd(error: BaseException) -> bool:
    """Whether the error is unexpected, so that the log needs a traceback."""
    return not (is_shortage(error) or isinstance(error, ValueError | OSError | ArithmeticError))
