"""The interface between the web server and the turn loop: plain values and two base classes.

The loop runs on the main thread of every rank; the web server runs in a thread of rank zero. Calls
of ``Host`` come from the web server's threads. Calls of ``Listener`` come from one thread of the
host, in the order of the events, and must return at once; only ``unshown_seconds`` is called by the
loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

State = Literal["waiting", "running", "paused", "parked", "ended"]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Options of a new session; None means the server's default."""

    prompt: str | None = None
    seed: int | None = None
    image: Tensor | None = None
    """``[1, 3, height, width]`` in [-1, 1] on the CPU, in the server's size."""
    num_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server serves; fixed once it has started."""

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
    """Subset of "save", "fork", "rewind", "reset"."""
    chunk_frames: int
    """Pixel frames of a chunk in the steady state."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The pictures of one AR step."""

    session: str
    index: int
    """Index of the AR step in its rollout."""
    epoch: int
    first_frame: int
    """Pixel frame of the first picture, counted from the start of the session's video, across
    resets and rewinds."""
    frames: Tensor
    """``[F, height, width, 3]`` uint8 on the CPU."""
    applied: tuple[str, ...] = ()
    """Identifiers of the events that act from this chunk on."""
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    finished_at: float = 0.0
    """``time.monotonic`` when the pictures were on the host."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one session and its server, for status lines and metrics."""

    state: State
    frames_per_second: float
    chunk_ms: Mapping[str, float]
    sessions: int
    queued: int
    device_bytes: int | None
    """Memory in use on rank zero's device; None on a CPU."""
    host_bytes: int
    parked: int = 0
    parked_bytes: int = 0
    steps: int = 0
    """AR steps of the session, or of all sessions since the start."""
    places: int = 0
    """Maximum number of sessions that take turns."""


class Listener(ABC):
    """Callbacks of a session to its opener."""

    @abstractmethod
    def on_state(self, state: State, position: int = 0) -> None:
        """The session waits (``position`` 1 is next), runs, is paused, is parked or has ended."""

    @abstractmethod
    def on_chunk(self, chunk: Chunk) -> None:
        """New pictures are available."""

    @abstractmethod
    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        """A save, fork, rewind or reset was carried out."""

    @abstractmethod
    def on_refused(self, event_id: str | None, message: str) -> None:
        """An accepted event could not be carried out; the session continues."""

    @abstractmethod
    def on_end(self, error: str | None, stopped: bool) -> None:
        """The session is over; ``error`` is for people, and None where nothing failed."""

    @abstractmethod
    def unshown_seconds(self) -> float:
        """Playback time of the pictures that were delivered and are not yet due, in seconds.

        The loop starts an AR step of this session no earlier than needed: see `Host`. ``math.inf``
        starts none: a client that drives a session step by step has not requested the next chunk.
        Once it does, ``Host.pause(session, False)`` makes the loop ask again at once.
        """


class Refused(ValueError):
    """A request cannot be met; the message says what is allowed."""


class Full(Refused):
    """All places and the whole queue are taken."""


class Host(ABC):
    """The turn loop's interface for the web server. Any thread may call any method.

    Pacing: let s be a session's ``unshown_seconds`` and t the duration of its AR steps. The next
    step starts once s <= t plus a margin, so that at most one chunk is finished and not yet shown,
    and an event acts on the chunk that follows. Among sessions that are due, the one that would
    run out of pictures first goes first.
    """

    offer: Offer

    @abstractmethod
    def open(self, opening: Opening, listener: Listener) -> str:
        """Start a session, or queue it for a place.

        Returns:
            Its identifier, which is also its resume token and cannot be guessed.

        Raises:
            Full: the queue is full.
            Refused: the options are not possible.
        """

    @abstractmethod
    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        """Resume a session with another listener; it is no longer paused or parked.

        Args:
            session: its identifier.
            listener: receives its callbacks from now on.
            from_frame: the first pixel frame that the client has not shown. A restarted server
                continues counting there if its snapshot is older.

        Returns:
            Pixel frame of the next picture.

        Raises:
            Refused: there is no such session.
        """

    @abstractmethod
    def detach(self, session: str) -> None:
        """Handle a lost socket: pause at the next chunk boundary, park later, finally end.

        The current chunk is still delivered to the listener.
        """

    @abstractmethod
    def control(self, session: str, values: Mapping[str, Any], event_id: str | None) -> None:
        """Pass an event to the controller; it acts on the next chunk.

        Raises:
            Refused: the controller does not take these values.
        """

    @abstractmethod
    def prompt(self, session: str, text: str, event_id: str | None) -> None:
        """Change the prompt from the next chunk on; encodes it in the calling thread.

        Raises:
            Refused: prompts cannot change here, or this one is invalid.
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
        """Pause generation, or resume it."""

    @abstractmethod
    def close(self, session: str) -> None:
        """End a session; no effect if it has ended."""

    @abstractmethod
    def saved(self, session: str) -> list[str]:
        """Names that ``rewind`` accepts; empty for a session that has ended."""

    @abstractmethod
    def figures(self, session: str | None = None) -> Figures:
        """Figures of a session, or of all sessions."""

    @abstractmethod
    def drain(self) -> None:
        """Accept no more sessions, save the running ones for a restart, and let the loop return."""
