"""Work on sessions between AR steps: saves, forks, places, parking, snapshots, ending."""

import logging
import time
from functools import partial
from typing import Any

from flashdreams.infra.session import Command
from flashdreams.serving.engine import Order, OrderError
from flashdreams.serving.host import LiveHost
from flashdreams.serving.live import LiveSession
from flashdreams.serving.restart import SessionFolder

RESTARTING = "The server restarts; resume the session with its token."
STOPPING = "The server is shutting down; start another session later."
KEPT = "What was kept of it stays; take it up again with its token."

logger = logging.getLogger(__name__)


class Keeper:
    """Assigns and frees places and saves sessions to disk; on rank zero's main thread."""

    def __init__(
        self, host: LiveHost, folder: SessionFolder, rollout_bytes: int, *, keeps: bool
    ) -> None:
        """Store the arguments.

        Args:
            host: the sessions.
            folder: folder of the snapshots.
            rollout_bytes: memory of one session's rollout, as measured by the trial.
            keeps: whether the state of sessions can be saved and parked.
        """
        self.host, self.engine, self.folder = host, host.engine, folder
        self.keeps, self.rollout_bytes = keeps, rollout_bytes

    def take_over(self) -> None:
        """Restore the sessions of an earlier process, so that their clients can resume them."""
        self.folder.claim()
        found = self.folder.find() if self.keeps else []
        with self.host.lock:
            self.host.sessions |= {live.id: live for live in found}

    def adopt(self, session: str) -> LiveSession | None:
        """Take over a session of another server; its snapshot moves to this server's folder."""
        if not self.keeps or self.host.limits.adopt_from is None:
            return None
        return self.folder.adopt(session, self.host.limits.adopt_from)

    def admit(self, live: LiveSession) -> None:
        """Give a session a free place."""
        with self.host.lock:
            if live.closing or live not in self.host.queue:
                return
        begun = self.host.attempt(live, lambda: self._begin(live))
        with self.host.lock:  # until here it waits, or an event would queue it once more
            self.host.queue.remove(live)
            live.waits = False
            if not begun:
                return
            live.where = "device"
            # Waiting for a place is not idle time.
            live.last_turn = live.snapped_at = live.last_input = time.monotonic()
            live.idle_since = live.last_turn if live.reasons else None
            self.host.tell_states()

    def _begin(self, live: LiveSession) -> None:
        values: dict[str, Any] = {"seed": live.seed, "prompt": live.prompt}
        if live.where == "host":
            self.engine.tell(Order(kind="unpark", session=live.id))
            return
        kind: Any = "open" if live.where == "nowhere" else "resume"
        if kind == "resume":
            values |= {"folder": str(live.snapshot), "turns": live.chunks}
        self.engine.tell(Order(kind=kind, session=live.id, values=values, tensors=live.tensors))

    def keep(self, live: LiveSession) -> None:
        """Carry out the oldest save, fork, rewind or reset of a session."""
        with self.host.lock:
            keeping = live.keepings[0]  # its name counts as taken until it is noted
        kind, name, event_id = keeping.kind, keeping.values.get("name"), keeping.id or None
        order = Order(kind=kind, session=live.id, values=keeping.values)  # type: ignore[arg-type]
        tell = partial(self.engine.tell, order)
        if kind == "reset":  # the old rollout was freed for the new one
            if not self.host.attempt(live, tell):
                return
        else:
            try:
                tell()
            except OrderError as error:
                with self.host.lock:
                    live.keepings.popleft()
                if live.listener is not None:
                    text = f"No {kind}: {error} The session continues."
                    self.host.delivery.call(live.listener.on_refused, event_id, text)
                return
        with self.host.lock:
            self._note(live, live.keepings.popleft())
        if live.listener is not None:
            self.host.delivery.call(live.listener.on_kept, kind, name, event_id)

    def _note(self, live: LiveSession, keeping: Command) -> None:
        if keeping.kind in ("save", "fork"):
            (live.saves if keeping.kind == "save" else live.forks).append(keeping.values["name"])
            return
        live.seed = keeping.values.get("seed", live.seed)
        live.epoch += 1
        live.changes += 1
        live.owes_step = True

    def snapshot(self, live: LiveSession) -> bool:
        """Write a session to disk, replacing its older snapshot.

        Returns:
            Whether it was written. If not, the reason is logged and the session continues.
        """
        opening_is_kept = self.folder.keep_opening(live)
        with self.host.lock:
            live.snapped_at = time.monotonic()
            live.snapshots += 1
            changes, run = live.changes, live.to_json()
        path = self.folder.snapshot_path(live.id, live.snapshots)
        values = {"folder": str(path), "run": run}
        order = Order(kind="snapshot", session=live.id, values=values)
        if not opening_is_kept or not self.engine.succeeds(order):
            return False
        with self.host.lock:
            live.snapshot, live.saved_changes = path, changes
        self.folder.forget_older(path)
        return True

    def park(self, live: LiveSession) -> None:
        """Free the place of an idle session; it goes to disk if host memory is short."""
        limits, forks = self.host.limits, self.engine.live[live.id].forks
        more = self.rollout_bytes * (1 + len(forks))
        to_disk = self.engine.parked_bytes + more > limits.parked_gib * 2**30
        if live.stale and (to_disk or limits.snapshot_every > 0):
            self.snapshot(live)
        if to_disk and live.stale:
            live.unparkable = True
            return
        order = Order(kind="close" if to_disk else "park", session=live.id)
        if to_disk:
            with self.host.lock:
                live.forks.clear()
            moved = self.host.attempt(live, partial(self.engine.tell, order))
        else:
            moved = self.engine.succeeds(order)
        if not moved:  # it stays where it is
            live.unparkable = True
            return
        with self.host.lock:
            live.where = "disk" if to_disk else "host"
            self.host.wait_again(live)  # it may have been resumed in the meantime
            self.host.tell_states()

    def end(self, live: LiveSession, error: str | None, stopped: bool) -> None:
        """End a session and delete its data, unless the error did not come from its state."""
        listener = live.listener
        if live.blameless and not live.closing and self._set_aside(live):
            error = f"{error} {KEPT}"
        else:
            self._leave(live)
            self.folder.forget(live.id)
        if listener is not None:
            self.host.delivery.call(listener.on_end, error, stopped)

    def _set_aside(self, live: LiveSession) -> bool:
        """Keep a session whose state did not cause the error, so that its client can retry.

        Returns:
            Whether it was parked, or there is a snapshot that is now the session.
        """
        kept = live
        if live.where not in ("host", "disk"):
            found = None if live.snapshot is None else self.folder.read(live.snapshot.parent)
            if found is None:
                return False
            self._leave(live)
            kept = found
        with self.host.lock:
            kept.set_aside(time.monotonic())
            self.host.sessions[kept.id] = kept
        return True

    def _leave(self, live: LiveSession) -> None:
        with self.host.lock:
            if live in self.host.queue:
                self.host.queue.remove(live)
            live.where, live.waits = "gone", False
            self.host.sessions.pop(live.id, None)
            self.host.tell_states()
        if live.id in self.engine.live or live.id in self.engine.parked:
            self.engine.tell(Order(kind="close", session=live.id))

    def drain(self) -> None:
        """Write every session to disk for the next process, then let all ranks return."""
        with self.host.lock:
            lives = list(self.host.sessions.values())
        for live in sorted(lives, key=lambda live: live.where != "device"):
            kept = self.keeps and live.where in ("device", "host", "disk") and not live.closing
            if live.failed is not None:
                kept = kept and live.blameless and live.snapshot is not None
            elif kept and live.stale:
                kept = self._save_for_restart(live) or live.snapshot is not None
            self._leave(live)
            if not kept:
                self.folder.forget(live.id)
            if live.listener is not None:
                text = live.failed or (RESTARTING if kept else STOPPING)
                self.host.delivery.call(live.listener.on_end, text, live.closing)
        if self.engine.logs is not None:
            self.engine.logs.flush()
        self.folder.give_up()
        self.engine.tell(Order(kind="stop"))

    def _save_for_restart(self, live: LiveSession) -> bool:
        """Write a session as it is now; if that fails, its older snapshot stays."""
        back = live.where != "host" or self.engine.succeeds(Order(kind="unpark", session=live.id))
        return back and self.snapshot(live)
