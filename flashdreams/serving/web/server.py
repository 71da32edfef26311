"""A web server in a separate thread."""

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import threading
import time

import uvicorn

from flashdreams.runtime.text import reason_of
from flashdreams.serving.interface import Host
from flashdreams.serving.web.app import create_app
from flashdreams.serving.web.gate import Gate
from flashdreams.serving.web.settings import WebSettings

START_S = 30.0
STOP_S = 10.0
GOODBYE_S = 2.0
LINGER_S = 20
"""Seconds after which the kernel drops a client that reads nothing, even a close message."""
UNSENT_BYTES = 16 * 2**10
"""Unsent data of a socket that the kernel may buffer; the rest waits where it can be dropped."""

logger = logging.getLogger(__name__)


class WebServer:
    """Serves page, WebSocket and HTTP; starts before the model is loaded.

    ``start``, ``serve`` and ``stop`` must be called from the turn loop's thread.
    """

    def __init__(self, settings: WebSettings) -> None:
        """Create a server that does not listen yet."""
        self.settings = settings
        self.gate = Gate()
        self.port = settings.port
        """The port in use, once it listens."""
        self._app = create_app(self.gate, settings)
        self._server = uvicorn.Server(_config(self._app, settings))
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """URL of the page, without the token."""
        host = self.settings.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"http://{host}:{self.port}/"

    def start(self) -> None:
        """Listen, in a thread; returns once connections are accepted.

        Raises:
            ValueError: the server cannot listen on the address.
        """
        listening = _listen(self.settings)
        self.port = listening.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="flashdreams-web", daemon=True
        )
        self._thread.start()
        limit = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > limit:
                raise RuntimeError("The web server has not started; see the log.")
            time.sleep(0.01)

    def serve(self, host: Host) -> None:
        """Set the host and accept sessions."""
        self.gate.serve(host)

    def stop(self) -> None:
        """Tell all clients that the server stops, close their sockets and end the thread."""
        self.gate.enter("draining")
        if self._thread is None:
            return
        if self._thread.is_alive():
            goodbye = self._app.state.accounts.finish_all(GOODBYE_S)
            with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
                asyncio.run_coroutine_threadsafe(goodbye, self._app.state.loop).result(
                    3 * GOODBYE_S
                )
        self._server.should_exit = True
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(STOP_S)

    def _run(self, listening: socket.socket) -> None:
        try:
            self._server.run([listening])
        except BaseException:
            logger.exception("the web server has ended")
        finally:
            listening.close()


def _config(app: object, settings: WebSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="asyncio",
        log_config=None,
        access_log=False,  # URLs may contain tokens
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=settings.max_socket_bytes,
        ws_per_message_deflate=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _listen(settings: WebSettings) -> socket.socket:
    host, port = settings.host.strip("[]"), settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only with an explicit protocol does asyncio turn off Nagle's algorithm, which would delay
    # every picture after a receipt by 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these options.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LINGER_S * 1000)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"--host {host} --port {port}: {reason_of(error)}. --port 0 takes a free port."
        ) from error
    return listening
