"""One WebRTC connection, through aiortc."""

import asyncio
import contextlib
import logging
import time
from collections.abc import MutableMapping
from fractions import Fraction
from functools import partial
from typing import Any

from flashdreams.serving.protocol import VideoChunk
from flashdreams.serving.web.codec import Format
from flashdreams.serving.web.settings import ICE_SERVER, WebSettings
from flashdreams.serving.web.transport import Gone

CLOCK_RATE = 90_000
"""Ticks per second of RTP video timestamps."""
MAX_CANDIDATES = 64
"""Maximum number of candidates in one offer."""
BUFFERED_BYTES = 256 * 2**10
"""Bytes of messages buffered in the data channel; the rest waits where it can be dropped."""
CLOSE_S = 5.0
_EVERY_ADDRESS = ("0.0.0.0", "::")

logger = logging.getLogger(__name__)


class Peer:
    """Messages on the data channel that the client opens, pictures on one video track.

    Used only on the event loop's thread; aiortc encodes pictures in threads of that loop.
    """

    format: Format | None = "webrtc"

    def __init__(self, scope: MutableMapping[str, Any], settings: WebSettings) -> None:
        """Create an unconnected peer.

        Args:
            scope: ASGI scope of the request with the offer.
            settings: addresses and limits.

        Raises:
            ImportError: aiortc is not installed.
        """
        from aiortc import RTCConfiguration, RTCPeerConnection

        self.scope, self._settings = scope, settings
        servers = [_ice_server(text) for text in settings.ice_servers]
        # without a list aiortc uses a public STUN server
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        self._connection.on("datachannel", self._take_channel)
        self._connection.on("connectionstatechange", self._look)
        self._track = _new_track()
        self._channel: Any = None
        self._inbox: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._inbox_bytes = 0
        self._gone = asyncio.Event()
        self._drained = asyncio.Event()
        self._began: float | None = None
        self._timestamp = -1

    async def answer(self, sdp: str) -> str:
        """Answer the client's offer; the connection is then established in the background.

        Args:
            sdp: one section of received video and one of data, with candidates.

        Returns:
            SDP with all candidates of this side.

        Raises:
            ValueError: it is not such an offer.
        """
        from aiortc import RTCSessionDescription

        offer = RTCSessionDescription(_checked_offer(sdp), "offer")
        connection = self._connection
        try:
            _check_links(offer.sdp)
            await connection.setRemoteDescription(offer)
            connection.addTrack(self._track)
            (video,) = connection.getTransceivers()
            video.direction = "sendonly"  # or received pictures would never be consumed
            if self._settings.host not in _EVERY_ADDRESS:
                _listen_on(connection, self._settings.host.strip("[]"))
            await connection.setLocalDescription(await connection.createAnswer())
        except Exception as error:  # aiortc has no specific exception for a wrong offer
            logger.info("an offer cannot be answered: %r", error)
            raise ValueError("This offer cannot be answered: its SDP is wrong.") from error
        if video.currentDirection != "sendonly":
            raise ValueError("The video section of the offer has to be recvonly or sendrecv.")
        return str(connection.localDescription.sdp)

    async def receive(self) -> str | bytes:
        """See `Transport`."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
            raise Gone("The data channel is closed.")
        self._inbox_bytes -= len(message)
        return message

    async def send_text(self, data: str) -> None:
        """See `Transport`."""
        from aiortc.exceptions import InvalidStateError

        while self._is_open and self._channel.bufferedAmount > BUFFERED_BYTES:
            self._drained.clear()
            await self._drained.wait()
        if not self._is_open:
            raise Gone("There is no data channel.")
        try:
            self._channel.send(data)
        except (InvalidStateError, ValueError) as error:  # ValueError: more than the peer takes
            raise Gone(f"The data channel takes no message: {error}") from error

    async def send_picture(self, message: VideoChunk, picture: Any) -> None:
        """See `Transport`; ``picture`` is a ``VideoFrame`` of PyAV."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        ticks = round((now - self._began) * CLOCK_RATE)
        self._timestamp = max(self._timestamp + 1, ticks)
        message.media_timestamp = picture.pts = self._timestamp
        picture.time_base = Fraction(1, CLOCK_RATE)
        await self.send_text(message.model_dump_json())
        await self._track.pictures.put(picture)

    async def close(self, code: int) -> None:
        """See `Transport`."""
        if self._is_open:
            await self._track.pictures.join()
            self._channel.close()
            await self._gone.wait()

    async def hang_up(self) -> None:
        """Release sockets and threads."""
        self._lose()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._connection.close(), CLOSE_S)

    @property
    def _is_open(self) -> bool:
        return self._channel is not None and not self._gone.is_set()

    def _take_channel(self, channel: Any) -> None:
        reliable = channel.maxRetransmits is None and channel.maxPacketLifeTime is None
        if self._channel is not None or not channel.ordered or not reliable:
            channel.close()
            return
        self._channel = channel
        channel.bufferedAmountLowThreshold = BUFFERED_BYTES // 2
        channel.on("bufferedamountlow", self._drained.set)
        channel.on("message", self._take_message)
        channel.on("close", self._lose)

    def _take_message(self, message: str | bytes) -> None:
        """Queue a message within a limit, because aiortc never stops reading a data channel."""
        if self._gone.is_set():
            return
        settings = self._settings
        self._inbox_bytes += len(message)
        self._inbox.put_nowait(message)
        if (
            self._inbox_bytes > settings.max_socket_bytes
            or self._inbox.qsize() > settings.messages_per_s * settings.flood_s
        ):
            self._lose()

    def _look(self) -> None:
        if self._connection.connectionState in ("failed", "closed"):
            self._lose()

    def _lose(self) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._drained.set()
            self._inbox.put_nowait(None)


def _new_track() -> Any:
    from aiortc import MediaStreamTrack

    class PictureTrack(MediaStreamTrack):
        """Passes on pictures, which are already paced."""

        kind = "video"

        def __init__(self) -> None:
            super().__init__()
            self.pictures: asyncio.Queue[Any] = asyncio.Queue(1)
            self._taken = False

        async def recv(self) -> Any:
            if self._taken:  # the caller has sent the previous one
                self.pictures.task_done()
                self._taken = False
            picture = await self.pictures.get()
            self._taken = True
            return picture

    return PictureTrack()


def _checked_offer(sdp: str) -> str:
    """Check an offer of two sections, and remove candidates with mDNS names.

    A client that hides its addresses behind such names is discovered by its first packet, so its
    list of candidates is left incomplete.

    Raises:
        ValueError: other sections, no fingerprint, or too many candidates.
    """
    lines = sdp.splitlines()
    sections = sorted(line[2:].split(" ")[0] for line in lines if line.startswith("m="))
    if sections != ["application", "video"]:
        raise ValueError(
            "The offer needs one section of video and one of data, and no other; it has "
            f"{', '.join(sections)[:80] or 'none'}."
        )
    if not any(line.startswith("a=fingerprint:") for line in lines):
        raise ValueError("The offer has no fingerprint, so its peer cannot be identified.")
    candidates = [line for line in lines if line.startswith("a=candidate:")]
    if len(candidates) > MAX_CANDIDATES:
        raise ValueError(f"The offer has {len(candidates)} candidates; at most {MAX_CANDIDATES}.")
    hidden = {line for line in candidates if ".local" in line.lower()}
    kept = [line for line in lines if line not in hidden and line != "a=end-of-candidates"]
    return "\r\n".join(kept) + "\r\n"


def _check_links(sdp: str) -> None:
    """Check what aiortc (1.11 to 1.16) accepts although it fails after its answer.

    Raises:
        ValueError: a bundle of sections that are not there, or no SCTP port.
    """
    from aiortc.sdp import SessionDescription

    offer = SessionDescription.parse(sdp)
    mids = {section.rtp.muxId for section in offer.media}
    bundled = {mid for group in offer.group for mid in group.items}
    (data,) = (section for section in offer.media if section.kind == "application")
    port = int(data.fmt[0]) if data.profile == "DTLS/SCTP" else data.sctp_port
    if not bundled <= mids or port is None or not 0 < port < 2**16:
        raise ValueError(f"bundled: {bundled}, sections: {mids}, SCTP port: {port}")


def _ice_server(text: str) -> Any:
    """``"stun:HOST:PORT"`` or ``"turn:USER:PASSWORD@HOST:PORT"`` in aiortc's form."""
    from aiortc import RTCIceServer

    found = ICE_SERVER.fullmatch(text)
    assert found is not None, "checked by WebSettings"
    address = f"{found['scheme']}:{found['address']}"
    return RTCIceServer(urls=address, username=found["user"], credential=found["password"])


def _listen_on(connection: Any, address: str) -> None:
    """Restrict host candidates to one address, before they are gathered.

    aiortc (1.11 to 1.16) has no option for it and uses every address except loopback.
    """
    address = "127.0.0.1" if address == "localhost" else address
    transports = {each.receiver.transport.transport for each in connection.getTransceivers()}
    transports.add(connection.sctp.transport.transport)
    for transport in transports:
        ice = transport.iceGatherer._connection
        ice.get_component_candidates = partial(_gather, ice.get_component_candidates, [address])


async def _gather(gather: Any, own: list[str], *, addresses: list[str], **options: Any) -> Any:
    return await gather(addresses=own, **options)
