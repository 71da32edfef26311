"""AR steps: which session is next, and delivery of its pictures to the client."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flashdreams.infra.session import Session, Step, Turn
from flashdreams.serving.delivery import Pictures
from flashdreams.serving.engine import Order, OrderError, for_people
from flashdreams.serving.host import LiveHost
from flashdreams.serving.interface import Chunk, Listener
from flashdreams.serving.live import LiveSession

MAX_IN_FLIGHT = 2
"""Maximum number of AR steps queued on the device: one running and one waiting."""
IDLE_S = 0.25
"""Interval between checks while no session wants a turn."""
PICTURES_LOST = "Its frames were lost; see the server's log."

logger = logging.getLogger(__name__)


class Turns:
    """Gives the next turn to the most urgent session; on rank zero's main thread."""

    def __init__(self, host: LiveHost, *, streams: bool) -> None:
        """Store the arguments.

        Args:
            host: the sessions.
            streams: whether sessions continue after their first chunk.
        """
        self.host = host
        self._streams = streams
        self._delivered_at = 0.0

    def next(self) -> Callable[[], Any] | float:
        """The AR step that is due, or the seconds until one may be."""
        with self.host.lock:
            lives = [live for live in self.host.sessions.values() if live.runs]
            in_flight = sum(live.in_flight for live in self.host.sessions.values())
        if in_flight >= MAX_IN_FLIGHT:
            return IDLE_S
        unshown = [(_unshown_s(live.listener), live) for live in lives]
        finite = [(unshown_s, live) for unshown_s, live in unshown if math.isfinite(unshown_s)]
        choice = choose(finite, self.host.limits.margin_ms / 1e3)
        if choice is None:
            return IDLE_S
        live, wait_s = choice
        return wait_s or partial(self.host.attempt, live, partial(self._step, live))

    def _step(self, live: LiveSession) -> None:
        session = self.host.engine.live[live.id]
        with self.host.lock:
            turn = Turn(live.id, session.cache.next_index, tuple(live.commands))
            live.commands.clear()
            live.last_turn = began = time.monotonic()
        step = self.host.engine.tell(Order.of_turn(turn))
        applied = tuple(command.id for command in turn.commands if command.id)
        try:
            self._send(live, session, step, applied, began)
        except Exception as error:  # pictures need memory, only on rank zero
            logger.exception("The pictures of a session cannot be sent.")
            raise OrderError(for_people(error)) from error

    def _send(
        self,
        live: LiveSession,
        session: Session,
        step: Step,
        applied: tuple[str, ...],
        began: float,
    ) -> None:
        """Queue the pictures of a step for delivery."""
        assert step.chunk is not None, "rank zero decodes"
        pictures, frames = Pictures(step.chunk), step.chunk.shape[1]
        with self.host.lock:
            live.stage_ms = _stage_ms(session)
            if live.num_frames is not None:
                frames = min(frames, live.num_frames - live.next_frame)
            chunk = partial(
                Chunk,
                session=live.id,
                index=step.autoregressive_index,
                epoch=live.epoch,
                first_frame=live.next_frame,
                applied=applied,
                stage_ms=dict(live.stage_ms),
            )
            live.next_frame += frames
            live.chunks += 1
            live.changes += 1
            live.in_flight += 1
            live.owes_step = False
            if not self._streams:
                live.num_frames = live.next_frame
            self.host.steps += 1
            listener = live.listener

        def deliver() -> None:
            now = began
            error: str | None = PICTURES_LOST
            try:
                pixels, error = pictures.wait()[:frames], step.cache.finite.read()
                now = time.monotonic()
                if listener is not None and error is None:
                    listener.on_chunk(chunk(frames=pixels, finished_at=now))
            finally:
                with self.host.lock:
                    live.in_flight -= 1
                    live.failed = live.failed or error
                    live.note_step(now - max(began, self._delivered_at), now, frames)
                    self._delivered_at = now
                    self.host.wake()

        self.host.delivery.call(deliver)


def choose(
    unshown: Sequence[tuple[float, LiveSession]], margin_s: float
) -> tuple[LiveSession, float] | None:
    """The session that runs out of pictures first, and the seconds that its AR step may wait.

    If a step starts later than its session's unshown pictures last, less its own duration, the
    session runs out of them. If several sessions are about to, the steps before it have to fit in
    as well. No step starts more than ``margin_s`` earlier than needed, so that it sees the latest
    events. Among sessions without pictures, the one whose last turn is the longest ago is first.

    Args:
        unshown: sessions that want a turn, each with the playback time of its unshown pictures.
        margin_s: reserve for steps that take longer than before.

    Returns:
        None without sessions.
    """
    order = sorted(unshown, key=lambda pair: (pair[0], pair[1].last_turn))
    if not order:
        return None
    latest = math.inf
    for unshown_s, live in reversed(order):
        # It must end before its session runs out of pictures and before the next step must start.
        latest = min(latest, unshown_s) - live.step_s
    return order[0][1], max(0.0, latest - margin_s)


def _unshown_s(listener: Listener | None) -> float:
    """Playback time of a client's unshown pictures; infinite if the listener fails."""
    try:
        return 0.0 if listener is None else max(0.0, listener.unshown_seconds())
    except Exception:
        logger.exception("A listener failed; its session is stopped.")
        return math.inf


def _stage_ms(session: Session) -> dict[str, float]:
    """Stage times of the last AR step for which all are known."""
    timer = session.cache.timer
    for record in reversed(timer.records[-3:]):
        if timer.has_all_times(record):
            ending = "_ms"
            return {k.removesuffix(ending): v for k, v in record.items() if k.endswith(ending)}
    return {}
