"""The turn loop: decides on rank zero's main thread what all ranks do next."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flashdreams.serving.dispatch import Dispatcher
from flashdreams.serving.keeper import Keeper
from flashdreams.serving.turns import IDLE_S, Turns
from flashdreams.serving.upkeep import Due, next_upkeep

DELIVERY_S = 5.0
"""How long shutdown waits for pictures being copied, before it writes sessions to disk."""


class TurnLoop:
    """Does one thing at a time, on all ranks.

    First requests of sessions between AR steps, then arriving and leaving sessions, then the AR
    step of the session that would run out of pictures first. If nothing is due it waits for a wake.
    """

    def __init__(self, dispatcher: Dispatcher, keeper: Keeper, turns: Turns) -> None:
        """Store the arguments.

        Args:
            dispatcher: sends the orders.
            keeper: does the work between AR steps.
            turns: runs the AR steps.
        """
        self.host = dispatcher.host
        self.dispatcher, self.keeper, self.turns = dispatcher, keeper, turns

    def run(self) -> None:
        """Run until the host is told to drain; then write all sessions to disk and return."""
        while not self.host.draining:
            self.run_once()
        self._await_deliveries()
        self.keeper.drain()
        self.host.delivery.close()

    def run_once(self) -> None:
        """Do the next task, or wait until there may be one."""
        with self.host.lock:
            seen, task = self.host.news, self._between_steps()
            in_flight = any(live.in_flight for live in self.host.sessions.values())
        following = task or self.turns.next()
        if not isinstance(following, float):
            following()
            return
        if following >= IDLE_S and not in_flight:
            self.dispatcher.rest()
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
                return partial(self.keeper.end, live, live.failed, stopped=False)
            if live.closing or live.finished:
                return partial(self.keeper.end, live, None, stopped=not live.finished)
            if live.keepings and live.where == "device":
                return partial(self.keeper.keep, live)
        following = host.next_waiting()
        if following is not None and host.free_places() > 0:
            return partial(self.keeper.admit, following)
        due = next_upkeep(host, time.monotonic(), keeps=self.keeper.keeps)
        return None if due is None else partial(self._maintain, due)

    def _maintain(self, due: Due) -> None:
        if due.kind == "pause":
            with self.host.lock:
                due.live.pause("idle", time.monotonic())
                self.host.tell_states()
        elif due.kind == "park":
            self.keeper.park(due.live)
        elif due.kind == "snapshot":
            self.keeper.snapshot(due.live)
        else:
            self.keeper.end(due.live, due.reason, stopped=False)

    def _await_deliveries(self) -> None:
        with self.host.lock:
            self.host.lock.wait_for(
                lambda: not any(live.in_flight for live in self.host.sessions.values()), DELIVERY_S
            )
