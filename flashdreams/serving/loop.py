"""The turn loop: decides on rank zero's main thread what all ranks do next."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flashdreams.serving.host import LiveHost
from flashdreams.serving.keeper import Keeper
from flashdreams.serving.live import LiveSession
from flashdreams.serving.turns import IDLE_S, Turns

DELIVERY_S = 5.0
"""How long shutdown waits for pictures being copied, before it writes sessions to disk."""
QUEUED_S = 30.0
"""Seconds for which a disconnected client keeps its position in the queue."""
PARK_SOON_S = 3.0
"""Seconds of pause after which a session is parked if others wait for a place."""


class TurnLoop:
    """Does one thing at a time, on all ranks.

    First requests of sessions between AR steps, then arriving and leaving sessions, then the AR
    step of the session that would run out of pictures first. If nothing is due it waits for a wake.
    """

    def __init__(self, host: LiveHost, keeper: Keeper, turns: Turns) -> None:
        """Store the arguments.

        Args:
            host: the sessions.
            keeper: does the work between AR steps.
            turns: runs the AR steps.
        """
        self.host, self.keeper, self.turns = host, keeper, turns

    def run(self) -> None:
        """Run until the host is told to drain; then write all sessions to disk and return."""
        while not self.host.draining:
            self.run_once()
        with self.host.lock:
            self.host.lock.wait_for(lambda: not self._in_flight(), DELIVERY_S)
        self.keeper.drain()
        self.host.delivery.close()

    def run_once(self) -> None:
        """Do the next task, or wait until there may be one."""
        with self.host.lock:
            seen, task = self.host.news, self._between_steps()
            in_flight = self._in_flight()
        following = task or self.turns.next()
        if not isinstance(following, float):
            following()
            return
        if following >= IDLE_S and not in_flight:
            self.host.engine.rest()
        with self.host.lock:
            if not self.host.draining and self.host.news == seen:
                self.host.lock.wait(min(following, IDLE_S))

    def _between_steps(self) -> Callable[[], Any] | None:
        """The task before the next AR step, or None; the lock is held."""
        host = self.host
        for live in host.sessions.values():
            if live.in_flight:
                continue
            if live.failed is not None:
                return self._end(live, live.failed)
            if live.closing or live.finished:
                return partial(self.keeper.end, live, None, stopped=not live.finished)
            if live.keepings and live.where == "device":
                return partial(self.keeper.keep, live)
        following = host.next_waiting()
        if following is not None and host.free_places() > 0:
            return partial(self.keeper.admit, following)
        return self._upkeep(time.monotonic())

    def _upkeep(self, now: float) -> Callable[[], Any] | None:
        """The timed task that is due first, or None; the lock is held."""
        host, limits, keeps = self.host, self.host.limits, self.keeper.keeps
        gone = [live for live in host.sessions.values() if live.detached_since is not None]
        if len(gone) > limits.max_kept:
            oldest = min(gone, key=lambda live: live.detached_since or 0.0)
            return self._end(oldest, "Too many sessions are kept; this one was idle the longest.")
        wanted = host.next_waiting() is not None and host.free_places() <= 0
        for live in host.sessions.values():
            if live.in_flight:
                continue
            if limits.max_session_s is not None and now - live.began > limits.max_session_s:
                return self._end(live, f"A session lasts at most {limits.max_session_s:g} s here.")
            gone_s = 0.0 if live.detached_since is None else now - live.detached_since
            most_s = min(limits.end_after_s, QUEUED_S if live.where == "nowhere" else math.inf)
            if gone_s > most_s:
                return self._end(live, f"No client came back within {most_s:g} s.")
            if live.where != "device":
                continue
            if not live.reasons and now - live.last_input > limits.pause_after_s:
                host.pause_idle(live)  # at once, or an input might come before
            idle_s = 0.0 if live.idle_since is None else now - live.idle_since
            patience_s = min(PARK_SOON_S, limits.park_after_s) if wanted else limits.park_after_s
            if keeps and not live.unparkable and live.reasons and idle_s > patience_s:
                return partial(self.keeper.park, live)
        for live in host.sessions.values() if keeps and limits.snapshot_every > 0 else ():
            late = now - live.snapped_at > limits.snapshot_every
            if late and live.stale and live.where == "device" and not live.in_flight:
                return partial(self.keeper.snapshot, live)
        return None

    def _end(self, live: LiveSession, reason: str) -> Callable[[], Any]:
        return partial(self.keeper.end, live, reason, stopped=False)

    def _in_flight(self) -> bool:
        """Whether pictures are being copied; the lock is held."""
        return any(live.in_flight for live in self.host.sessions.values())
