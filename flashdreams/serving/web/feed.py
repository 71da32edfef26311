"""Buffer of a session's pictures between the turn loop and the sockets."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashdreams.serving.interface import Chunk, Listener, Offer, State
from flashdreams.serving.protocol import (
    Applied,
    Error,
    Kept,
    Message,
    Queued,
    VideoChunk,
    VideoQueued,
)
from flashdreams.serving.web.events import ChunkEvents, EventLog, Part
from flashdreams.serving.web.gate import for_clients
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.outlet import Outgoing, Outlet
from flashdreams.serving.web.playout import Playout
from flashdreams.serving.web.settings import WebSettings

STALE_PICTURES = 2
"""Number of older pictures that may always be shown before the response to an event."""
LATENCIES = 512
"""Number of recent key-to-photon times in the percentiles."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a session."""

    pixels: np.ndarray
    """``[height, width, 3]`` uint8, RGB."""
    frame: int
    """Counted from the start of the session's video."""
    step: int
    """The AR step that generated it."""
    epoch: int
    active: tuple[str, ...]
    """Events that are active on its chunk."""


@dataclass(frozen=True)
class _News:
    frame: int
    step: int
    events: ChunkEvents


@dataclass(frozen=True)
class End:
    """How a session ended."""

    error: str | None
    stopped: bool


class Feed(Listener):
    """Holds the pictures of one session until they are due, and keeps sent ones for a reconnect.

    It outlives its sockets: pictures wait between two of them. The turn loop's thread, the
    encoder's thread and the event loop call it; one lock, held only briefly, guards it.
    """

    carrier = "a WebSocket"

    def __init__(self, offer: Offer, settings: WebSettings, metrics: Metrics) -> None:
        """Start without a socket."""
        self.offer, self.settings, self.metrics = offer, settings, metrics
        self.events = EventLog()
        self.state: State = "waiting"
        self.end: End | None = None
        self.saved: list[str] = []
        """Names that ``session.rewind`` accepts."""
        self.outlet: Outlet | None = None
        self.latencies_ms: deque[float] = deque(maxlen=LATENCIES)
        self._lock = threading.Condition()
        self._playout = Playout(offer.fps)
        self._bearable_s = max(settings.stale_s, STALE_PICTURES * self._playout.period)
        self._pending: deque[Picture] = deque()
        self._kept: deque[Picture] = deque()
        self._epoch = 0
        self._hurry = False
        self._position = 0
        self._alone_since = time.monotonic()
        self._encoding: set[Picture] = set()
        """Taken pictures that are still to be shown."""
        self._news: deque[_News] = deque()
        """News of events; each goes with the first picture sent at or after its frame."""

    # ------------------------------------------------------------ the loop's thread

    def on_state(self, state: State, position: int = 0) -> None:
        """See `Listener`."""
        with self._lock:
            self.state = state
            moved, self._position = position != self._position, position
            if state == "waiting" and moved and position:
                self._post(VideoQueued, position=position)
            elif state == "running":
                self._set_running()

    def on_chunk(self, chunk: Chunk) -> None:
        """See `Listener`."""
        self.metrics.chunk(chunk.stage_ms)
        pixels = chunk.frames.numpy()
        with self._lock:
            events = self.events.apply(chunk.applied)
            if chunk.epoch != self._epoch:
                self._epoch = chunk.epoch
                self._kept.clear()
                self._forget_pending()
            elif events.applied and self._delay() > self._bearable_s:
                self._forget_pending()
            self._hurry = False
            stop = chunk.first_frame + len(pixels)
            if events.applied or events.accepted_at:
                starting = replace(events, completed=())
                self._news.append(_News(chunk.first_frame, chunk.index, starting))
            if events.completed:
                ending = ChunkEvents(completed=events.completed)
                self._news.append(_News(stop - 1, chunk.index, ending))
            self._pending += [
                Picture(picture, frame, chunk.index, chunk.epoch, events.active)
                for frame, picture in enumerate(pixels, start=chunk.first_frame)
            ]
            self._lock.notify_all()
            self._set_running()

    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """See `Listener`."""
        with self._lock:
            event = self.events.finish(event_id)
            if command in ("reset", "rewind"):
                self._forget_pending()
            elif name is not None and name not in self.saved:
                self.saved.append(name)
            self._post(Kept, event_id=event, command=command, name=name, saved=list(self.saved))

    def on_refused(self, event_id: str | None, message: str) -> None:
        """See `Listener`."""
        with self._lock:
            event, text = self.withdraw(event_id), for_clients(message)
            if self.outlet is not None:
                self.metrics.errors("interaction_failed").inc()
            self._post(Error, message=text, code="interaction_failed", event_id=event)

    def on_end(self, error: str | None, stopped: bool) -> None:
        """See `Listener`."""
        with self._lock:
            self.state = "ended"
            self.end = End(None if error is None else for_clients(error), stopped)
            if stopped:
                self._forget_pending()
            self._lock.notify_all()
            self._set_running()

    def unshown_seconds(self) -> float:
        """See `Listener`; 0 while a reset or rewind is requested and not yet carried out."""
        with self._lock:
            return 0.0 if self._hurry else self._delay()

    # ------------------------------------------------------------ the encoder's thread

    def take(self, outlet: Outlet) -> Picture | None:
        """Wait until the next picture is due; `send` or `skip` follows.

        Returns:
            The picture; None once ``outlet`` is no longer the session's, or there are no more.
        """
        with self._lock:
            while self.outlet is outlet:
                wait = None
                if self._pending:
                    wait = self._playout.wait(time.monotonic())
                    if wait <= 0:
                        picture = self._pending.popleft()
                        self._encoding.add(picture)
                        return picture
                elif self.end is not None:
                    return None
                self._lock.wait(wait)
            return None

    def send(self, picture: Picture, data: Any, key: bool, outlet: Outlet) -> bool:
        """Pass an encoded picture to its socket, and keep it until there is a receipt.

        Returns:
            Whether it was sent; False for an outdated one.
        """
        with self._lock:
            if picture not in self._encoding:
                self.metrics.frames("stale").inc()
                return False
            self._encoding.discard(picture)
            if self.outlet is not outlet:  # for the next socket
                pending = [picture, *self._pending]
                self._pending = deque(sorted(pending, key=lambda waiting: waiting.frame))
                return False
            self._keep(picture)
            now = time.monotonic()
            late_s = self._playout.show(now)
            started: list[str] = []
            completed: list[str] = []
            accepted_at: list[float] = []
            while self._news and self._news[0].frame <= picture.frame:
                news = self._news.popleft()
                started += news.events.applied
                if news.events.applied:
                    self._post(
                        Applied,
                        event_ids=list(news.events.applied),
                        generation_chunk_index=news.step,
                        first_frame=picture.frame,
                    )
                completed += news.events.completed
                accepted_at += news.events.accepted_at
            message = VideoChunk(
                request_id=outlet.request_id,
                transport_chunk_index=0,
                generation_chunk_index=picture.step,
                num_frames=1,
                byte_length=0,
                started_event_ids=started,
                active_event_ids=list(picture.active),
                completed_event_ids=completed,
                first_frame=picture.frame,
                key=key,
                epoch=picture.epoch,
            )
            outlet.post_picture(Outgoing(message, data, now - late_s, tuple(accepted_at)))
            return True

    def skip(self, picture: Picture) -> None:
        """Drop a picture because the client is too slow."""
        with self._lock:
            self._encoding.discard(picture)
            self._playout.show(time.monotonic())
        self.metrics.frames("dropped").inc()

    # ------------------------------------------------------------ the event loop's thread

    def connect(self, outlet: Outlet) -> None:
        """Send the session's pictures to a socket; an earlier socket gets no more."""
        with self._lock:
            self.outlet, self._position = outlet, 0
            self._lock.notify_all()
        if self.state == "running":
            outlet.set_running()

    def disconnect(self, outlet: Outlet) -> bool:
        """Disconnect a closed socket.

        Returns:
            Whether it was the session's current socket.
        """
        with self._lock:
            outlet.close()
            if self.outlet is not outlet:
                return False
            self.outlet = None
            self._alone_since = time.monotonic()
            self._lock.notify_all()
            return True

    @property
    def alone(self) -> bool:
        """Whether the session has been without a socket for too long."""
        alone_s = time.monotonic() - self._alone_since
        return self.outlet is None and alone_s > self.settings.keep_detached_s

    @property
    def abandoned(self) -> bool:
        """Whether the session has ended and no client will fetch the rest."""
        left = self.end is not None and self.outlet is None
        return left and (self.alone or not (self._pending or self._kept))

    def let_go(self) -> None:
        """Drop sent pictures kept for a reconnect, if there was none for too long."""
        with self._lock:
            if self.alone:
                self._kept.clear()

    def go_back(self, frame: int) -> int | None:
        """Queue the kept pictures from this frame on again.

        Returns:
            Frame of the first queued picture; None if there is none.
        """
        with self._lock:
            again = [picture for picture in self._kept if picture.frame >= frame]
            waiting = [picture for picture in self._pending if picture.frame >= frame]
            self._kept.clear()
            self._pending = deque(again + waiting)
            self._playout.restart()
            return self._pending[0].frame if self._pending else None

    def shown(self, frame: int, latencies_ms: list[float], dropped: int) -> None:
        """Process a receipt."""
        with self._lock:
            while self._kept and self._kept[0].frame <= frame:
                self._kept.popleft()
        self.latencies_ms.extend(latencies_ms)
        self.metrics.shown(latencies_ms, dropped)
        if self.outlet is not None:
            self.outlet.shown(frame)

    def accept(
        self, event_id: str | None, parts: Mapping[Part, int | None]
    ) -> dict[Part, str] | None:
        """Record an event as `EventLog.accept` does, and acknowledge it."""
        with self._lock:
            ids = self.events.accept(event_id, parts)
            if event_id is not None:
                self._post(Queued, event_id=event_id)
            return ids

    def withdraw(self, event_id: str | None) -> str | None:
        """Withdraw an accepted event that will not be carried out; the client may send it again.

        Returns:
            The client's identifier of the event.
        """
        with self._lock:
            self._hurry = False
            return self.events.finish(event_id, again=True)

    def hurry(self) -> None:
        """Stop pacing, because a reset or rewind makes the queued pictures outdated."""
        with self._lock:
            self._hurry = True

    def latency_ms(self, share: float) -> float | None:
        """A percentile of the key-to-photon times that the client has reported."""
        values = self.latencies_ms.copy()
        return float(np.quantile(values, share)) if values else None

    # ------------------------------------------------------------

    def _delay(self) -> float:
        """Seconds until all queued pictures have been shown."""
        wait = self._playout.wait(time.monotonic()) if self.outlet is not None else 0.0
        return wait + (len(self._pending) + len(self._encoding)) * self._playout.period

    def _keep(self, picture: Picture) -> None:
        self._kept.append(picture)
        bound = self.settings.keep_s * self.offer.fps
        bound = min(bound, self.settings.keep_bytes // picture.pixels.nbytes)
        while len(self._kept) > bound:
            self._kept.popleft()

    def _forget_pending(self) -> None:
        """Drop the pictures that are not sent; their news of events go with the next picture."""
        self.metrics.frames("stale").inc(len(self._pending))
        self._pending.clear()
        self._encoding.clear()
        if self.outlet is not None:
            self.outlet.purge()
        self._lock.notify_all()

    def _set_running(self) -> None:
        if self.outlet is not None:
            self.outlet.set_running()

    def _post(self, kind: Callable[..., Message], **fields: Any) -> None:
        """Send a message to the socket, if there is one; the lock is held."""
        if self.outlet is not None:
            self.outlet.post(kind(request_id=self.outlet.request_id, **fields))
