"""Sessions that generate a chunk only on request."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flashdreams.serving.interface import Chunk, Listener, Refused, State
from flashdreams.serving.web.events import EventLog
from flashdreams.serving.web.gate import for_clients
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.settings import WebSettings

NOTED = 64
"""Maximum number of commands and of refusals in a step's figures, which are a header."""


class Ended(Exception):
    """The session is over; the message says why."""


class Stepper(Listener):
    """Lets the turn loop generate exactly one chunk per request.

    The turn loop's thread calls the methods of `Listener`, the event loop's thread all others.
    """

    carrier = "HTTP"

    def __init__(self, settings: WebSettings, metrics: Metrics) -> None:
        """Start without a request, on the event loop's thread."""
        self.state: State = "waiting"
        self.position = 0
        self.used_at = time.monotonic()
        self.events = EventLog()
        self.lock = asyncio.Lock()
        """Held by the request that runs a step."""
        self.end: str | None = None
        """Why the session is over; None while it is running."""
        self._settings, self._metrics = settings, metrics
        self._loop = asyncio.get_running_loop()
        self._wanted = False
        self._wake: Callable[[], None] = lambda: None
        self._chunk: asyncio.Future[Chunk] | None = None
        self.kept: deque[dict[str, Any]] = deque(maxlen=NOTED)
        """Commands carried out since the last step; only the last ones are kept."""
        self.refused: deque[dict[str, Any]] = deque(maxlen=NOTED)
        """Events refused since the last step; only the last ones are kept."""

    def on_state(self, state: State, position: int = 0) -> None:
        """See `Listener`; a session that was idle until the request is asked again."""
        self.state, self.position = state, position
        if state == "paused" and self._wanted:
            with contextlib.suppress(Refused):  # it has ended
                self._wake()

    def on_chunk(self, chunk: Chunk) -> None:
        """See `Listener`."""
        self._wanted = False
        self._metrics.chunk(chunk.stage_ms)
        self._call(self._resolve, chunk)

    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """See `Listener`."""
        self._call(self._note_kept, command, name, event_id)

    def on_refused(self, event_id: str | None, message: str) -> None:
        """See `Listener`."""
        self._call(self._note_refused, event_id, message)

    def on_end(self, error: str | None, stopped: bool) -> None:
        """See `Listener`."""
        reason = "The session was closed." if stopped else "The session has made all its pictures."
        self._call(self._fail, for_clients(error) if error is not None else reason)

    def unshown_seconds(self) -> float:
        """0 if a chunk is requested, else infinity."""
        return 0.0 if self._wanted else math.inf

    @property
    def abandoned(self) -> bool:
        """Whether there were no requests for too long."""
        idle_s = time.monotonic() - self.used_at
        return idle_s > self._settings.idle_s and not self.lock.locked()

    def let_go(self) -> None:
        """Do nothing: a stepper keeps no pictures."""

    async def next_chunk(self, wake: Callable[[], None], timeout: float) -> Chunk:
        """Request a chunk and wait for it.

        Args:
            wake: makes the turn loop ask again.
            timeout: in seconds.

        Raises:
            Ended: the session is over.
            TimeoutError: no chunk arrived in time; the next call returns it if it arrives later.
        """
        if self.end is not None:
            raise Ended(self.end)
        if self._chunk is None:
            self._chunk = self._loop.create_future()
            self._wake, self._wanted = wake, True
        if not self._chunk.done():
            try:
                wake()  # also if an earlier request gave up: the session may be paused since
            except Exception:
                self._chunk, self._wanted = None, False
                raise
        try:
            chunk = await asyncio.wait_for(asyncio.shield(self._chunk), timeout)
        except asyncio.TimeoutError as error:
            raise TimeoutError from error
        self._chunk = None
        return chunk

    def _resolve(self, chunk: Chunk) -> None:
        if self._chunk is not None and not self._chunk.done():
            self._chunk.set_result(chunk)

    def _fail(self, reason: str) -> None:
        self.end = reason
        if self._chunk is not None and not self._chunk.done():
            self._chunk.set_exception(Ended(reason))
            self._chunk.exception()  # else asyncio logs it, if no request waits for the chunk

    def _note_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        event = self.events.finish(event_id)
        self.kept.append({"command": command, "name": name, "event_id": event})

    def _note_refused(self, event_id: str | None, message: str) -> None:
        event = self.events.finish(event_id, again=True)
        self.refused.append({"event_id": event, "message": for_clients(message)})

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
