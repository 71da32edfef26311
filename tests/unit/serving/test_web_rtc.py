"""Live sessions over WebRTC, with a client of aiortc on this machine."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import jsonschema
import pytest

from flashdreams.serving.protocol import schema
from flashdreams.serving.web.peer import (
    MAX_CANDIDATES,
    Peer,
    _check_links,
    _checked_offer,
    _listen_on,
)
from flashdreams.serving.web.settings import WebSettings
from flashdreams.serving.web.transport import Gone
from tests.unit.serving.fake_host import FakeHost, frame_of
from tests.unit.serving.plain_client import web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")
aiortc = pytest.importorskip("aiortc", reason="pip install 'flashdreams[webrtc]'")

PATIENCE_S = 60.0
"""For a hang; connecting takes a second."""
ROUTE = "v1/realtime/webrtc"
WIDTH, HEIGHT = 128, 96
TICK = (-1, 0, 1)

_VALIDATOR = jsonschema.Draft202012Validator(schema()["server"])


def host(**options: Any) -> FakeHost:
    """Slow enough for an encoder on a busy machine."""
    return FakeHost(**({"fps": 20.0, "width": WIDTH, "height": HEIGHT} | options))


class PeerClient:
    """One peer connection; every message is checked against the published schema."""

    def __init__(self, codec: str | None = None) -> None:
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self.video = self.connection.addTransceiver("video", direction="recvonly")
        if codec is not None:
            known = aiortc.RTCRtpReceiver.getCapabilities("video").codecs
            self.video.setCodecPreferences([each for each in known if each.mimeType == codec])
        self.channel = self.connection.createDataChannel("anything")
        self.messages: list[dict[str, Any]] = []
        self._inbox: asyncio.Queue[str] = asyncio.Queue()
        self._opened, self.closed = asyncio.Event(), asyncio.Event()
        self.channel.on("open", self._opened.set)
        self.channel.on("message", self._inbox.put_nowait)
        self.channel.on("close", self.closed.set)

    async def connect(self, url: str, **options: Any) -> str:
        """Returns the server's SDP."""
        connection = self.connection
        offer = await connection.createOffer()
        _listen_on(connection, "127.0.0.1")  # wherever the machine has no other address
        await connection.setLocalDescription(offer)
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            body = {"sdp": connection.localDescription.sdp, "type": "offer"}
            answer = await http.post(url + ROUTE, json=body, **options)
        assert answer.status_code == 200, answer.text
        await connection.setRemoteDescription(aiortc.RTCSessionDescription(**answer.json()))
        await asyncio.wait_for(self._opened.wait(), PATIENCE_S)
        return answer.json()["sdp"]

    def send(self, type: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": type, **fields}))

    async def until(self, type: str, **fields: Any) -> dict[str, Any]:
        """Read on until a message of this type with these fields."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = json.loads(await asyncio.wait_for(self._inbox.get(), PATIENCE_S))
            _VALIDATOR.validate(message)
            self.messages.append(message)
            wanted = {name: message.get(name) for name in fields} == fields
            if message["type"] == type and wanted:
                return message
        raise TimeoutError(f"no {type} {fields} in {PATIENCE_S} s")

    async def pictures(self, count: int) -> list[Any]:
        """The next decoded pictures."""
        track = self.video.receiver.track
        return [await asyncio.wait_for(track.recv(), PATIENCE_S) for _ in range(count)]

    async def start(self, **fields: Any) -> dict[str, Any]:
        """Begin a session and wait for ``video.start``."""
        self.send("session.start", **fields)
        return await self.until("video.start")


def with_client(
    url: str, talk: Callable[[PeerClient], Awaitable[Any]], codec: str | None = None, **options: Any
) -> Any:
    """Connect a client, let it talk, and hang up."""

    async def run() -> Any:
        client = PeerClient(codec)
        try:
            await client.connect(url, **options)
            return await talk(client)
        finally:
            await client.connection.close()

    return asyncio.run(run())


def shown(picture: Any) -> int:
    """The number modulo 32 of a picture; its greys are 7 apart, so coding may be off by 3."""
    return frame_of(float(picture.to_ndarray(format="rgb24")[8:-8, 8:-8].mean()))


def origins(pictures: list[Any], numbers: list[int], told: list[dict[str, Any]]) -> list[int]:
    """Origins of the RTP timestamps with which all numbers are those of the metadata.

    Encoders of aiortc round timestamps to a tick of 1/90000 s; pictures are 4500 apart.
    """
    frames = {tick + each["media_timestamp"]: each["first_frame"] for each in told for tick in TICK}
    ticks = [each.pts - pictures[0].pts for each in pictures]
    return [
        each["media_timestamp"]
        for each in told
        if [frames.get(tick + each["media_timestamp"], -1) % 32 for tick in ticks] == numbers
    ]


@pytest.mark.parametrize("codec", ["video/VP8", "video/H264"])
def test_pictures_come_on_the_track_and_the_metadata_tells_which_is_which(codec: str) -> None:
    async def talk(client: PeerClient) -> None:
        start = await client.start(num_frames=60, format="jpeg")
        assert start["format"] == "webrtc" and start["codec"] is None and not start["resumed"]
        pictures = await client.pictures(20)
        assert {(each.width, each.height) for each in pictures} == {(WIDTH, HEIGHT)}
        done = await client.until("session.done")
        assert not done["stopped"]
        told = [each for each in client.messages if each["type"] == "video.chunk_metadata"]
        assert {each["byte_length"] for each in told} == {0}
        assert [each["transport_chunk_index"] for each in told] == list(range(done["chunks"]))
        numbers = [shown(each) for each in pictures]
        assert len(set(numbers)) >= 10, "they move"
        assert origins(pictures, numbers, told), "one origin explains every picture"
        assert not origins(pictures, [(n + 1) % 32 for n in numbers], told), "negative control"
        await asyncio.wait_for(client.closed.wait(), PATIENCE_S)

    with web(host()) as server:
        with_client(server.url, talk, codec)


def test_a_control_is_queued_and_applied_and_a_stop_is_answered() -> None:
    async def talk(client: PeerClient) -> None:
        await client.start()
        client.send("session.control", event_id="e", values={"keys": "w"})
        await client.until("session.interaction.queued", event_id="e")
        applied = await client.until("session.interaction.applied", event_ids=["e"])
        picture = await client.until("video.chunk_metadata")
        assert picture["started_event_ids"] == ["e"]
        assert picture["first_frame"] == applied["first_frame"]
        client.send("session.control", event_id="x", values={"jump": 1})
        assert (await client.until("error"))["code"] == "interaction_failed"
        client.channel.send(b"no text")
        assert (await client.until("error"))["code"] == "bad_message"
        client.send("session.ping")
        await client.until("session.pong")
        client.send("session.stop")
        assert (await client.until("session.done"))["stopped"]

    loop = host()
    with web(loop) as server:
        with_client(server.url, talk)
    assert ("control", {"keys": "w"}) in loop.calls and ("close",) in loop.calls


def test_a_lost_connection_detaches_and_the_token_takes_the_session_up() -> None:
    async def begin(client: PeerClient) -> tuple[str, int]:
        token = (await client.start())["token"]
        return token, (await client.until("video.chunk_metadata"))["first_frame"]

    loop = host()
    with web(loop) as server:
        token, frame = with_client(server.url, begin)
        deadline = time.monotonic() + PATIENCE_S
        while ("detach",) not in loop.calls:
            assert time.monotonic() < deadline, "the session was never detached"
            time.sleep(0.02)
        assert ("close",) not in loop.calls

        async def go_on(client: PeerClient) -> None:
            client.send("session.resume", token=token, from_frame=frame + 1)
            start = await client.until("video.start")
            assert start["resumed"] and start["first_frame"] == frame + 1
            picture = await client.until("video.chunk_metadata")
            assert picture["first_frame"] == frame + 1
            assert len(await client.pictures(2)) == 2

        with_client(server.url, go_on)
    assert len(loop.sessions) == 1 and ("attach",) in loop.calls


def test_a_server_that_stops_says_so_on_the_channel() -> None:
    async def talk(client: PeerClient) -> str:
        await client.start()
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        code = (await client.until("error"))["code"]
        await stopping
        return code

    with web(host()) as server:
        assert with_client(server.url, talk) == "draining"


def test_an_offer_needs_the_token_and_an_origin_of_this_server() -> None:
    body = {"sdp": "v=0\r\n", "type": "offer"}
    with web(host(), token="secret", allowed_origins=("https://friend.example",)) as server:
        url = server.url + ROUTE
        assert httpx.post(url, json=body).status_code == 401
        known = {"Authorization": "Bearer secret"}
        evil = {**known, "Origin": "https://evil.example"}
        assert httpx.post(url, json=body, headers=evil).status_code == 403
        large = httpx.post(url, json=body | {"sdp": "x" * 2**17}, headers=known)
        assert large.status_code == 413

        async def talk(client: PeerClient) -> None:
            await client.start(num_frames=1)

        with_client(server.url, talk, headers={**known, "Origin": "https://friend.example"})


def offer_of(*kinds: str) -> str:
    """A real offer with these sections."""

    async def run() -> str:
        connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        for kind in kinds:
            if kind == "application":
                connection.createDataChannel("anything")
            else:
                connection.addTransceiver(kind, direction="recvonly")
        await connection.setLocalDescription(await connection.createOffer())
        sdp = connection.localDescription.sdp
        await connection.close()
        return sdp

    return asyncio.run(run())


def test_garbage_is_refused_in_one_line_and_the_server_goes_on() -> None:
    good = offer_of("application", "video")
    wrong = [
        "",
        "garbage",
        "v=0\r\nm=video\r\nm=application\r\n",
        "m=video 9 UDP/TLS/RTP/SAVPF x\r\nm=application x y z\r\n",
        good.replace("a=ice-ufrag", "a=ice-nothing"),
        good.replace("a=fingerprint", "a=finger"),
        good.replace("a=rtcp-mux", "a=rtcp-nothing"),
        good.replace("a=sctp-port", "a=sctp-nothing"),
        good.replace("a=recvonly", "a=sendonly"),
        offer_of("video"),
        offer_of("application"),
        offer_of("application", "video", "audio"),
        offer_of("application", "video", "video"),
    ]
    with web(host()) as server:
        for sdp in wrong:
            answer = httpx.post(server.url + ROUTE, json={"sdp": sdp, "type": "offer"}, timeout=60)
            assert answer.status_code == 400, sdp
            message = answer.json()["message"]
            assert answer.json()["code"] == "bad_message" and len(message) < 200
            assert "Traceback" not in message and "\n" not in message
        for body in ({"sdp": good, "type": "answer"}, {"type": "offer"}):
            assert httpx.post(server.url + ROUTE, json=body).status_code == 422
        deadline = time.monotonic() + PATIENCE_S
        while server._app.state.accounts.metrics.registry.get_sample_value("flashdreams_sockets"):
            assert time.monotonic() < deadline, "a refused offer is still counted"
            time.sleep(0.02)


def test_an_offer_without_a_first_message_is_let_go() -> None:
    with web(host(), start_s=1.0, max_sockets=1) as server:
        body = {"sdp": offer_of("application", "video"), "type": "offer"}

        async def offer_at_once() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
                offers = [http.post(server.url + ROUTE, json=body) for _ in range(8)]
                return await asyncio.gather(*offers)

        answers = sorted(asyncio.run(offer_at_once()), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [200] + 7 * [503]
        assert answers[1].json()["code"] == "queue_full"
        deadline = time.monotonic() + PATIENCE_S
        while httpx.post(server.url + ROUTE, json=body).status_code != 200:
            assert time.monotonic() < deadline, "its place is never free again"
            time.sleep(0.1)


def test_a_loopback_server_listens_on_loopback_alone() -> None:
    with web(host()) as server:
        body = {"sdp": offer_of("application", "video"), "type": "offer"}
        answer = httpx.post(server.url + ROUTE, json=body).json()["sdp"]
    candidates = [line.split(" ") for line in answer.splitlines() if "a=candidate:" in line]
    assert candidates and {line[4] for line in candidates} == {"127.0.0.1"}


def test_names_of_candidates_are_not_asked_for() -> None:
    sections = "m=application 9 x y\r\nm=video 9 x y\r\na=fingerprint:sha-256 00\r\n"
    plain = "a=candidate:1 1 udp 1 192.0.2.1 5 typ host"
    hidden = "a=candidate:1 1 udp 1  00000000-aaaa.local 5 typ host"
    kept = _checked_offer(f"{sections}{plain}\r\n{hidden}\r\na=end-of-candidates\r\n")
    assert plain in kept and "local" not in kept and "end-of" not in kept
    with pytest.raises(ValueError, match=f"at most {MAX_CANDIDATES}"):
        _checked_offer(sections + f"{plain}\r\n" * (MAX_CANDIDATES + 1))


def test_bundles_of_sections_that_are_not_there_are_refused() -> None:
    offer = offer_of("application", "video")
    _check_links(offer)
    with pytest.raises(ValueError, match="sections"):
        _check_links(offer.replace("BUNDLE 0", "BUNDLE 2 0"))


def test_without_aiortc_the_route_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiortc", None)
    with web(host()) as server:
        answer = httpx.post(server.url + ROUTE, json={"sdp": "v=0", "type": "offer"})
        assert answer.status_code == 501
        assert answer.json()["message"].endswith("pip install 'flashdreams[webrtc]'")


def test_what_waits_to_be_read_has_a_bound() -> None:
    """A data channel cannot be left unread: at most 5 s of the allowed messages wait."""

    async def run(messages: int) -> int:
        peer = Peer({}, WebSettings())
        for _ in range(messages):
            peer._take_message('{"type": "session.ping"}')
        count = 0
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            while True:
                await asyncio.wait_for(peer.receive(), 0.1)
                count += 1
        await peer.hang_up()
        return count

    assert asyncio.run(run(900)) == 900
    with pytest.raises(Gone):
        asyncio.run(run(5000))


def test_a_message_for_a_channel_that_is_full_and_lost_is_given_up() -> None:
    class FullChannel:
        bufferedAmount = 2**30

    class SmallChannel:
        bufferedAmount = 0

        def send(self, data: str) -> None:
            raise ValueError("the remote party only supports messages up to 1 bytes")

    async def run() -> None:
        peer = Peer({}, WebSettings())
        peer._channel = SmallChannel()
        with pytest.raises(Gone, match="1 bytes"):
            await peer.send_text("{}")
        peer._channel = FullChannel()
        sending = asyncio.create_task(peer.send_text("{}"))
        await asyncio.sleep(0)
        assert not sending.done()
        await peer.hang_up()
        await asyncio.wait_for(sending, 5.0)

    with pytest.raises(Gone):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("server", "allowed"),
    [
        ("stun:stun.example.org:3478", True),
        ("stun:stun.example.org", True),
        ("turn:me:secret@turn.example.org:3478?transport=tcp", True),
        ("turns:me:secret@turn.example.org", True),
        ("turn:turn.example.org", False),
        ("stun:me:secret@stun.example.org", False),
        ("https://example.org", False),
        ("turn:me:secret@", False),
    ],
)
def test_ice_servers_are_checked_at_the_start(server: str, allowed: bool) -> None:
    if allowed:
        settings = WebSettings(ice_servers=(server,))

        async def run() -> None:
            await Peer({}, settings).hang_up()

        asyncio.run(run())
        return
    with pytest.raises(ValueError, match="--ice-servers") as error:
        WebSettings(ice_servers=(server,))
    assert "secret" not in str(error.value)
