"""State of a session on rank zero apart from its rollout: client, place and figures."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flashdreams.infra.session import Command
from flashdreams.serving.interface import Listener, State

Where = Literal["nowhere", "device", "host", "disk", "gone"]
Reason = Literal["client", "detached", "idle"]

RATE_S = 5.0
"""Seconds over which frames per second are averaged."""
_SAVED = ("prompt", "seed", "num_frames", "next_frame", "epoch", "chunks", "opening_sha256")


@dataclass(eq=False)
class LiveSession:
    """A session from its opening to its end. The host's lock guards all of it."""

    id: str
    """Also the resume token; it cannot be guessed."""
    prompt: str | None
    """Its own prompt; None: the server's."""
    seed: int
    num_frames: int | None
    tensors: dict[str, Tensor]
    """Its own ``text`` and ``image``, on the CPU."""
    listener: Listener | None
    where: Where = "nowhere"
    opening_sha256: str | None = None
    """Checksum of the file that has ``tensors``; None: there is none yet."""
    snapshot: Path | None = None
    """The last snapshot from which it can continue."""
    reasons: set[Reason] = field(default_factory=set)
    """Why it is paused; empty: it runs, once it has a place."""
    closing: bool = False
    """Its client has ended it."""
    unparkable: bool = False
    """Its place could not be freed in this pause."""
    waits: bool = True
    told: tuple[State, int] | None = None
    """State and position that the listener knows."""
    commands: list[Command] = field(default_factory=list)
    """Controls and prompts that wait for its next chunk."""
    ids: dict[str, None] = field(default_factory=dict)
    """Identifiers of the last events, to drop duplicates."""
    failed: str | None = None
    """Why it has to end, as a message for the client."""
    blameless: bool = False
    """The failure was of memory or a file, not of its state, so it may be retried."""
    keepings: deque[Command] = field(default_factory=deque)
    """Saves, forks, rewinds and resets that wait for the next chunk boundary."""
    owes_step: bool = False
    """It generates one chunk although it is paused, because its state changed."""
    next_frame: int = 0
    """Pixel frame of the next picture, counted across resets and rewinds."""
    epoch: int = 0
    chunks: int = 0
    changes: int = 0
    """Number of AR steps, resets and rewinds."""
    saved_changes: int = -1
    """``changes`` at the last snapshot."""
    snapshots: int = 0
    forks: list[str] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    last_input: float = field(default_factory=time.monotonic)
    idle_since: float | None = None
    """Time since which it is paused; None: not paused."""
    detached_since: float | None = None
    snapped_at: float = field(default_factory=time.monotonic)
    last_turn: float = 0.0
    step_s: float = 0.0
    in_flight: int = 0
    """Number of chunks not yet copied to the host."""
    stage_ms: dict[str, float] = field(default_factory=dict)
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, frames) of the last chunks."""

    @property
    def finished(self) -> bool:
        """Whether all requested frames were generated."""
        return self.num_frames is not None and self.next_frame >= self.num_frames

    @property
    def runs(self) -> bool:
        """Whether it wants turns now."""
        if self.where != "device" or self.in_flight or self.closing or self.finished:
            return False
        return not self.reasons or self.owes_step

    @property
    def state(self) -> State:
        """State as reported to its listener and in the figures."""
        if self.where == "gone":
            return "ended"
        if self.where == "device":
            return "paused" if self.reasons else "running"
        return "waiting" if self.waits else "parked"

    @property
    def stale(self) -> bool:
        """Whether its snapshot is older than its state, or there is none."""
        return self.saved_changes != self.changes

    def pause(self, reason: Reason, now: float) -> None:
        """Add a reason to be paused."""
        self.reasons.add(reason)
        if self.idle_since is None:
            self.idle_since = now

    def set_aside(self, now: float) -> None:
        """Wait for a client, as if the connection were lost."""
        self.failed, self.blameless, self.listener, self.told = None, False, None, None
        self.detached_since = now
        self.pause("detached", now)

    def go_on(self, *reasons: Reason) -> None:
        """Remove reasons to be paused."""
        self.reasons.difference_update(reasons)
        if not self.reasons:
            self.idle_since = None
            self.unparkable = False

    def note_step(self, taken_s: float, now: float, frames: int) -> None:
        """Record the duration of an AR step whose pictures have arrived on the host."""
        self.step_s = taken_s if self.step_s == 0.0 else 0.75 * self.step_s + 0.25 * taken_s
        self.recent.append((now, frames))
        self._forget(now)

    def frames_per_second(self, now: float) -> float:
        """Frames generated per second, over the last seconds."""
        self._forget(now)
        if len(self.recent) < 2:
            return 0.0
        span = max(now, self.recent[-1][0]) - self.recent[0][0]
        return sum(frames for _, frames in list(self.recent)[1:]) / span if span > 0 else 0.0

    def _forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - RATE_S:
            self.recent.popleft()

    def to_json(self) -> dict[str, Any]:
        """State that a restarted server needs apart from the rollout."""
        return {"session": self.id} | {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def from_json(cls, run: Mapping[str, Any], **others: Any) -> "LiveSession":
        """A session from ``to_json`` that waits on disk for its client.

        Raises:
            KeyError: a field is missing.
        """
        saved = {name: run[name] for name in _SAVED}
        place = {"listener": None, "where": "disk", "waits": False, "saved_changes": 0}
        live = cls(id=run["session"], **{**saved, **place, **others})
        live.epoch += 1
        live.set_aside(time.monotonic())
        return live
