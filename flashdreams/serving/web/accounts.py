"""Sessions as seen by the web server, and their opening."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flashdreams.serving.interface import Full, Host, Listener, Offer, Opening, Refused
from flashdreams.serving.protocol import Error, ImageReference, SessionStart, StartConfig
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.gate import Gate, for_clients
from flashdreams.serving.web.images import image_of
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.settings import WebSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

INTERNAL = "Internal server error; see the server's log."


class Denied(Exception):
    """A refused request; it is answered by an error message."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass
class Session:
    """One session as seen by the web server."""

    id: str
    feed: Feed
    config: StartConfig
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a socket resumes it."""


class Accounts:
    """All sessions of a server; used only on the event loop's thread."""

    def __init__(self, gate: Gate, settings: WebSettings, metrics: Metrics) -> None:
        """Start without sessions."""
        self.gate, self.settings, self.metrics = gate, settings, metrics
        self.sessions: dict[str, Session] = {}
        self.step_driven: Container[str] = ()
        """Identifiers of the sessions of ``/v1/sessions``, which sockets cannot resume."""
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
        """Send what is queued to all sockets, then close them.

        Args:
            patience_s: maximum time to wait, in seconds; open sockets are then abandoned.
        """
        for conversation in self.conversations:
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
            raise Denied(self.absence())
        return host

    def absence(self) -> Error:
        """The error for requests while there is no host."""
        stops = self.gate.phase == "draining"
        return Error(message=self.gate.words(), code="draining" if stops else "not_ready")

    async def open(self, start: SessionStart, listener: Listener) -> tuple[str, StartConfig]:
        """Open a session.

        Returns:
            Its identifier and parameters.

        Raises:
            Denied: its parameters are not served, or there is no place.
        """
        host = self.host()
        check_allowed(start, host.offer)
        image = start.image_reference
        opening = Opening(
            prompt=start.prompt,
            seed=start.seed,
            num_frames=start.num_frames,
            image=None if image is None else await self._image(image, host.offer),
        )
        id = await answered(host.open, opening, listener)
        return id, config_of(start, host.offer)

    @contextlib.asynccontextmanager
    async def taking_up(self, id: str) -> AsyncIterator[Session]:
        """A session by its token, locked against being resumed by others.

        Raises:
            Denied: there is no host, or the session is driven over HTTP.
        """
        while True:
            session = self._find(id)
            async with session.lock:
                # Another socket may have registered a new session after an earlier one was refused.
                if self.sessions.get(id) is session:
                    yield session
                    return

    def _find(self, id: str) -> Session:
        """A session; one from an earlier server process gets a new feed.

        It is registered at once, so that all clients that resume it share one feed.
        """
        host = self.host()
        if id in self.step_driven:
            text = "This session is controlled over HTTP."
            raise Denied(Error(message=text, code="unknown_session"))
        self.forget_ended()
        session = self.sessions.get(id)
        if session is None:
            feed = Feed(host.offer, self.settings, self.metrics)
            config = config_of(SessionStart(type="session.start"), host.offer)
            session = self.sessions[id] = Session(id, feed, config)
        return session

    async def reap(self) -> None:
        """Periodically drop data for which no client reconnects."""
        while True:
            await asyncio.sleep(self.settings.reap_s)
            self.forget_ended()
            for session in self.sessions.values():
                session.feed.let_go()

    def forget_ended(self) -> None:
        """Drop ended sessions whose last frames no client fetches."""
        for id in [id for id, session in self.sessions.items() if session.feed.abandoned]:
            del self.sessions[id]

    def forget(self, session: Session) -> None:
        """Drop a session."""
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]

    async def _image(self, reference: ImageReference, offer: Offer) -> Any:
        return await answered(image_of, reference.image_url, offer, self.settings)


async def answered(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that may block, in a thread.

    Raises:
        Denied: it was refused or failed.
    """
    return await denying(asyncio.to_thread(function, *arguments))


async def denying(call: Awaitable[T]) -> T:
    """Await a call of the host.

    Raises:
        Denied: it was refused or failed.
    """
    try:
        return await call
    except Full as error:
        raise Denied(Error(message=for_clients(str(error)), code="queue_full")) from error
    except Refused as error:
        raise Denied(Error(message=for_clients(str(error)), code="not_allowed")) from error
    except Exception as error:
        logger.exception("a client's request has failed")
        raise Denied(Error(message=INTERNAL, code="session_failed")) from error


def check_allowed(start: SessionStart, offer: Offer) -> None:
    """Refuse parameters that this server does not serve.

    Raises:
        Denied: with all accepted values.
    """
    allowed = {
        "model": offer.model,
        "width": offer.width,
        "height": offer.height,
        "fps": offer.fps,
        "num_inference_steps": offer.num_inference_steps,
        "guidance_scale": offer.guidance_scale,
    }
    wrong = {
        name: wanted
        for name, value in allowed.items()
        if (wanted := getattr(start, name)) is not None and wanted != value
    }
    if wrong:
        asked = ", ".join(f"{name}={wanted!r}" for name, wanted in wrong.items())
        served = ", ".join(f"{name}={allowed[name]!r}" for name in wrong)
        raise Denied(
            Error(
                message=f"Not served here: {asked}. This server has {served}; leave out what does "
                "not matter.",
                code="not_allowed",
                allowed=allowed,
            )
        )


def config_of(start: SessionStart, offer: Offer) -> StartConfig:
    """The parameters of a session."""
    return StartConfig(
        model=offer.model,
        prompt=offer.prompt if start.prompt is None else start.prompt,
        width=offer.width,
        height=offer.height,
        fps=offer.fps,
        seed=offer.seed if start.seed is None else start.seed,
        num_frames=start.num_frames,
        num_inference_steps=offer.num_inference_steps,
        guidance_scale=offer.guidance_scale,
    )
