"""Limits and addresses of the web side."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from flashdreams.infra.ranges import check_range

SHORTEST_S = 1e-3
"""Minimum of timeouts and intervals that must not be zero."""

ICE_SERVER = re.compile(
    r"(?P<scheme>stun(?=:[^@]+$)|turns?(?=:.+@))"
    r":((?P<user>[^:@]+):(?P<password>[^@]+)@)?(?P<address>[\w.-]+(:\d{1,5})?(\?transport=(udp|tcp))?)"
)
"""A STUN server, or a TURN server with its credentials."""


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Address, access and per-client limits of the server."""

    host: str = "127.0.0.1"
    """Address to listen on; an address other than loopback requires ``--token``."""
    port: int = 8000
    """TCP port; 0 picks a free one and prints it."""
    token: str | None = None
    """Token that clients must send; None: anyone who reaches the address may connect."""
    allowed_origins: tuple[str, ...] = ()
    """Further origins whose pages may connect, such as ``https://example.org``."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names that requests to a loopback server may use, such as that of a proxy in
    front of it."""
    image_hosts: tuple[str, ...] = ()
    """Hosts from which ``image_url`` may be fetched by https; empty: ``data:`` only."""
    encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto"
    """H.264 encoder; auto: NVENC if CUDA is available, else libx264."""
    ice_servers: tuple[str, ...] = ()
    """ICE servers for WebRTC: ``stun:HOST:PORT``, ``turn:USER:PASSWORD@HOST:PORT``."""
    start_s: float = 10.0
    """Timeout for the first message of a socket, in seconds."""
    stall_s: float = 60.0
    """Timeout without a message after which a client counts as disconnected, in seconds."""
    slow_s: float = 10.0
    """Timeout after which a client that reads nothing is disconnected, in seconds."""
    waiting_pictures: int = 2
    """Encoded frames queued per socket; further frames are dropped."""
    unshown_s: float = 2.0
    """Most video sent ahead of receipts, in seconds, to clients that send receipts."""
    keep_s: float = 10.0
    """Most video without a receipt that is kept for a reconnect, in seconds."""
    keep_bytes: int = 64 * 2**20
    """The same limit in bytes, per session."""
    keep_detached_s: float = 120.0
    """Time without a socket after which that video is dropped, in seconds; the session is kept."""
    stale_s: float = 0.1
    """Frames are skipped if they would delay the response to an event by more, in seconds."""
    messages_per_s: float = 200.0
    """Sustained message rate per client; faster clients are delayed, then disconnected."""
    flood_s: float = 5.0
    """Seconds above that rate after which a client is disconnected."""
    max_message_bytes: int = 64 * 2**10
    """Largest message, except for a first one with an image."""
    max_upload_bytes: int = 8 * 2**20
    """Largest image file, in bytes."""
    max_sockets: int = 64
    """Open sockets, with or without a session."""
    idle_s: float = 600.0
    """Timeout without a request after which a step-driven session is closed, in seconds."""
    reap_s: float = 5.0
    """Interval between checks for sessions and frames to drop, in seconds."""
    step_s: float = 120.0
    """Timeout of a request for one AR step, in seconds."""

    def __post_init__(self) -> None:
        for server in self.ice_servers:
            if not ICE_SERVER.fullmatch(server):
                raise ValueError(
                    f"--ice-servers {server.rpartition('@')[2]} is no ICE server; allowed: "
                    "stun:HOST:PORT, turn:USER:PASSWORD@HOST:PORT, turns:USER:PASSWORD@HOST:PORT."
                )
        self._check_limits()
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if origin != "null" and (not parts.scheme or not parts.netloc or parts.path):
                raise ValueError(
                    f"--allowed-origins {origin} is no origin; write one as https://example.org, "
                    "without a path."
                )
        if not 0 <= self.port <= 65535:
            raise ValueError(
                f"--port {self.port} is no TCP port; allowed: 1 to 65535, and 0 for a free one."
            )
        if not self.token and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines, so clients need a token. "
                "Give --token with some 32 random characters, or listen on 127.0.0.1 and use an "
                "SSH tunnel."
            )

    def _check_limits(self) -> None:
        counts = ("waiting_pictures", "max_message_bytes", "max_upload_bytes", "max_sockets")
        check_range(self, *counts, as_flags=True)
        above_zero = ("start_s", "stall_s", "slow_s", "messages_per_s", "reap_s", "step_s")
        check_range(self, *above_zero, least=SHORTEST_S, as_flags=True)
        rest = ("unshown_s", "keep_s", "keep_detached_s", "stale_s", "flood_s", "idle_s")
        check_range(self, "keep_bytes", *rest, least=0, as_flags=True)

    @property
    def max_socket_bytes(self) -> int:
        """Largest WebSocket message: an upload in base64 beside the other fields."""
        return self.max_upload_bytes * 4 // 3 + self.max_message_bytes


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
