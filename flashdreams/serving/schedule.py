"""Scheduling of AR steps: earliest deadline first, no earlier than needed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A session that wants a turn."""

    session: Any
    unshown_s: float
    """Playback time of its unshown pictures; 0: it has none left."""
    step_s: float
    """Duration of its AR step."""
    last_turn: float
    """Time of its last turn; among sessions without pictures the longest ago goes first."""


def choose(candidates: Iterable[Candidate], margin_s: float) -> tuple[Any, float] | None:
    """The session that runs out of pictures first, and the seconds that its AR step may wait.

    If a step starts later than ``unshown_s - step_s``, its session runs out of pictures. If several
    sessions are about to, the steps before it have to fit in as well. No step starts more than
    ``margin_s`` earlier than needed, so that it sees the latest events.

    Args:
        candidates: sessions that want a turn.
        margin_s: reserve for steps that take longer than before.

    Returns:
        None without candidates.
    """
    order = sorted(candidates, key=lambda c: (max(0.0, c.unshown_s), c.last_turn))
    if not order:
        return None
    latest = float("inf")
    for candidate in reversed(order):
        # It must end before its session runs out of pictures and before the next step must start.
        latest = min(latest, max(0.0, candidate.unshown_s)) - candidate.step_s
    return order[0].session, max(0.0, latest - margin_s)
