"""One client's socket, as the threads that have something for it see it."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from flashdreams.serving.protocol import VideoChunk
from flashdreams.serving.web.codec import Encoder
from flashdreams.serving.web.metrics import Metrics

MAX_TEXTS = 1000
"""Messages that may wait for a socket."""
TRICKLE_S = 0.5
"""A client that owes receipts still gets a picture this often, or it could never send one."""


class Socket(Protocol):
    """What takes messages and pictures."""

    def send_text(self, data: str) -> Awaitable[None]:
        """Send a message; returns when it can take the next one."""

    def send_picture(self, message: VideoChunk, picture: Any) -> Awaitable[None]:
        """Send a picture behind its metadata; returns when it can take the next one.

        Args:
            message: the metadata; what depends on the transport is set here.
            picture: of ``Encoder.wrap``.
        """


class TooSlow(Exception):
    """A client has read nothing for too long."""


@dataclass
class _Sent:
    frame: int
    at: float


@dataclass
class _Picture:
    message: VideoChunk
    data: bytes
    due_late_s: float
    accepted_at: tuple[float, ...]


class Outlet:
    """Messages and pictures on their way to one socket, in order, in bounded number.

    ``post``, ``post_picture``, ``purge`` and ``finish`` may be called from any thread; ``run``
    belongs to the event loop.
    """

    def __init__(
        self,
        socket: Socket,
        request_id: str,
        metrics: Metrics,
        *,
        waiting_pictures: int,
        slow_s: float,
    ) -> None:
        """Begin, on the event loop's thread.

        Args:
            socket: accepted.
            request_id: for the messages.
            metrics: of the server.
            waiting_pictures: encoded pictures that may wait here.
            slow_s: seconds after which a client that reads nothing is cut.
        """
        self.request_id = request_id
        self.encoder: Encoder | None = None
        """Set before the first picture."""
        self.sent_chunks = 0
        """Pictures so far."""
        self.running = asyncio.Event()
        """The session has its place."""
        self._socket = socket
        self._metrics = metrics
        self._limit = waiting_pictures
        self._slow_s = slow_s
        self._loop = asyncio.get_running_loop()
        self._items: deque[str | _Picture | None] = deque()
        self._ready = asyncio.Event()
        self._posted = 0  # written by the encoder's thread alone
        self._left = 0  # written by the event loop's thread alone
        self._unshown: deque[_Sent] = deque()
        self._receipts = False
        self._closed = False
        self.purged = False
        """There was a ``purge`` since ``take_purged``."""
        self._key_asked = False
        self.failed = False
        """Encoding has failed."""

    def post(self, message: BaseModel) -> None:
        """Send a message behind what waits."""
        self._call(self._append, message.model_dump_json())

    def post_picture(
        self,
        message: VideoChunk,
        data: bytes,
        *,
        late_s: float = 0.0,
        accepted_at: tuple[float, ...] = (),
    ) -> None:
        """Send a picture; its message gets its counters when it leaves.

        Args:
            message: what precedes it.
            data: of ``encoder.encode``.
            late_s: behind its due time, so far.
            accepted_at: when the events that it answers were accepted.
        """
        self._posted += 1
        due = time.monotonic() - late_s
        self._call(self._append, _Picture(message, data, due, accepted_at))

    def purge(self) -> None:
        """Leave out the pictures that wait; the next one has to be a key picture."""
        self.purged = True
        self._call(self._purge)

    def take_purged(self) -> bool:
        """Whether there was a ``purge`` since the last call."""
        purged, self.purged = self.purged, False
        return purged

    def ask_for_key(self) -> None:
        """The next picture has to be a key picture."""
        self._key_asked = True

    def take_key(self) -> bool:
        """Whether there was an ``ask_for_key`` since the last call."""
        asked, self._key_asked = self._key_asked, False
        return asked

    def set_running(self) -> None:
        """The session has its place; all but the first of many calls cost nothing."""
        if not self.running.is_set():
            self._call(self.running.set)

    def finish(self) -> None:
        """Let ``run`` return behind what waits."""
        self._call(self._append, None)

    def close(self) -> None:
        """Take nothing any more, leave out the pictures that wait, and let ``run`` return."""
        self._closed = True
        self.purge()
        self.finish()

    def behind(self, limit: int) -> bool:
        """Whether the client does not keep up.

        Args:
            limit: pictures that may be sent without a receipt, if it sends receipts.
        """
        if self._posted - self._left >= self._limit:
            return True
        if not self._receipts or len(self._unshown) < limit:
            return False
        return time.monotonic() - self._unshown[-1].at < TRICKLE_S

    def shown(self, frame: int) -> None:
        """A receipt for all pictures up to this one."""
        self._receipts = True
        while self._unshown and self._unshown[0].frame <= frame:
            self._unshown.popleft()

    @property
    def crowded(self) -> bool:
        """So much waits that no more of the client's messages should be answered for now."""
        return len(self._items) > MAX_TEXTS // 2

    @property
    def unshown(self) -> int:
        """Pictures that were sent and have no receipt."""
        return len(self._unshown)

    async def run(self) -> None:
        """Send until ``finish``.

        Raises:
            TooSlow: the client has read nothing for too long.
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
                if isinstance(item, _Picture):
                    self._left += 1

    async def _send_in_time(self, item: str | _Picture) -> None:
        """As ``wait_for`` does it, but without a task for each item."""
        task, late = asyncio.current_task(), False
        assert task is not None

        def cut() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = self._loop.call_later(self._slow_s, cut)
        try:
            await self._send(item)
        except asyncio.CancelledError as error:
            if late:
                raise TooSlow from error
            raise
        finally:
            timer.cancel()

    async def _send(self, item: str | _Picture) -> None:
        if isinstance(item, str):
            await self._socket.send_text(item)
            return
        encoder, message = self.encoder, item.message
        assert encoder is not None
        picture = encoder.wrap(item.data, key=message.key)
        message.transport_chunk_index = self.sent_chunks
        await self._socket.send_picture(message, picture)
        self.sent_chunks += 1
        now = time.monotonic()
        self._unshown.append(_Sent(message.first_frame, now))
        if len(self._unshown) > MAX_TEXTS:
            self._unshown.popleft()
        self._metrics.sent(message.byte_length, now - item.due_late_s)
        for accepted_at in item.accepted_at:
            self._metrics.answered(now - accepted_at)

    def _append(self, item: Any) -> None:
        if item is None or not (self._closed or len(self._items) > MAX_TEXTS):
            self._items.append(item)
            self._ready.set()

    def _purge(self) -> None:
        kept = [item for item in self._items if not isinstance(item, _Picture)]
        self._left += len(self._items) - len(kept)
        self._items = deque(kept)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed: the server has stopped
            self._closed = True
