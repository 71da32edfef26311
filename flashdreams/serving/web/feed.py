"""A session's pictures between the loop that makes them and the sockets that take them."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from flashdreams.serving.interface import Chunk, Listener, Offer, State
from flashdreams.serving.protocol import Applied, Error, Kept, VideoChunk, VideoQueued
from flashdreams.serving.web.events import ChunkEvents, EventLog, Part
from flashdreams.serving.web.gate import for_clients
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.outlet import Outlet
from flashdreams.serving.web.playout import Playout
from flashdreams.serving.web.settings import WebSettings

STALE_PICTURES = 2
"""So many older pictures may always be shown before the answer to an event."""
LATENCIES = 512
"""Receipts of key-to-photon times whose percentiles are shown."""


@dataclass(frozen=True)
class Picture:
    """One picture of a session."""

    pixels: np.ndarray
    """``[height, width, 3]`` uint8, RGB."""
    frame: int
    """Counted from the beginning of the session's video."""
    step: int
    """The AR step that made it."""
    epoch: int
    active: tuple[str, ...]
    """Events that act on its chunk."""


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
    """Holds the pictures of one session until they are due, and those that may be asked for again.

    It outlives its sockets: between two of them the pictures wait. Calls of the loop's thread, of
    the encoder's thread and of the event loop meet here, under one lock that nobody holds for long.
    """

    def __init__(self, offer: Offer, settings: WebSettings, metrics: Metrics) -> None:
        """Begin without a socket."""
        self.offer, self.settings, self.metrics = offer, settings, metrics
        self.events = EventLog()
        self.state: State = "waiting"
        self.end: End | None = None
        self.num_frames: int | None = None
        """Pictures of the whole session; None: no bound."""
        self.saved: list[str] = []
        """Names that can be gone back to."""
        self.outlet: Outlet | None = None
        self.latencies_ms: deque[float] = deque(maxlen=LATENCIES)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._playout = Playout(offer.fps)
        self._bearable_s = max(settings.stale_s, STALE_PICTURES * self._playout.period)
        self._pending: deque[Picture] = deque()
        self._kept: deque[Picture] = deque()
        self._epoch = 0
        self._hurry = False
        self._position = 0
        self._alone_since = time.monotonic()
        self._encoding = 0
        self._news: deque[_News] = deque()
        """Of events, for the first picture that leaves from a frame on."""

    # ------------------------------------------------------------ the loop's thread

    def on_state(self, state: State, position: int = 0) -> None:
        """See the contract."""
        with self._lock:
            self.state, outlet = state, self.outlet
            moved, self._position = position != self._position, position
        if outlet is None:
            return
        if state == "waiting" and moved and position:
            outlet.post(VideoQueued(request_id=outlet.request_id, position=position))
        elif state == "running":
            outlet.set_running()

    def on_chunk(self, chunk: Chunk) -> None:
        """See the contract."""
        self.metrics.chunk(chunk.stage_ms)
        pixels = chunk.frames.numpy()
        with self._changed:
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
            for frame, picture in enumerate(pixels, start=chunk.first_frame):
                if self.num_frames is None or frame < self.num_frames:
                    self._pending.append(
                        Picture(picture, frame, chunk.index, chunk.epoch, events.active)
                    )
            outlet = self.outlet
            self._changed.notify_all()
        if outlet is not None:
            outlet.set_running()

    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """See the contract."""
        with self._lock:
            event = self.events.finish(event_id)
            if command in ("reset", "rewind"):
                self._forget_pending()
            elif name is not None and name not in self.saved:
                self.saved.append(name)
            outlet = self.outlet
        if outlet is None:
            return
        outlet.post(
            Kept(
                request_id=outlet.request_id,
                event_id=event,
                command=command,  # type: ignore[arg-type]
                name=name,
                saved=list(self.saved),
            )
        )

    def on_refused(self, event_id: str | None, message: str) -> None:
        """See the contract."""
        event, outlet = self.withdraw(event_id), self.outlet
        if outlet is not None:
            self.metrics.refused("interaction_failed")
            outlet.post(
                Error(
                    message=for_clients(message),
                    code="interaction_failed",
                    request_id=outlet.request_id,
                    event_id=event,
                )
            )

    def on_end(self, error: str | None, stopped: bool) -> None:
        """See the contract."""
        with self._changed:
            self.state = "ended"
            self.end = End(None if error is None else for_clients(error), stopped)
            if stopped or error is not None:
                self._forget_pending()
            self._changed.notify_all()
            outlet = self.outlet
        if outlet is not None:
            outlet.set_running()

    def unshown_seconds(self) -> float:
        """See the contract; after a reset or rewind was asked for, 0 until it is carried out."""
        with self._lock:
            return 0.0 if self._hurry else self._delay()

    # ------------------------------------------------------------ the encoder's thread

    def take(self, outlet: Outlet) -> Picture | None:
        """Wait for the next picture to be due; `send` or `skip` follows.

        Returns:
            The picture; None once ``outlet`` is no longer the session's, or no more will come.
        """
        with self._changed:
            while self.outlet is outlet:
                wait = None
                if self._pending:
                    wait = self._playout.wait(time.monotonic())
                    if wait <= 0:
                        self._encoding = 1
                        return self._pending.popleft()
                elif self.end is not None:
                    return None
                self._changed.wait(wait)
            return None

    def send(self, picture: Picture, data: bytes, key: bool, outlet: Outlet) -> bool:
        """Hand an encoded picture to its socket, and keep it until there is a receipt.

        Returns:
            Whether it was; False for one that is not worth showing any more.
        """
        with self._lock:
            self._encoding = 0
            if picture.epoch != self._epoch:
                self.metrics.stale(1)
                return False
            if self.outlet is not outlet:  # for the next socket
                pending = [picture, *self._pending]
                self._pending = deque(sorted(pending, key=lambda waiting: waiting.frame))
                return False
            if outlet.purged:
                self.metrics.stale(1)
                return False
            self._keep(picture)
            late_s = self._playout.show(time.monotonic())
            started: list[str] = []
            completed: list[str] = []
            accepted_at: list[float] = []
            while self._news and self._news[0].frame <= picture.frame:
                news = self._news.popleft()
                self._tell(news, picture, outlet)
                started += news.events.applied
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
            outlet.post_picture(message, data, late_s=late_s, accepted_at=tuple(accepted_at))
            return True

    def skip(self) -> None:
        """Leave out a picture that the client is too slow for."""
        with self._lock:
            self._encoding = 0
            self._playout.show(time.monotonic())
        self.metrics.dropped(1)

    # ------------------------------------------------------------ the event loop's thread

    def connect(self, outlet: Outlet) -> None:
        """Give the session's pictures to a socket; another one gets no more of them."""
        with self._changed:
            self.outlet, self._position = outlet, 0
            self._changed.notify_all()
        if self.state == "running":
            outlet.set_running()

    def disconnect(self, outlet: Outlet) -> bool:
        """A socket is gone.

        Returns:
            Whether it was the session's.
        """
        with self._changed:
            outlet.close()
            if self.outlet is not outlet:
                return False
            self.outlet = None
            self._alone_since = time.monotonic()
            self._changed.notify_all()
            return True

    @property
    def alone(self) -> bool:
        """No socket has come for long."""
        alone_s = time.monotonic() - self._alone_since
        return self.outlet is None and alone_s > self.settings.keep_detached_s

    @property
    def abandoned(self) -> bool:
        """The session has ended, and nobody will hear of it."""
        nothing = self.end is not None and not (self._pending or self._kept)
        return self.end is not None and self.outlet is None and (self.alone or nothing)

    def let_go(self) -> None:
        """Forget pictures that were sent and may be asked for again, if nobody does for long."""
        with self._lock:
            if self.alone:
                self._kept.clear()

    def go_back(self, frame: int) -> int | None:
        """Let the pictures from this one on wait again, as far as they are kept.

        Returns:
            The first picture that waits; None if there is none.
        """
        with self._lock:
            again = [picture for picture in self._kept if picture.frame >= frame]
            waiting = [picture for picture in self._pending if picture.frame >= frame]
            self._kept.clear()
            self._pending = deque(again + waiting)
            self._playout.restart()
            return self._pending[0].frame if self._pending else None

    def shown(self, frame: int, latencies_ms: list[float], dropped: int) -> None:
        """A receipt."""
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
        """Note an event: see `EventLog.accept`."""
        with self._lock:
            return self.events.accept(event_id, parts)

    def withdraw(self, event_id: str | None) -> str | None:
        """An event that was accepted is not carried out; the client may send it once more.

        Returns:
            The client's identifier of the event.
        """
        with self._lock:
            self._hurry = False
            return self.events.finish(event_id, again=True)

    def hurry(self) -> None:
        """A reset or rewind was asked for: what waits is not worth waiting for."""
        with self._lock:
            self._hurry = True

    def latency_ms(self, share: float) -> float | None:
        """A percentile of the key-to-photon times that the client has reported."""
        values = sorted(self.latencies_ms)
        if not values:
            return None
        if len(values) == 1:
            return values[0]
        return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]

    # ------------------------------------------------------------

    def _delay(self) -> float:
        """Seconds until what waits has been shown."""
        wait = self._playout.wait(time.monotonic()) if self.outlet is not None else 0.0
        return wait + (len(self._pending) + self._encoding) * self._playout.period

    def _keep(self, picture: Picture) -> None:
        self._kept.append(picture)
        bound = self.settings.keep_s * self.offer.fps
        bound = min(bound, self.settings.keep_bytes // picture.pixels.nbytes)
        while len(self._kept) > bound:
            self._kept.popleft()

    def _forget_pending(self) -> None:
        """Leave out what waits; news of events go with the next picture."""
        self.metrics.stale(len(self._pending))
        self._pending.clear()
        if self.outlet is not None:
            self.outlet.purge()
        self._changed.notify_all()

    def _tell(self, news: _News, picture: Picture, outlet: Outlet) -> None:
        if news.events.applied:
            outlet.post(
                Applied(
                    request_id=outlet.request_id,
                    event_ids=list(news.events.applied),
                    generation_chunk_index=news.step,
                    first_frame=picture.frame,
                )
            )
