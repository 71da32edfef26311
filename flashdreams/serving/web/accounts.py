"""Sessions as seen by the web server, and their opening."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flashdreams.serving.interface import Full, Host, Offer, Opening, Refused
from flashdreams.serving.protocol import Error, SessionOptions, StartConfig
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.gate import Gate, for_clients
from flashdreams.serving.web.images import image_of
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.settings import WebSettings
from flashdreams.serving.web.stepper import Stepper

T = TypeVar("T")
L = TypeVar("L", Feed, Stepper)

logger = logging.getLogger(__name__)

INTERNAL = "Internal server error; see the server's log."


class Denied(Exception):
    """A refused request; ``error`` is the message that answers it."""

    def __init__(self, message: str, code: Any, **fields: Any) -> None:
        super().__init__(message)
        self.error = Error(message=message, code=code, **fields)


@dataclass(eq=False)
class Session(Generic[L]):
    """One session as seen by the web server."""

    id: str
    listener: L
    """A feed for sockets; a stepper if it is driven step by step over HTTP."""
    config: StartConfig
    attached: bool = False
    """Whether the host has had this listener."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a client resumes it."""


class Accounts:
    """All sessions of a server; used only on the event loop's thread."""

    def __init__(self, gate: Gate, settings: WebSettings, metrics: Metrics) -> None:
        """Start without sessions."""
        self.gate, self.settings, self.metrics = gate, settings, metrics
        self.sessions: dict[str, Session[Any]] = {}
        self.conversations: set[Any] = set()
        """Conversations of the open connections."""

    @property
    def full(self) -> bool:
        """Whether no more connections are accepted."""
        return len(self.conversations) >= self.settings.max_sockets

    @contextlib.contextmanager
    def counted(self, conversation: Any) -> Iterator[None]:
        """Count a conversation while it lasts."""
        self.conversations.add(conversation)
        self.metrics.sockets.set(len(self.conversations))
        try:
            yield
        finally:
            self.conversations.discard(conversation)
            self.metrics.sockets.set(len(self.conversations))

    async def finish_all(self, patience_s: float) -> None:
        """Send what is queued to all sockets, then close them; end all requests for a step.

        Args:
            patience_s: maximum time to wait, in seconds, for pictures that are not yet due, and
                again for sockets to close; open ones are then abandoned.
        """
        for session in self.sessions.values():
            if isinstance(session.listener, Stepper):
                session.listener.on_end(self.gate.words(), stopped=False)
        for at_once in (False, True):
            for conversation in self.conversations:
                if at_once or not conversation.begun:  # else it ends after its last picture
                    conversation.outlet.finish()
            end = time.monotonic() + patience_s
            while self.conversations and time.monotonic() < end:
                await asyncio.sleep(0.01)

    def host(self) -> Host:
        """The host.

        Raises:
            Denied: there is none yet, or it has ended.
        """
        host = self.gate.host
        if host is None:
            raise self.absence()
        return host

    def absence(self) -> Denied:
        """The error for requests while there is no host."""
        stops = self.gate.phase == "draining"
        return Denied(self.gate.words(), "draining" if stops else "not_ready")

    async def open(self, options: SessionOptions, listener: L) -> Session[L]:
        """Open a session.

        Raises:
            Denied: its parameters are not served, or there is no place.
        """
        host = self.host()
        check_allowed(options, host.offer)
        image = None
        if options.image_reference is not None:
            url = options.image_reference.image_url
            image = await answered(image_of, url, host.offer, self.settings)
        opening = Opening(
            prompt=options.prompt, seed=options.seed, num_frames=options.num_frames, image=image
        )
        id = await answered(host.open, opening, listener)
        self.forget_ended()
        session = Session(id, listener, config_of(options, host.offer), attached=True)
        self.sessions[id] = session
        return session

    @contextlib.asynccontextmanager
    async def taking_up(
        self, id: str, kind: type[L], new: Callable[[], L]
    ) -> AsyncIterator[Session[L]]:
        """A session by its token, locked against being resumed by others.

        One from an earlier server process is registered at once, so that all clients that resume it
        share one listener.

        Args:
            id: the token.
            kind: class of the session's listener.
            new: makes a listener.

        Raises:
            Denied: there is no host, or the session is driven in another way.
        """
        while True:
            host = self.host()
            self.forget_ended()
            session = self.sessions.get(id)
            if session is None:
                config = config_of(SessionOptions(), host.offer)
                session = self.sessions[id] = Session(id, new(), config)
            if not isinstance(session.listener, kind):
                text = f"This session is controlled over {session.listener.carrier}."
                raise Denied(text, "unknown_session")
            async with session.lock:
                # Another client may have registered a new session after this one was refused.
                if self.sessions.get(id) is session:
                    yield session
                    return

    async def reap(self) -> None:
        """Periodically drop sessions and pictures that no client comes back for."""
        while True:
            await asyncio.sleep(self.settings.reap_s)
            self.forget_ended()
            for session in self.sessions.values():
                session.listener.let_go()

    def forget_ended(self) -> None:
        """Drop sessions that no client comes back for."""
        host = self.gate.host
        for session in list(self.sessions.values()):
            if session.lock.locked() or not session.listener.abandoned:
                continue
            self.forget(session)
            if host is not None and session.listener.end is None:
                host.close(session.id)

    def forget(self, session: Session[Any]) -> None:
        """Drop a session."""
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]


async def answered(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that may block, in a thread.

    Raises:
        Denied: it was refused or failed.
    """
    try:
        return await asyncio.to_thread(function, *arguments)
    except Refused as error:
        code = "queue_full" if isinstance(error, Full) else "not_allowed"
        raise Denied(for_clients(str(error)), code) from error
    except Exception as error:
        logger.exception("a client's request has failed")
        raise Denied(INTERNAL, "session_failed") from error


def check_allowed(options: SessionOptions, offer: Offer) -> None:
    """Refuse parameters that this server does not serve.

    Raises:
        Denied: with all accepted values.
    """
    fixed = ("model", "width", "height", "fps", "num_inference_steps", "guidance_scale")
    allowed = {name: getattr(offer, name) for name in fixed}
    asked = {name: getattr(options, name) for name in fixed}
    wrong = {n: x for n, x in asked.items() if x is not None and x != allowed[n]}
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        served = ", ".join(f"{name}={allowed[name]!r}" for name in wrong)
        text = (
            f"Not served here: {found}. This server has {served}; leave out what does not matter."
        )
        raise Denied(text, "not_allowed", allowed=allowed)


def config_of(options: SessionOptions, offer: Offer) -> StartConfig:
    """The parameters of a session: its own, else those of the server."""
    own = options.model_dump(include={"prompt", "seed", "num_frames"}, exclude_none=True)
    return StartConfig(**{"num_frames": None} | vars(offer) | own)
