"""Transport of the messages and pictures of one client."""

from collections.abc import Awaitable, MutableMapping
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from flashdreams.serving.protocol import VideoChunk
from flashdreams.serving.web.codec import Format


class Gone(OSError):
    """The connection is closed or lost."""


class Transport(Protocol):
    """An open connection to one client."""

    format: Format | None
    """Format of all its pictures; None: the client chooses."""

    scope: MutableMapping[str, Any]
    """ASGI scope of the request that opened it."""

    async def receive(self) -> str | bytes:
        """The client's next message.

        Raises:
            Gone: the connection is closed.
        """

    async def send_text(self, data: str) -> None:
        """Send a message; returns when the next one can be sent."""

    async def send_picture(self, message: VideoChunk, picture: Any) -> None:
        """Send a picture after its metadata; returns when the next one can be sent.

        Args:
            message: the metadata; fields that depend on the transport are set here.
            picture: from ``Encoder.wrap``.
        """

    async def close(self, code: int) -> None:
        """Close it after everything was sent.

        Args:
            code: WebSocket close code; other transports ignore it.
        """


class SocketTransport:
    """An accepted WebSocket; a picture is a binary frame after its metadata."""

    format: Format | None = None

    def __init__(self, socket: WebSocket) -> None:
        """Wrap a WebSocket."""
        self._socket = socket
        self.scope: MutableMapping[str, Any] = socket.scope

    async def receive(self) -> str | bytes:
        """See `Transport`."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise Gone("The WebSocket is closed.")
        text = message.get("text")
        return message.get("bytes") or b"" if text is None else text

    async def send_text(self, data: str) -> None:
        """See `Transport`."""
        await _sent(self._socket.send_text(data))

    async def send_picture(self, message: VideoChunk, picture: Any) -> None:
        """See `Transport`; ``picture`` is bytes."""
        message.byte_length = len(picture)
        await self.send_text(message.model_dump_json())
        await _sent(self._socket.send_bytes(picture))

    async def close(self, code: int) -> None:
        """See `Transport`."""
        await self._socket.close(code)


async def _sent(call: Awaitable[None]) -> None:
    try:
        await call
    except (WebSocketDisconnect, RuntimeError) as error:
        raise Gone("The WebSocket is closed.") from error
