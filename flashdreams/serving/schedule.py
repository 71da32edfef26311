"""Who has the next turn, and when: earliest deadline first, no earlier than needed."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A session that wants a turn."""

    session: str
    unshown_s: float
    """How long what it has will last; 0: it is dry."""
    step_s: float
    """What its AR step takes."""
    last_turn: float
    """Time at which its last turn began; of several that are dry the longest ago goes first."""


@dataclass(frozen=True)
class Choice:
    """Who is next."""

    session: str
    wait_s: float
    """Until the turn should begin; 0: now."""


def choose(candidates: Iterable[Candidate], margin_s: float) -> Choice | None:
    """The session that runs dry first, and how long its AR step may wait.

    A step that begins later than ``unshown_s - step_s`` lets its session run dry; where several
    sessions are about to, the steps before it take their time as well. None of them begins more
    than ``margin_s`` earlier, so that it knows of the latest events.

    Args:
        candidates: sessions that want a turn.
        margin_s: for what takes longer than it did.

    Returns:
        None without candidates.
    """
    order = sorted(candidates, key=lambda c: (max(0.0, c.unshown_s), c.last_turn))
    if not order:
        return None
    latest = float("inf")
    for candidate in reversed(order):
        # It has to be over when its session runs dry, and when the one after it has to begin.
        latest = min(latest, max(0.0, candidate.unshown_s)) - candidate.step_s
    return Choice(order[0].session, max(0.0, latest - margin_s))
