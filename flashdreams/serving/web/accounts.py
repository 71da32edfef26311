"""The sessions that the web side knows of, and what opens them."""

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
    """A request that is answered by an error message."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass
class Session:
    """One session, as the web side knows it."""

    id: str
    feed: Feed
    config: StartConfig
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a socket takes it up."""


class Accounts:
    """All sessions of a server; belongs to the event loop's thread."""

    def __init__(self, gate: Gate, settings: WebSettings, metrics: Metrics) -> None:
        """Begin without sessions."""
        self.gate, self.settings, self.metrics = gate, settings, metrics
        self.sessions: dict[str, Session] = {}
        self.step_driven: Container[str] = ()
        """Identifiers of the sessions of ``/v1/sessions``, which no socket takes up."""
        self.conversations: set[Any] = set()
        """Of the connections that are open."""

    @property
    def full(self) -> bool:
        """No more connections are taken."""
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
        """Let all sockets end behind what waits for them.

        Args:
            patience_s: after which those that are still open are left to themselves.
        """
        for conversation in self.conversations:
            conversation.outlet.finish()
        end = time.monotonic() + patience_s
        while self.conversations and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def host(self) -> Host:
        """The loop.

        Raises:
            Denied: there is none yet, or not any more.
        """
        host = self.gate.host
        if host is None:
            raise Denied(self.absence())
        return host

    def absence(self) -> Error:
        """Why there is no loop."""
        stops = self.gate.phase == "draining"
        return Error(message=self.gate.words(), code="draining" if stops else "not_ready")

    async def open(self, start: SessionStart, listener: Listener) -> tuple[str, StartConfig]:
        """Open a session.

        Returns:
            Its identifier, and the values that it runs with.

        Raises:
            Denied: it is not served like that, or there is no place.
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
        """A session by its token, which nobody else takes up meanwhile.

        Raises:
            Denied: there is no loop, or the session is driven over HTTP.
        """
        while True:
            session = self._find(id)
            async with session.lock:
                # Not if the socket before this one was refused: then others may have come since.
                if self.sessions.get(id) is session:
                    yield session
                    return

    def _find(self, id: str) -> Session:
        """A session; one that a server before this one had gets a new feed.

        It is registered at once, so that all who come for it meet in one feed.
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
        """Drop what no client comes back for, periodically."""
        while True:
            await asyncio.sleep(self.settings.reap_s)
            self.forget_ended()
            for session in self.sessions.values():
                session.feed.let_go()

    def forget_ended(self) -> None:
        """Drop sessions that have ended and whose last frames no client fetches."""
        for id in [id for id, session in self.sessions.items() if session.feed.abandoned]:
            del self.sessions[id]

    def forget(self, session: Session) -> None:
        """Drop a session."""
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]

    async def _image(self, reference: ImageReference, offer: Offer) -> Any:
        return await answered(image_of, reference.image_url, offer, self.settings)


async def answered(function: Callable[..., T], *arguments: Any) -> T:
    """Call what may take its time, in a thread.

    Raises:
        Denied: it was refused, or has failed.
    """
    return await denying(asyncio.to_thread(function, *arguments))


async def denying(call: Awaitable[T]) -> T:
    """Await a call of the loop.

    Raises:
        Denied: it was refused, or has failed.
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
    """Refuse values that this server does not serve.

    Raises:
        Denied: with all the values that would have been taken.
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
    """The values that a session runs with."""
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
