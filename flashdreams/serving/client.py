"""A client of live sessions: ``flashdreams-client``, and `LiveClient` for programs.

It needs the extra ``serve``: websockets, and PyAV where pictures are decoded.
"""

import asyncio
import contextlib
import hashlib
import json
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashdreams.runtime.text import quoted
from flashdreams.serving.client_figures import ClientFigures
from flashdreams.serving.pictures import PictureDecoder

RECEIPT_S = 0.25
"""Interval between two receipts, in seconds."""
PING_S = 15.0
MAX_PICTURES = 256
"""Maximum number of received pictures in the queue; beyond it the oldest are dropped."""
NOT_THERE = "The session is over, or none has begun."


@dataclass(frozen=True)
class Received:
    """One picture."""

    frame: int
    """Counted from the beginning of the session's video."""
    epoch: int
    """Raised by reset and rewind."""
    step: int
    """The AR step that made it."""
    data: bytes
    """The received bytes: an MP4 fragment or a JPEG file."""
    pixels: np.ndarray | None
    """``[height, width, 3]`` uint8, RGB; None if it was not decoded."""
    at: float
    """``time.monotonic`` of its arrival."""


class SessionError(Exception):
    """The server refused or ended a session; ``code`` is that of the protocol's error message."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        super().__init__(f"{message['code']}: {message['message']}")
        self.code: str = message["code"]
        self.message = dict(message)


class LiveClient:
    """One session::

        async with LiveClient("http://127.0.0.1:8000") as client:
            await client.start(prompt="a forest")
            await client.control({"keys": "w"})
            async for picture in client.pictures():
                ...

    Receipts and pings are sent automatically. ``resume`` reconnects after a lost socket.
    """

    def __init__(self, url: str, token: str | None = None, *, decode: bool = True) -> None:
        """Create a client without connecting.

        Args:
            url: address of the page.
            token: access token, if the server requires one; ``?token=`` in the URL works too.
            decode: whether to decode pictures; if not, ``pixels`` is None.
        """
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        query = urllib.parse.parse_qs(parts.query)
        self.token = token or next(iter(query.get("token", [])), None)
        scheme = "wss" if parts.scheme in ("https", "wss") else "ws"
        self.address = f"{scheme}://{parts.netloc}/v1/realtime/video"
        self.begin: dict[str, Any] = {}
        """The last ``video.start``."""
        self.done: dict[str, Any] | None = None
        """``session.done``, once received."""
        self.status: dict[str, Any] = {}
        """The last ``session.status``."""
        self.errors: list[dict[str, Any]] = []
        """Error messages that did not end the session."""
        self.figures = ClientFigures()
        self.binary = bytearray()
        """All binary frames since the last ``video.start``, if started with ``keep``."""
        self._decode = decode
        self._keep = False
        self._socket: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: asyncio.Task[None] | None = None
        self._pictures: asyncio.Queue[Received | None] = asyncio.Queue()
        self._pictures.put_nowait(None)
        self._waiting: dict[tuple[str, str | None], asyncio.Future[dict[str, Any]]] = {}
        self._failure: Exception | None = None
        self._shown = -1

    async def __aenter__(self) -> "LiveClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self, *, keep: bool = False, **fields: Any) -> dict[str, Any]:
        """Start a session; an earlier one is left as by `close`.

        Args:
            keep: keep all binary frames in ``binary``, for a recording.
            fields: fields of ``session.start``, such as prompt, seed, num_frames, format.

        Returns:
            ``video.start``. If all places are taken, waits for one.

        Raises:
            SessionError: the server refused it.
            ConnectionError: the socket was lost, or a different kind of server answers.
            ValueError: the address is invalid.
            ImportError: the extra is not installed.
            OSError: no server listens at the address.
        """
        await self.close()
        self._keep, self._shown = keep, -1
        self.begin, self.status = {}, {}
        return await self._open({"type": "session.start", **_given(fields)})

    async def resume(self) -> dict[str, Any]:
        """Resume the session from the first picture that did not arrive.

        Raises:
            SessionError: the server no longer has it.
            ConnectionError: the socket was lost, or no session was started.
        """
        await self.close()
        if not self.begin:
            raise ConnectionError("No session has begun; call start().")
        known = {"token": self.begin["token"], "format": self.begin["format"]}
        return await self._open({"type": "session.resume", "from_frame": self._shown + 1, **known})

    async def pictures(self) -> AsyncIterator[Received]:
        """Yield pictures as they arrive, until the session ends.

        Raises:
            SessionError: the session failed.
            ConnectionError: the socket was lost.
        """
        while (picture := await self._pictures.get()) is not None:
            yield picture
        self._pictures.put_nowait(None)  # for the next call
        if self._failure is not None:
            raise self._failure

    async def control(self, values: Mapping[str, Any]) -> str:
        """Send values to the controller.

        Returns:
            The identifier of the event; ``figures`` records the time to its first picture.
        """
        event_id = uuid.uuid4().hex
        await self.send({"type": "session.control", "event_id": event_id, "values": dict(values)})
        return event_id

    async def prompt(self, text: str) -> str:
        """Change the prompt; see ``control``."""
        return await self._interaction({"prompt": text})

    async def camera(
        self,
        mode: str,
        translation: tuple[float, float, float],
        rotation: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0),
    ) -> str:
        """Move the camera; see ``CameraMotion`` of the protocol, and ``control``."""
        data = {"translation": list(translation), "rotation": list(rotation)}
        camera = {"mode": mode, "data": data}
        return await self._interaction({"multi_modal_data": {"camera": camera}})

    async def keep(self, command: str, name: str | None = None, **fields: Any) -> dict[str, Any]:
        """``"save"``, ``"fork"``, ``"rewind"`` to a name, or ``"reset"``.

        Returns:
            ``session.kept``, once the command was carried out.

        Raises:
            SessionError: the server refused it.
        """
        event_id = uuid.uuid4().hex
        message = {"type": f"session.{command}", "event_id": event_id}
        given = _given({**fields, "name": name})
        return await self._answer("session.kept", event_id, message | given)

    async def pause(self, paused: bool = True) -> None:
        """Pause at the next chunk boundary, or resume."""
        await self.send({"type": "session.pause", "paused": paused})

    async def stop(self) -> dict[str, Any]:
        """End the session unless it has ended.

        Returns:
            ``session.done``.

        Raises:
            SessionError: it has failed.
            ConnectionError: the socket was lost.
        """
        return self.done or await self._answer("session.done", None, {"type": "session.stop"})

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send any message of the protocol; an ``event_id`` in it is measured.

        Raises:
            SessionError: the session has failed.
            ConnectionError: it is over, or the socket was lost.
        """
        self._refuse_over()
        events = {"session.control": message, "session.interaction": message.get("interaction")}
        event = events.get(message["type"]) or {}
        if event.get("event_id") is not None:
            self.figures.sent(event["event_id"])
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(json.dumps(message))
        except ConnectionClosed as error:
            raise self._failure or ConnectionError(f"The connection is lost: {error}") from error

    def _refuse_over(self) -> None:
        if self._reader is None or self._reader.done():
            raise self._failure or ConnectionError(NOT_THERE)

    async def close(self) -> None:
        """Leave; the server keeps the session for ``resume`` until its limits end it."""
        tasks, self._tasks, self._reader = self._tasks, [], None
        for task in tasks:
            task.cancel()
        if self._socket is not None:
            await self._socket.close()
            self._socket = None
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drop(self) -> None:
        """Lose the socket without a word, as a broken network would."""
        if self._socket is not None:
            self._socket.transport.abort()
        await self.close()

    async def _open(self, first: Mapping[str, Any]) -> dict[str, Any]:
        try:
            from websockets.asyncio.client import connect
            from websockets.exceptions import InvalidHandshake, InvalidURI
        except ImportError as error:
            raise ImportError("A client needs: pip install 'flashdreams[serve]'") from error
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.done = self._failure = None
        self._pictures = asyncio.Queue()
        self.binary.clear()
        self.figures.reconnected()
        try:
            self._socket = await connect(
                self.address, additional_headers=headers, max_size=None, compression=None
            )
        except (InvalidURI, ValueError) as error:  # ValueError: of the port
            raise ValueError(
                f"{quoted(self.address)} is not the address of a server, such as "
                "http://127.0.0.1:8000."
            ) from error
        except InvalidHandshake as error:
            raise ConnectionError(f"No live server answers at {self.address}: {error}.") from error
        self._reader = asyncio.create_task(self._read())
        self._tasks = [self._reader, asyncio.create_task(self._tell())]
        return await self._answer("video.start", None, first)

    async def _interaction(self, event: dict[str, Any]) -> str:
        event_id = uuid.uuid4().hex
        interaction = {"event_id": event_id, "event": event}
        await self.send({"type": "session.interaction", "interaction": interaction})
        return event_id

    async def _answer(
        self, kind: str, event_id: str | None, message: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._refuse_over()
        future = asyncio.get_running_loop().create_future()
        self._waiting[kind, event_id] = future
        try:
            # Why the socket was closed is still to be read.
            with contextlib.suppress(ConnectionError, SessionError):
                await self.send(message)
            return await future
        finally:
            self._waiting.pop((kind, event_id), None)

    async def _read(self) -> None:
        from websockets.exceptions import ConnectionClosed

        decoder: PictureDecoder | None = None
        try:
            while self.done is None:
                message = json.loads(await self._socket.recv())
                if message["type"] == "video.start":
                    decoder = PictureDecoder(message["format"]) if self._decode else None
                    self.figures.begin(message["config"]["fps"])
                if message["type"] == "video.chunk_metadata":
                    self._take_picture(message, await self._socket.recv(), decoder)
                else:
                    self._take(message)
        except ConnectionClosed as error:
            self._failure = ConnectionError(f"The connection was lost: {error}")
        except Exception as error:
            self._failure = error
        finally:
            self._leave(self._failure or ConnectionError(NOT_THERE))

    def _take_picture(
        self, message: Mapping[str, Any], data: bytes, decoder: PictureDecoder | None
    ) -> None:
        at, frame = time.monotonic(), message["first_frame"]
        pixels = None if decoder is None else decoder.decode(data)
        if self._keep:
            self.binary += data
        self._shown = max(self._shown, frame)
        if self.figures.first_sha256 is None:
            seen = data if pixels is None else pixels.tobytes()
            self.figures.first_sha256 = hashlib.sha256(seen).hexdigest()
        self.figures.arrived(frame, message["epoch"], at, time.monotonic())
        picture = Received(
            frame, message["epoch"], message["generation_chunk_index"], data, pixels, at
        )
        if self._pictures.qsize() >= MAX_PICTURES:
            self._pictures.get_nowait()
        self._pictures.put_nowait(picture)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "video.start":
            self.begin = message
        elif kind == "session.interaction.applied":
            self.figures.applied(message["event_ids"], message["first_frame"])
        elif kind == "session.status":
            self.status = message
        elif kind == "session.done":
            self.done = message
        elif kind == "error":
            self._take_error(message)
        future = self._waiting.pop((kind, message.get("event_id")), None)
        if future is not None and not future.done():
            future.set_result(message)

    def _take_error(self, message: dict[str, Any]) -> None:
        error, event_id = SessionError(message), message.get("event_id")
        if event_id is not None:
            self.figures.forget(event_id)
            future = self._waiting.pop(("session.kept", event_id), None)
            if future is not None and not future.done():
                future.set_exception(error)
                return
        self.errors.append(message)
        if message["code"] in ("interaction_failed", "bad_message") and self.begin:
            return
        raise error

    def _leave(self, error: Exception) -> None:
        """Stop reading: release all waiting calls with the error."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
        self._pictures.put_nowait(None)

    async def _tell(self) -> None:
        """Send receipts, and pings."""
        told, pinged = -1, time.monotonic()
        with contextlib.suppress(ConnectionError, SessionError):  # the reader says why
            while True:
                await asyncio.sleep(RECEIPT_S)
                if self._shown > told:
                    told = self._shown
                    receipt = {"frame": told, **self.figures.receipt()}
                    await self.send({"type": "session.shown", **receipt})
                if time.monotonic() - pinged > PING_S:
                    pinged = time.monotonic()
                    await self.send({"type": "session.ping"})


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
