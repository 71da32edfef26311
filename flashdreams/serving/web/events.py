"""Which events of a client were accepted, act on a chunk, and are over."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["prompt", "camera", "control", "command"]

REMEMBERED = 4096
"""Identifiers of events that are remembered, to drop what arrives twice."""


@dataclass(frozen=True)
class ChunkEvents:
    """What the messages of a chunk say about events."""

    applied: tuple[str, ...] = ()
    """Act from this chunk on, as the client called them."""
    active: tuple[str, ...] = ()
    """Act on this chunk."""
    completed: tuple[str, ...] = ()
    """Are over: replaced by others from this chunk on, or done with its end."""
    accepted_at: tuple[float, ...] = ()
    """``time.monotonic`` when those that are applied were accepted."""


@dataclass
class _Event:
    name: str | None
    waiting: set[str]
    accepted_at: float
    holds: dict[Part, int | None] = field(default_factory=dict)
    """Part of it, and chunks that it still lasts; None: until replaced."""


class EventLog:
    """Events of one session, from the client's message to the chunks that they act on.

    The loop knows each part of an event (prompt, camera, control) by an identifier of its own, so
    that a client may use its identifiers as it likes. A prompt acts at once and a camera's target
    over some chunks, then they are over; a camera's velocity and a control hold until replaced.
    Not safe for threads: its owner holds a lock.
    """

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._count = 0
        self._waiting: OrderedDict[str, tuple[_Event, Part, int | None]] = OrderedDict()
        self._acting: list[_Event] = []
        self._seen: OrderedDict[str, None] = OrderedDict()

    def accept(self, name: str | None, parts: Mapping[Part, int | None]) -> dict[Part, str] | None:
        """Note an event.

        Args:
            name: the client's identifier; None: it does not want to hear of it.
            parts: what it changes, and over how many chunks; None: until replaced.

        Returns:
            The loop's identifier of each part; None if one of this name came before.
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
        """Forget an event that acts on no chunk.

        Args:
            id: the loop's identifier of one of its parts.
            again: the client may send it once more.

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
        """Note a chunk, and the parts of events that act from it on."""
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
