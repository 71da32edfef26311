"""Limits and addresses of the web side."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

ICE_SERVER = re.compile(
    r"(?P<scheme>stun(?=:[^@]+$)|turns?(?=:.+@))"
    r":((?P<user>[^:@]+):(?P<password>[^@]+)@)?(?P<address>[\w.-]+(:\d{1,5})?(\?transport=(udp|tcp))?)"
)
"""A STUN server, or a TURN server with its credentials."""


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Where the server listens, whom it lets in, and how much it takes from each client."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs ``token``."""
    port: int = 8000
    """TCP port; 0 takes a free one, which is printed."""
    token: str | None = None
    """What clients have to know; None lets everyone in who reaches the address."""
    allowed_origins: tuple[str, ...] = ()
    """Origins beside the server's own whose pages may connect, such as ``https://example.org``."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside localhost under which a loopback server may be asked for, such as those of a
    proxy in front of it."""
    image_hosts: tuple[str, ...] = ()
    """Hosts from which ``image_url`` may be fetched by https; empty: ``data:`` only."""
    encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto"
    """H.264 encoder; auto tries NVENC where CUDA is, and libx264 otherwise."""
    ice_servers: tuple[str, ...] = ()
    """For WebRTC beyond one network: ``stun:HOST:PORT``, ``turn:USER:PASSWORD@HOST:PORT``."""
    start_s: float = 10.0
    """Seconds within which a socket has to send its first message."""
    stall_s: float = 60.0
    """Seconds without a message after which a client is taken for dead."""
    slow_s: float = 10.0
    """Seconds after which a client is cut that reads nothing."""
    waiting_pictures: int = 2
    """Encoded pictures that may wait for a socket; at this number the next ones are dropped."""
    unshown_s: float = 2.0
    """Seconds of pictures that may be sent without a receipt, to clients that send receipts."""
    keep_s: float = 10.0
    """Seconds of pictures without a receipt that are kept for a reconnect."""
    keep_bytes: int = 64 * 2**20
    """Bytes of such pictures of one session."""
    keep_detached_s: float = 120.0
    """Seconds without a socket after which these are let go; the session itself may wait longer."""
    stale_s: float = 0.1
    """Older pictures are left out if they would delay the answer to an event for longer."""
    messages_per_s: float = 200.0
    """Messages of one client in the long run; more are read later, and at last refused."""
    flood_s: float = 5.0
    """Seconds of sending too fast after which a client is cut."""
    max_message_bytes: int = 64 * 2**10
    """Largest message, but for a first one that carries an image."""
    max_upload_bytes: int = 8 * 2**20
    """Largest image, as the bytes of its file."""
    max_sockets: int = 64
    """Sockets at a time, whether they have a session or not."""
    idle_s: float = 600.0
    """Seconds without a request after which a step-driven session is closed."""
    reap_s: float = 5.0
    """Seconds between two looks for what is to be let go."""
    step_s: float = 120.0
    """Seconds that a request for one AR step may take."""

    def __post_init__(self) -> None:
        for server in self.ice_servers:
            if not ICE_SERVER.fullmatch(server):
                raise ValueError(
                    f"--ice-servers {server.rpartition('@')[2]} is no ICE server; allowed: "
                    "stun:HOST:PORT, turn:USER:PASSWORD@HOST:PORT, turns:USER:PASSWORD@HOST:PORT."
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

    @property
    def max_socket_bytes(self) -> int:
        """Largest WebSocket message: an upload in base64 beside the other fields."""
        return self.max_upload_bytes * 4 // 3 + self.max_message_bytes


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
