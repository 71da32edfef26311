"""Queue of messages and pictures for one client, filled from several threads."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from flashdreams.serving.protocol import VideoChunk
from flashdreams.serving.web.codec import Encoder
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.settings import WebSettings
from flashdreams.serving.web.transport import Transport

MAX_TEXTS = 1000
"""Maximum number of queued messages per socket."""
TRICKLE_S = 0.5
"""A client with missing receipts still gets a picture this often, to be able to send one."""


class TooSlow(Exception):
    """A client has not read for too long."""


@dataclass
class Outgoing:
    """An encoded picture."""

    message: VideoChunk
    """Its metadata, except for the counters, which are set when it is sent."""
    data: Any
    """From ``encoder.encode``."""
    due: float
    """``time.monotonic`` when it should be sent."""
    accepted_at: tuple[float, ...] = ()
    """When the events that it responds to were accepted."""


class Outlet:
    """A bounded queue of messages and pictures for one socket, sent in order.

    ``post``, ``post_picture``, ``purge`` and ``finish`` may be called from any thread; ``run``
    belongs to the event loop.
    """

    def __init__(
        self,
        transport: Transport,
        request_id: str,
        settings: WebSettings,
        metrics: Metrics,
    ) -> None:
        """Create an empty queue, on the event loop's thread.

        Args:
            transport: an open connection.
            request_id: for the messages.
            settings: limits of the server.
            metrics: metrics of the server.
        """
        self.request_id = request_id
        self.encoder: Encoder | None = None
        """Set before the first picture."""
        self.sent_chunks = 0
        """Number of pictures so far."""
        self.running = asyncio.Event()
        """Whether the session has its place."""
        self._transport, self._settings, self._metrics = transport, settings, metrics
        self._loop = asyncio.get_running_loop()
        self._items: deque[str | Outgoing | None] = deque()
        self._ready = asyncio.Event()
        self._posted = 0  # written only by the encoder's thread
        self._left = 0  # written only by the event loop's thread
        self._unshown: deque[tuple[int, float]] = deque()
        """(frame, time) of the sent pictures without a receipt."""
        self._receipts = False
        self._closed = False
        self._key_asked = False
        self.failed = False
        """Whether encoding has failed."""

    def post(self, message: BaseModel) -> None:
        """Queue a message."""
        self._call(self._append, message.model_dump_json())

    def post_picture(self, picture: Outgoing) -> None:
        """Queue a picture."""
        self._posted += 1
        self._call(self._append, picture)

    def purge(self) -> None:
        """Drop the queued pictures; the next one must be a key picture."""
        self.ask_for_key()
        self._call(self._purge)

    def ask_for_key(self) -> None:
        """Request that the next picture is a key picture."""
        self._key_asked = True

    def take_key(self) -> bool:
        """Whether the next picture has to be a key picture; resets it."""
        asked, self._key_asked = self._key_asked, False
        return asked

    def set_running(self) -> None:
        """Record that the session has its place; repeated calls cost nothing."""
        if not self.running.is_set():
            self._call(self.running.set)

    def finish(self) -> None:
        """Let ``run`` return after it has sent what is queued."""
        self._call(self._append, None)

    def close(self) -> None:
        """Accept nothing more, drop the queued pictures, and let ``run`` return."""
        self._closed = True
        self.purge()
        self.finish()

    def behind(self, limit: int) -> bool:
        """Whether the client does not keep up.

        Args:
            limit: pictures that may be sent without a receipt, if it sends receipts.
        """
        if self._posted - self._left >= self._settings.waiting_pictures:
            return True
        if not self._receipts or len(self._unshown) < limit:
            return False
        return time.monotonic() - self._unshown[-1][1] < TRICKLE_S

    def shown(self, frame: int) -> None:
        """Process a receipt for all pictures up to this one."""
        self._receipts = True
        while self._unshown and self._unshown[0][0] <= frame:
            self._unshown.popleft()

    @property
    def crowded(self) -> bool:
        """Whether the queue is too full to answer more of the client's messages for now."""
        return len(self._items) > MAX_TEXTS // 2

    @property
    def unshown(self) -> int:
        """Number of sent pictures without a receipt."""
        return len(self._unshown)

    async def run(self) -> None:
        """Send until ``finish``.

        Raises:
            TooSlow: the client has not read for too long.
        """
        while True:
            while not self._items:
                self._ready.clear()
                await self._ready.wait()
            item = self._items.popleft()
            if item is None:
                return
            try:
                await self._send_in_time(item)
            finally:
                if isinstance(item, Outgoing):
                    self._left += 1

    async def _send_in_time(self, item: str | Outgoing) -> None:
        """Send with a timeout, like ``wait_for`` but without a task per item."""
        task, late = asyncio.current_task(), False
        assert task is not None

        def cut() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = self._loop.call_later(self._settings.slow_s, cut)
        try:
            await self._send(item)
        except asyncio.CancelledError as error:
            if late:
                raise TooSlow from error
            raise
        finally:
            timer.cancel()

    async def _send(self, item: str | Outgoing) -> None:
        if isinstance(item, str):
            await self._transport.send_text(item)
            return
        encoder, message = self.encoder, item.message
        assert encoder is not None
        picture = encoder.wrap(item.data, key=message.key)
        message.transport_chunk_index = self.sent_chunks
        await self._transport.send_picture(message, picture)
        self.sent_chunks += 1
        now = time.monotonic()
        self._unshown.append((message.first_frame, now))
        if len(self._unshown) > MAX_TEXTS:
            self._unshown.popleft()
        self._metrics.sent(message.byte_length, now - item.due)
        for accepted_at in item.accepted_at:
            self._metrics.answers.observe(now - accepted_at)

    def _append(self, item: Any) -> None:
        if item is None or not (self._closed or len(self._items) > MAX_TEXTS):
            self._items.append(item)
            self._ready.set()

    def _purge(self) -> None:
        kept = [item for item in self._items if not isinstance(item, Outgoing)]
        self._left += len(self._items) - len(kept)
        self._items = deque(kept)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed: the server has stopped
            self._closed = True
