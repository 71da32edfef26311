"""The conversation with one client, from its first to its last message."""

import asyncio
import contextlib
import logging
import threading
import uuid
from typing import Any

from flashdreams.serving.interface import Refused
from flashdreams.serving.protocol import (
    Done,
    Error,
    Pong,
    SessionResume,
    SessionStart,
    Status,
    VideoStart,
)
from flashdreams.serving.web.accounts import INTERNAL, Accounts, Denied, Session, answered
from flashdreams.serving.web.codec import new_encoder
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.gate import for_clients
from flashdreams.serving.web.guard import TokenBucket, knows_token
from flashdreams.serving.web.messages import FIRST, read_message
from flashdreams.serving.web.outlet import Outlet, TooSlow
from flashdreams.serving.web.pump import pump
from flashdreams.serving.web.requests import Requests
from flashdreams.serving.web.transport import Gone, Transport

logger = logging.getLogger(__name__)

STATUS_S = 1.0
FLUSH_S = 2.0
"""Timeout for the last messages of a socket, in seconds."""
_CLOSE_CODES = {"unauthorized": 1008, "draining": 1012, "not_ready": 1013, "queue_full": 1013}
NORMAL, POLICY, INTERNAL_ERROR = 1000, 1008, 1011


class Conversation:
    """Reads a client's messages; when it disconnects, its session waits or ends."""

    def __init__(self, transport: Transport, accounts: Accounts) -> None:
        """Store the arguments.

        Args:
            transport: an accepted WebSocket, or a peer connection that is being established.
            accounts: sessions of the server.
        """
        self.transport, self.accounts = transport, accounts
        self.settings, self.metrics = accounts.settings, accounts.metrics
        self.format: Any = "m4s"
        self.session: Session[Feed] | None = None
        self.begun = False
        self.resumed_at: int | None = None
        request_id = f"video-{uuid.uuid4().hex}"
        self.outlet = Outlet(transport, request_id, self.settings, self.metrics)
        self._bucket = TokenBucket(self.settings.messages_per_s)

    @property
    def feed(self) -> Feed:
        """Feed of the session."""
        assert self.session is not None
        return self.session.listener

    async def run(self) -> None:
        """Run the conversation; returns when the socket is closed."""
        writer = asyncio.create_task(self.outlet.run())
        last: Done | Error | None = None
        try:
            if not knows_token(self.transport.scope, self.settings):
                raise Denied("A token is required.", "unauthorized")
            await self._open(await self._first())
            last = await self._carry_on(writer)
        except Denied as denied:
            last = denied.error
        except Gone:
            pass
        except Exception:
            logger.exception("a conversation has failed")
            last = Denied(INTERNAL, "session_failed").error
        finally:
            self._leave(last)
        await self._close(last, writer)

    async def _first(self) -> SessionStart | SessionResume:
        try:
            text = await asyncio.wait_for(
                self._receive(self.settings.max_socket_bytes), self.settings.start_s
            )
        except asyncio.TimeoutError:
            text = f"session.start must arrive within {self.settings.start_s:g} s."
            raise Denied(text, "timeout") from None
        large = len(text) > self.settings.max_message_bytes
        message = await asyncio.to_thread(read_message, text) if large else read_message(text)
        self.metrics.messages(message.type).inc()
        if not isinstance(message, FIRST):
            text = f"The first message is session.start or session.resume, not {message.type}."
            raise Denied(text, "bad_message")
        return message

    async def _receive(self, limit: int) -> str:
        text = await self.transport.receive()
        if isinstance(text, bytes):
            raise Denied("Messages are JSON in text frames.", "bad_message")
        if len(text) > limit:
            raise Denied(f"The limit is {limit:,} bytes.", "bad_message")
        return text

    async def _open(self, first: SessionStart | SessionResume) -> None:
        self.format = self.transport.format or first.format
        if isinstance(first, SessionStart):
            feed = self._new_feed()
            feed.connect(self.outlet)
            self.session = await self.accounts.open(first, feed)
            return
        async with self.accounts.taking_up(first.token, Feed, self._new_feed) as session:
            feed, before = session.listener, session.listener.outlet
            if before is not None:  # send it before its thread notices
                text = "The session was resumed by another connection."
                before.post(Error(message=text, code="unknown_session"))
            feed.connect(self.outlet)
            if before is not None:
                before.finish()
            following = await self._attach(session, first.from_frame)
            kept = feed.go_back(first.from_frame)
            self.resumed_at = following if kept is None else kept
            self.session = session
        if feed.state not in ("waiting", "parked"):
            self.outlet.set_running()

    def _new_feed(self) -> Feed:
        return Feed(self.accounts.host().offer, self.settings, self.metrics)

    async def _attach(self, session: Session[Feed], from_frame: int) -> int:
        """Resume the session in the host; a finished one may still have unsent pictures here."""
        feed, accounts = session.listener, self.accounts
        if feed.end is not None:
            return from_frame
        try:
            following = await answered(accounts.host().attach, session.id, feed, from_frame)
            session.attached = True
            return following
        except Denied as denied:
            if denied.error.code == "not_allowed" and accounts.gate.host is not None:
                known = accounts.sessions.get(session.id) is session
                if known and feed.state != "waiting":
                    return from_frame  # it has just ended; on_end follows
                denied.error.code = "unknown_session"
            feed.disconnect(self.outlet)
            accounts.forget(session)
            accounts.host()  # says better why there is none
            raise

    async def _carry_on(self, writer: asyncio.Task[None]) -> Done | None:
        """Run until the session or the socket ends.

        Returns:
            The last message; None if the socket is gone.

        Raises:
            Denied: the last message is an error.
        """
        assert self.session is not None
        requests = Requests(self.accounts.host(), self.session.id, self.feed)
        reader = asyncio.create_task(self._read(requests))
        others = [asyncio.create_task(self._begin()), asyncio.create_task(requests.work())]
        tasks = {writer, reader, *others}
        try:
            while not writer.done() and not reader.done():
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {writer}:
                    task.result()
        finally:
            for task in (reader, *others):
                task.cancel()
            await asyncio.gather(reader, *others, return_exceptions=True)
        if reader.done() and not reader.cancelled():
            return reader.result()
        try:
            writer.result()
        except TooSlow:
            text = f"Nothing was read for {self.settings.slow_s:g} s."
            raise Denied(text, "too_slow") from None
        except OSError:  # disconnected
            return None
        return self._end()

    def _end(self) -> Done | None:
        """The last message, once everything else was sent.

        Raises:
            Denied: it is an error.
        """
        if self.accounts.gate.phase == "draining":
            raise self.accounts.absence()
        if self.outlet.failed:
            raise Denied(INTERNAL, "session_failed")
        end = self.feed.end
        if self.feed.outlet is not self.outlet or end is None:
            return None
        if end.error is not None:
            raise Denied(end.error, "session_failed")
        return self._done(end.stopped)

    def _done(self, stopped: bool) -> Done:
        # its ``chunks`` are counted when it is sent, for a picture may be on the way
        return Done(request_id=self.outlet.request_id, chunks=0, stopped=stopped)

    async def _begin(self) -> None:
        """Wait for the session's place, send ``video.start``, start the pictures, send figures."""
        await self.outlet.running.wait()
        session, offer, host = self.session, self.feed.offer, self.accounts.host()
        assert session is not None
        if self.feed.end is not None and self.feed.end.error is not None:
            self.outlet.finish()
            return
        size = (offer.width, offer.height, offer.fps)
        try:
            encoder = await asyncio.to_thread(
                new_encoder, self.format, *size, self.settings.encoder
            )
        except ValueError as error:
            allowed = {"format": ["jpeg"]}
            raise Denied(for_clients(str(error)), "not_allowed", allowed=allowed) from error
        self.feed.saved = host.saved(session.id)
        self.outlet.post(
            VideoStart(
                **vars(offer),  # controls, prompts_change, commands
                request_id=self.outlet.request_id,
                format=self.format,
                config=session.config,
                token=session.id,
                resumed=self.resumed_at is not None,
                first_frame=self.resumed_at or 0,
                codec=encoder.codec,
                saved=self.feed.saved,
            )
        )
        self.begun = True
        name, arguments = "flashdreams-encoder", (self.feed, self.outlet, encoder)
        threading.Thread(target=pump, name=name, args=arguments, daemon=True).start()
        while True:
            await asyncio.sleep(STATUS_S)
            with contextlib.suppress(Refused):  # it has just ended
                self.outlet.post(self._status())

    def _status(self) -> Status:
        assert self.session is not None
        figures = vars(self.accounts.host().figures(self.session.id))
        state = "paused" if figures["state"] == "ended" else figures["state"]
        return Status(
            **{**figures, "state": state},
            request_id=self.outlet.request_id,
            key_to_photon_p50_ms=self.feed.latency_ms(0.50),
            key_to_photon_p99_ms=self.feed.latency_ms(0.99),
            unshown_frames=self.outlet.unshown,
        )

    async def _read(self, requests: Requests) -> Done | None:
        """Read until the client stops or disconnects.

        Raises:
            Denied: the client violates the protocol.
        """
        flooding = 0.0
        while True:
            try:
                receiving = self._receive(self.settings.max_message_bytes)
                text = await asyncio.wait_for(receiving, self.settings.stall_s)
                message = read_message(text)
                self.metrics.messages(message.type).inc()
                if message.type == "session.stop":
                    return self._done(stopped=True)
                self._take(message, requests)
            except asyncio.TimeoutError:
                text = f"Nothing was heard for {self.settings.stall_s:g} s; send session.ping."
                raise Denied(text, "timeout") from None
            except Gone:
                return None
            except Denied as denied:
                self._refuse(denied.error)
            wait = self._bucket.take()
            flooding = flooding + wait if wait else 0.0
            if flooding > self.settings.flood_s:
                text = f"More than {self.settings.messages_per_s:g} messages per second."
                raise Denied(text, "bad_message")
            await asyncio.sleep(wait)
            while self.outlet.crowded:
                await asyncio.sleep(0.1)

    def _take(self, message: Any, requests: Requests) -> None:
        kind = message.type
        if kind == "session.ping":
            self.outlet.post(Pong())
        elif kind == "session.key":
            self.outlet.ask_for_key()
        elif kind == "session.shown":
            self.feed.shown(message.frame, message.key_to_photon_ms, message.dropped)
        elif kind == "session.pause":
            requests.pause(message.paused)
        elif isinstance(message, FIRST):
            raise Denied("The session has already started.", "bad_message")
        else:
            requests.take(message)

    def _refuse(self, error: Error) -> None:
        self.metrics.errors(error.code).inc()
        error.request_id = self.outlet.request_id
        self.outlet.post(error)

    def _leave(self, last: Done | Error | None) -> None:
        """After the socket is closed: let the session wait for another one, or end it."""
        session, host = self.session, self.accounts.gate.host
        if session is None or not self.feed.disconnect(self.outlet):
            return
        over = self.feed.end is not None
        if last is not None and (over or isinstance(last, Done)):
            self.accounts.forget(session)
        if over or host is None:
            return
        if isinstance(last, Done) or not (self.begun or self.resumed_at is not None):
            host.close(session.id)
        else:
            host.detach(session.id)

    async def _close(self, last: Done | Error | None, writer: asyncio.Task[None]) -> None:
        self.outlet.close()
        code = NORMAL
        if isinstance(last, Error):
            self.metrics.errors(last.code).inc()
            last.request_id = self.outlet.request_id
            code = _CLOSE_CODES.get(last.code, POLICY)
            code = INTERNAL_ERROR if last.code == "session_failed" else code
        _, late = await asyncio.wait({writer}, timeout=FLUSH_S)
        if late:
            writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        if isinstance(last, Done):
            last.chunks = self.outlet.sent_chunks
        with contextlib.suppress(Exception):
            if last is not None:
                text = last.model_dump_json()
                await asyncio.wait_for(self.transport.send_text(text), FLUSH_S)
            await asyncio.wait_for(self.transport.close(code), FLUSH_S)
