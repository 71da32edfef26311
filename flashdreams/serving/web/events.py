"""Tracking of a client's events: accepted, active on a chunk, completed."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["prompt", "camera", "control", "command"]

REMEMBERED = 4096
"""Number of remembered event identifiers, to drop duplicates."""


@dataclass(frozen=True)
class ChunkEvents:
    """Events in the messages of a chunk."""

    applied: tuple[str, ...] = ()
    """The client's identifiers of events that act from this chunk on."""
    active: tuple[str, ...] = ()
    """Events that act on this chunk."""
    completed: tuple[str, ...] = ()
    """Events that are over: replaced from this chunk on, or finished at its end."""
    accepted_at: tuple[float, ...] = ()
    """``time.monotonic`` when the applied events were accepted."""


@dataclass
class _Event:
    name: str | None
    waiting: set[str]
    accepted_at: float
    holds: dict[Part, int | None] = field(default_factory=dict)
    """Remaining chunks of each part; None: until replaced."""


class EventLog:
    """Events of one session, from the client's message to the chunks that they act on.

    Each part of an event (prompt, camera, control) has a separate identifier in the host, so that
    clients may choose theirs freely. A prompt acts at once and a camera target over some chunks,
    then they are over; a camera velocity and a control hold until replaced. Not thread-safe: its
    owner holds a lock.
    """

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._count = 0
        self._waiting: OrderedDict[str, tuple[_Event, Part, int | None]] = OrderedDict()
        self._acting: list[_Event] = []
        self._seen: OrderedDict[str, None] = OrderedDict()

    def accept(self, name: str | None, parts: Mapping[Part, int | None]) -> dict[Part, str] | None:
        """Record an event.

        Args:
            name: the client's identifier; None: it needs no messages about it.
            parts: what it changes, and for how many chunks; None: until replaced.

        Returns:
            The host's identifier of each part; None if the name was used before.
        """
        if name is not None:
            if name in self._seen:
                return None
            self._seen[name] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        event = _Event(name, set(), time.monotonic())
        ids: dict[Part, str] = {}
        for part, chunks in parts.items():
            self._count += 1
            ids[part] = f"{self._prefix}-{self._count}"
            event.waiting.add(ids[part])
            self._waiting[ids[part]] = event, part, chunks
        while len(self._waiting) > REMEMBERED:
            self._waiting.popitem(last=False)
        return ids

    def finish(self, id: str | None, *, again: bool = False) -> str | None:
        """Drop an event that acts on no chunk.

        Args:
            id: the host's identifier of one of its parts.
            again: the client may send it again.

        Returns:
            The client's identifier.
        """
        found = self._waiting.pop(id, None) if id is not None else None
        if found is None:
            return None
        name = found[0].name
        for other in found[0].waiting:
            self._waiting.pop(other, None)
        if name is not None and again:
            self._seen.pop(name, None)
        return name

    def apply(self, ids: Sequence[str]) -> ChunkEvents:
        """Record a chunk and the parts of events that act from it on."""
        applied: list[_Event] = []
        for id in ids:
            found = self._waiting.pop(id, None)
            if found is None:
                continue
            event, part, chunks = found
            for holder in self._acting:
                holder.holds.pop(part, None)
            event.holds[part] = chunks
            event.waiting.discard(id)
            if event not in self._acting:
                self._acting.append(event)
            if not event.waiting:
                applied.append(event)
        over = [event for event in self._acting if not event.holds and not event.waiting]
        active = [event for event in self._acting if event.holds]
        for event in active:
            event.holds = {
                part: None if left is None else left - 1
                for part, left in event.holds.items()
                if left is None or left > 1
            }
        over += [event for event in active if not event.holds and not event.waiting]
        self._acting = [event for event in self._acting if event.holds or event.waiting]
        return ChunkEvents(
            applied=_names(applied),
            active=_names(active),
            completed=_names(over),
            accepted_at=tuple(event.accepted_at for event in applied),
        )


def _names(events: Sequence[_Event]) -> tuple[str, ...]:
    return tuple(event.name for event in events if event.name is not None)
