"""A client of ``WS /v1/realtime/video`` that knows the protocol from its description alone."""

import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from flashdreams.serving.protocol import schema
from flashdreams.serving.web.server import WebServer
from flashdreams.serving.web.settings import WebSettings
from tests.unit.serving.fake_host import FakeHost, frame_of

PATIENCE_S = 30.0
"""For a hang; messages take milliseconds."""

_VALIDATOR = jsonschema.Draft202012Validator(schema()["server"])


@contextmanager
def web(host: FakeHost, **settings: Any) -> Iterator[WebServer]:
    """A server on a free port with this loop behind it.

    By itself it leaves out no picture of a client that is slow because the machine is.
    """
    server = WebServer(WebSettings(**({"port": 0, "waiting_pictures": 1000} | settings)))
    server.start()
    server.serve(host)
    try:
        yield server
    finally:
        server.stop()
        host.stop()


class PlainClient:
    """One socket; every text frame is checked against the published schema."""

    def __init__(
        self, server: WebServer, query: str = "", name: str | None = None, **options: Any
    ) -> None:
        address = server.url.replace("http", "ws") + "v1/realtime/video" + query
        if name is not None:  # of the server, as this client would resolve it
            address = address.replace("127.0.0.1", name)
            options["sock"] = socket.create_connection(("127.0.0.1", server.port))
        # What it has not read may be in front of the answer to its close message.
        self._connecting = connect(address, max_size=None, close_timeout=0.5, **options)
        self.socket: ClientConnection = self._connecting.__enter__()
        self.messages: list[dict[str, Any]] = []
        self.media: list[bytes] = []

    def __enter__(self) -> "PlainClient":
        return self

    def __exit__(self, *error: object) -> None:
        self._connecting.__exit__(None, None, None)

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def receive(self) -> dict[str, Any]:
        """The next message; of a picture with its bytes under ``"data"``."""
        text = self.socket.recv(PATIENCE_S)
        assert isinstance(text, str), "a binary frame without its metadata"
        message = json.loads(text)
        _VALIDATOR.validate(message)
        self.messages.append(message)
        if message["type"] == "video.chunk_metadata":
            data = self.socket.recv(PATIENCE_S)
            assert isinstance(data, bytes), "metadata without a binary frame"
            assert len(data) == message["byte_length"]
            self.media.append(data)
            return {**message, "data": data}
        return message

    def until(self, type: str, **fields: Any) -> dict[str, Any]:
        """Read on until a message of this type with these fields."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = self.receive()
            wanted = {name: message.get(name) for name in fields} == fields
            if message["type"] == type and wanted:
                return message
        raise TimeoutError(f"no {type} {fields} in {PATIENCE_S} s")

    def pictures(self, count: int) -> list[dict[str, Any]]:
        """The metadata of the next pictures."""
        return [self.until("video.chunk_metadata") for _ in range(count)]

    def close_code(self) -> int:
        """Read on until the server closes the socket."""
        try:
            while True:
                self.receive()
        except ConnectionClosed as closed:
            assert closed.rcvd is not None, "closed without a word"
            return closed.rcvd.code

    def of_type(self, type: str) -> list[dict[str, Any]]:
        """Messages so far."""
        return [message for message in self.messages if message["type"] == type]

    def start(self, **fields: Any) -> dict[str, Any]:
        """Begin a session and wait for ``video.start``."""
        self.send("session.start", **fields)
        return self.until("video.start")


def shown_frames(media: list[bytes]) -> list[int]:
    """The numbers modulo 32 of the pictures in binary frames that are one file."""
    import av

    with av.open(io.BytesIO(b"".join(media))) as file:
        return [
            frame_of(float(frame.to_ndarray(format="rgb24")[8:-8, 8:-8].mean()))
            for frame in file.decode(video=0)
        ]
