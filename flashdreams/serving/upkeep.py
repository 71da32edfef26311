"""Timed work: pausing, parking, ending and saving of idle sessions."""

import math
from dataclasses import dataclass
from typing import Literal

from flashdreams.serving.host import LiveHost
from flashdreams.serving.live import LiveSession

QUEUED_S = 30.0
"""Seconds for which a disconnected client keeps its position in the queue."""
PARK_SOON_S = 3.0
"""Seconds of pause after which a session is parked if others wait for a place."""


@dataclass(frozen=True)
class Due:
    """A task that is due for a session."""

    kind: Literal["pause", "park", "end", "snapshot"]
    live: LiveSession
    reason: str = ""
    """Why the session ends, as a message for the client."""


def next_upkeep(host: LiveHost, now: float, *, keeps: bool) -> Due | None:
    """The task that is due first; the host's lock is held.

    Args:
        host: the host, with its sessions and limits.
        now: ``time.monotonic``.
        keeps: whether sessions can be parked and saved.
    """
    limits = host.limits
    gone = [live for live in host.sessions.values() if live.detached_since is not None]
    if len(gone) > limits.max_kept:
        oldest = min(gone, key=lambda live: live.detached_since or 0.0)
        return Due("end", oldest, "Too many sessions are kept; this one was idle the longest.")
    wanted = host.next_waiting() is not None and host.free_places() <= 0
    for live in host.sessions.values():
        if live.in_flight:
            continue
        if limits.max_session_s is not None and now - live.began > limits.max_session_s:
            return Due("end", live, f"A session lasts at most {limits.max_session_s:g} s here.")
        gone_s = 0.0 if live.detached_since is None else now - live.detached_since
        most_s = min(limits.end_after_s, QUEUED_S if live.where == "nowhere" else math.inf)
        if gone_s > most_s:
            return Due("end", live, f"No client came back within {most_s:g} s.")
        if live.where != "device":
            continue
        if not live.reasons and now - live.last_input > limits.pause_after_s:
            return Due("pause", live)
        idle_s = 0.0 if live.idle_since is None else now - live.idle_since
        patience_s = min(PARK_SOON_S, limits.park_after_s) if wanted else limits.park_after_s
        if keeps and not live.unparkable and live.reasons and idle_s > patience_s:
            return Due("park", live)
    if keeps and limits.snapshot_every > 0:
        for live in host.sessions.values():
            late = now - live.snapped_at > limits.snapshot_every
            changed = live.saved_changes != live.changes
            if late and changed and live.where == "device" and not live.in_flight:
                return Due("snapshot", live)
    return None
