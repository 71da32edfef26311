"""Sessions that make a chunk when they are asked for one."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flashdreams.serving.interface import Chunk, Listener, State
from flashdreams.serving.web.events import EventLog
from flashdreams.serving.web.gate import for_clients
from flashdreams.serving.web.metrics import Metrics

NOTED = 64
"""Commands, and refusals, that the figures of a step tell of; they go into a header."""


class Ended(Exception):
    """The session is over; says why."""


class Stepper(Listener):
    """Lets the loop make exactly one chunk for each ``want``.

    Methods of the listener come from the loop's thread, all others from the event loop's.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Begin, wanting nothing, on the event loop's thread."""
        self.state: State = "waiting"
        self.position = 0
        self.used_at = time.monotonic()
        self.events = EventLog()
        self.lock = asyncio.Lock()
        """Held by the request that steps."""
        self.ended: str | None = None
        """Why the session is over; None while it is not."""
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._wanted = False
        self._chunk: asyncio.Future[Chunk] | None = None
        self.kept: deque[dict[str, Any]] = deque(maxlen=NOTED)
        """The last commands that were carried out since the last step."""
        self.refused: deque[dict[str, Any]] = deque(maxlen=NOTED)
        """The last events that were refused since the last step."""

    def on_state(self, state: State, position: int = 0) -> None:
        """See the contract."""
        self.state, self.position = state, position

    def on_chunk(self, chunk: Chunk) -> None:
        """See the contract."""
        self._wanted = False
        self._metrics.chunk(chunk.stage_ms)
        self._call(self._resolve, chunk)

    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """See the contract."""
        self._call(self._note_kept, command, name, event_id)

    def on_refused(self, event_id: str | None, message: str) -> None:
        """See the contract."""
        self._call(self._note_refused, event_id, message)

    def on_end(self, error: str | None, stopped: bool) -> None:
        """See the contract."""
        reason = "The session was closed." if stopped else "The session has made all its pictures."
        self._call(self._fail, for_clients(error) if error is not None else reason)

    def unshown_seconds(self) -> float:
        """Nothing if a chunk is wanted, else for ever."""
        return 0.0 if self._wanted else math.inf

    async def next_chunk(self, wake: Callable[[], None], timeout: float) -> Chunk:
        """Ask for a chunk and wait for it.

        Args:
            wake: lets the loop look again.
            timeout: in seconds.

        Raises:
            Ended: the session is over.
            TimeoutError: no chunk came; the next call takes it if it comes later.
        """
        if self.ended is not None:
            raise Ended(self.ended)
        if self._chunk is None:
            self._chunk = self._loop.create_future()
            self._wanted = True
            try:
                wake()
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
        self.ended = reason
        if self._chunk is not None and not self._chunk.done():
            self._chunk.set_exception(Ended(reason))

    def _note_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        event = self.events.finish(event_id)
        self.kept.append({"command": command, "name": name, "event_id": event})

    def _note_refused(self, event_id: str | None, message: str) -> None:
        event = self.events.finish(event_id, again=True)
        self.refused.append({"event_id": event, "message": for_clients(message)})

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
