"""What the web side and the loop of turns know of each other: plain values and two contracts.

The loop runs on the main thread of every rank; the web server runs in a thread of rank zero. Calls
of ``Host`` come from the web server's threads. Calls of ``Listener`` come from one thread of the
host's, in the order in which things happened, and must return at once; ``unshown_seconds`` alone is
asked by the loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

State = Literal["waiting", "running", "paused", "parked", "ended"]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a client asks for; None takes the server's own value."""

    prompt: str | None = None
    seed: int | None = None
    image: Tensor | None = None
    """``[1, 3, height, width]`` in [-1, 1] on the CPU, of the server's size."""
    num_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server serves; fixed when it has started."""

    model: str
    width: int
    height: int
    fps: float
    seed: int
    prompt: str | None
    num_inference_steps: int
    guidance_scale: float | None
    controls: Mapping[str, Any] | None
    """``Controller.accepts()``."""
    prompts_change: bool
    takes_image: bool
    commands: tuple[str, ...]
    """Of "save", "fork", "rewind", "reset"."""
    chunk_frames: int
    """Pixel frames of a chunk in the steady state."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The pictures of one AR step."""

    session: str
    index: int
    """Of the AR step within its rollout."""
    epoch: int
    """Raised by reset and rewind."""
    first_frame: int
    """Pixel frame of the first picture, counted from the beginning of the session's video; it
    keeps counting over resets and rewinds."""
    frames: Tensor
    """``[F, height, width, 3]`` uint8 on the CPU."""
    applied: tuple[str, ...] = ()
    """Identifiers of the events that act from this chunk on."""
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    finished_at: float = 0.0
    """``time.monotonic`` when the pictures were on the host."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one session and its server, for status lines and metrics."""

    state: State
    frames_per_second: float
    chunk_ms: Mapping[str, float]
    sessions: int
    queued: int
    device_bytes: int | None
    """In use on rank zero's device; None on a CPU."""
    host_bytes: int
    """Resident memory of rank zero's process."""
    parked: int = 0
    """Sessions in host memory or on disk."""
    parked_bytes: int = 0
    """Host memory of those on rank zero."""
    steps: int = 0
    """AR steps of the session, or of all since the start."""
    places: int = 0
    """Sessions that may take turns at a time."""


class Listener(ABC):
    """What a session tells whoever opened it."""

    @abstractmethod
    def on_state(self, state: State, position: int = 0) -> None:
        """The session waits (``position`` 1 is next), runs, is paused, is parked or has ended."""

    @abstractmethod
    def on_chunk(self, chunk: Chunk) -> None:
        """Pictures are there."""

    @abstractmethod
    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """A save, fork, rewind or reset was carried out."""

    @abstractmethod
    def on_refused(self, event_id: str | None, message: str) -> None:
        """An event that had been accepted could not be carried out; the session continues."""

    @abstractmethod
    def on_end(self, error: str | None, stopped: bool) -> None:
        """The session is over; ``error`` is for people, and None where nothing failed."""

    @abstractmethod
    def unshown_seconds(self) -> float:
        """How long the pictures that were handed over and are not yet due will last, in seconds.

        The loop begins an AR step of this session no earlier than needed: see `Host`. ``math.inf``
        begins none: a client that drives a session step by step has not asked for the next chunk.
        Once it asks, ``Host.pause(session, False)`` makes the loop look again, at once.
        """


class Refused(ValueError):
    """A request cannot be met; the message says what is allowed."""


class Full(Refused):
    """All places and all places to wait are taken."""


class Host(ABC):
    """The loop of turns, as the web side sees it. Every method may be called from any thread.

    Pacing: with ``unshown_seconds`` s of a session and t seconds that its AR steps take, the next
    step begins once s <= t plus a margin, so that at most one chunk is finished and not yet shown,
    and an event acts on the chunk that follows. Among sessions that are due, the one that is about
    to run dry goes first.
    """

    offer: Offer

    @abstractmethod
    def open(self, opening: Opening, listener: Listener) -> str:
        """Begin a session, or let it wait for a place.

        Returns:
            Its identifier, which no one can guess: it is also its resume token.

        Raises:
            Full: there is no place to wait.
            Refused: the opening cannot be met.
        """

    @abstractmethod
    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        """Take up a session with another listener; it leaves its pause or its parking place.

        Args:
            session: its identifier.
            listener: hears of it from now on.
            from_frame: the first pixel frame that the client has not shown. A server that has been
                restarted counts on from there, if its snapshot is older than that.

        Returns:
            Pixel frame of the next picture.

        Raises:
            Refused: there is no such session.
        """

    @abstractmethod
    def detach(self, session: str) -> None:
        """The socket is gone: pause at the next chunk border, park later, and end at last.

        The chunk that is being generated still goes to the listener.
        """

    @abstractmethod
    def control(self, session: str, values: Mapping[str, Any], event_id: str | None) -> None:
        """Hand an event to the controller; it acts on the next chunk.

        Raises:
            Refused: the controller does not take these values.
        """

    @abstractmethod
    def prompt(self, session: str, text: str, event_id: str | None) -> None:
        """Another prompt from the next chunk on; it is encoded in the calling thread.

        Raises:
            Refused: prompts cannot change here, or this one is none.
        """

    @abstractmethod
    def command(
        self, session: str, kind: str, event_id: str | None, values: Mapping[str, Any]
    ) -> None:
        """ "save", "fork" or "rewind" with ``{"name": ...}``, "reset" with ``{"seed": ...}`` or {}.

        Raises:
            Refused: it cannot be carried out.
        """

    @abstractmethod
    def pause(self, session: str, paused: bool) -> None:
        """Make no more chunks, or go on."""

    @abstractmethod
    def close(self, session: str) -> None:
        """End a session; nothing happens if it has ended."""

    @abstractmethod
    def saved(self, session: str) -> list[str]:
        """Names that can be gone back to; empty for a session that has ended."""

    @abstractmethod
    def figures(self, session: str | None = None) -> Figures:
        """Of a session, or of all."""

    @abstractmethod
    def drain(self) -> None:
        """Take no more sessions, keep the running ones for a restart, and let the loop return."""
