"""Clients that vanish, flood, send garbage or read nothing: only their own session suffers."""

import json
import socket
import threading
import time
import urllib.parse
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from flashdreams.serving.interface import Listener, Refused
from flashdreams.serving.web.server import WebServer
from tests.unit.serving.fake_host import FakeHost
from tests.unit.serving.plain_client import PATIENCE_S, PlainClient, shown_frames, web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")

GIB = 2**30


def eventually(holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S} s")
        time.sleep(0.01)


def raw_socket(server: WebServer, receive_bytes: int | None = None) -> socket.socket:
    """A WebSocket after its handshake, of a client that keeps no rules."""
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.settimeout(PATIENCE_S)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(
        f"GET /v1/realtime/video HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += raw.recv(1)
    assert b" 101 " in answer
    return raw


def sent_until_cut(raw: socket.socket, total: int) -> int:
    """Bytes that can be sent before the other side ends the connection."""
    sent, block = 0, bytes(2**16)
    try:
        while sent < total:
            sent += raw.send(block)
    except OSError:
        pass
    return sent


def masked_text(text: str) -> bytes:
    """A text frame with the mask 0."""
    data = text.encode()
    assert len(data) < 2**16
    return b"\x81" + bytes([0x80 | 126]) + len(data).to_bytes(2, "big") + bytes(4) + data


def test_a_socket_that_says_nothing_is_closed() -> None:
    with web(FakeHost(), start_s=0.2) as server, PlainClient(server) as client:
        assert client.until("error")["code"] == "timeout"
        assert client.close_code() == 1008


def test_a_client_that_falls_silent_is_cut_and_its_session_waits() -> None:
    host = FakeHost()
    with web(host, stall_s=0.5) as server, PlainClient(server) as client:
        client.start()
        assert client.until("error")["code"] == "timeout"
        assert client.close_code() == 1008
        eventually(lambda: ("detach",) in host.calls)


def test_pings_keep_a_client_from_being_cut() -> None:
    """Negative control of the stall clock."""
    with web(FakeHost(), stall_s=1.0) as server, PlainClient(server) as client:
        client.start()
        for _ in range(8):
            client.send("session.ping")
            client.until("session.pong")
            time.sleep(0.25)
        assert not client.of_type("error")


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"type": "session.begin"}',
        '{"type": "session.start", "num_frames": 0}',
        '{"type": "session.start", "fps": NaN}',
        '{"type": "session.ping"}',
        "[" * 50_000,
    ],
)
def test_garbage_instead_of_a_start_is_refused(garbage: str) -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.socket.send(garbage)
        assert client.until("error")["code"] == "bad_message"
        assert client.close_code() == 1008


def test_garbage_in_a_session_leaves_it_and_all_others() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client, PlainClient(server) as other:
        client.start()
        other.start()
        deep: Any = "x"
        for _ in range(50):
            deep = [deep]
        garbage = [
            *("{", '{"type": "session.start"}', json.dumps({"type": "session.control"})),
            b"\x00\x01",
            json.dumps({"type": "session.control", "values": {"look": [float("nan"), 0]}}),
            json.dumps({"type": "session.control", "values": {"look": deep}}),
            json.dumps({"type": "session.save", "name": "../../etc/passwd"}),
            json.dumps({"type": "session.shown", "frame": -1}),
            json.dumps({"type": "session.shown", "frame": 0, "dropped": 10**400}),
            json.dumps({"type": "session.ping", "padding": "x" * 100_000}),
        ]
        for message in garbage:
            client.socket.send(message)
            assert client.until("error")["code"] == "bad_message", message[:60]
        client.pictures(4)
        other.pictures(4)
        assert not other.of_type("error")


def test_a_gigabyte_over_the_socket_is_cut_at_its_header() -> None:
    with web(FakeHost()) as server, PlainClient(server) as other, raw_socket(server) as raw:
        other.start()
        raw.sendall(b"\x81" + bytes([0x80 | 127]) + GIB.to_bytes(8, "big") + bytes(4))
        sent = sent_until_cut(raw, GIB)
        assert sent < 32 * 2**20, "no more than what the kernel's buffers hold"
        other.pictures(4)


def test_a_gigabyte_over_http_is_cut() -> None:
    with web(FakeHost()) as server, PlainClient(server) as other:
        other.start()
        head = "POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        for length in (f"Content-Length: {GIB}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as raw:
                raw.sendall((head + length).encode())
                if "chunked" in length:
                    raw.sendall(f"{GIB:x}\r\n".encode())
                assert sent_until_cut(raw, GIB) < 64 * 2**20
        other.pictures(4)


def test_a_flood_is_slowed_and_then_cut_and_others_go_on() -> None:
    with (
        web(FakeHost(), messages_per_s=5, flood_s=0.5) as server,  # a slow client sends more, too
        PlainClient(server) as flood,
        PlainClient(server) as other,
    ):
        flood.start()
        other.start()
        began = time.monotonic()
        try:
            for _ in range(5000):
                flood.send("session.ping")
        except ConnectionClosed:
            pass
        assert flood.close_code() == 1008
        assert "messages per second" in flood.of_type("error")[-1]["message"]
        most = 5 * (time.monotonic() - began + 3)
        assert len(flood.of_type("session.pong")) < most, "twice the rate within the first second"
        other.pictures(20)


def test_a_reader_that_takes_nothing_is_dropped_from_and_then_cut() -> None:
    host = FakeHost(noise=True, width=640, height=480)
    with (
        web(host, slow_s=1.0, waiting_pictures=2) as server,
        raw_socket(server, receive_bytes=4096) as raw,
    ):
        raw.sendall(masked_text('{"type": "session.start", "format": "jpeg"}'))
        with PlainClient(server) as other:
            other.start(format="jpeg")
            count = server._app.state.accounts.metrics.registry.get_sample_value
            eventually(lambda: count("flashdreams_errors_total", {"code": "too_slow"}) == 1)
            assert count("flashdreams_frames_total", {"fate": "dropped"}) > 0
            eventually(lambda: ("detach",) in host.calls)
            other.pictures(4)
            assert not other.of_type("error")


def test_a_client_that_vanishes_is_taken_up_without_a_gap() -> None:
    host = FakeHost(chunk_frames=8)
    with web(host) as server:
        with PlainClient(server) as client:
            token = client.start()["token"]
            before = [picture["first_frame"] for picture in client.pictures(5)]
            client.socket.socket.shutdown(socket.SHUT_RDWR)
            eventually(lambda: ("detach",) in host.calls)
        with PlainClient(server) as again:
            again.send("session.resume", token=token, from_frame=before[-1] + 1)
            start = again.until("video.start")
            assert start["resumed"] and start["first_frame"] == before[-1] + 1
            pictures = again.pictures(20)
            after = [picture["first_frame"] for picture in pictures]
            assert before + after == list(range(25))
            assert pictures[0]["key"] and pictures[0]["transport_chunk_index"] == 0
            assert shown_frames(again.media) == [frame % 32 for frame in after]


def test_pictures_with_a_receipt_are_not_sent_again() -> None:
    """Negative control of the resume: what is kept ends with the receipt."""
    host = FakeHost()
    with web(host) as server:
        with PlainClient(server) as client:
            token = client.start()["token"]
            last = client.pictures(12)[-1]["first_frame"]
            client.send("session.shown", frame=last)
            client.send("session.ping")
            client.until("session.pong")
        eventually(lambda: ("detach",) in host.calls)
        with PlainClient(server) as again:
            again.send("session.resume", token=token, from_frame=0)
            assert again.until("video.start")["first_frame"] > last


def test_a_session_that_is_complete_is_taken_up_for_its_last_pictures() -> None:
    host = FakeHost(chunk_frames=8)
    with web(host) as server:
        with PlainClient(server) as client:
            token = client.start(num_frames=16)["token"]
            client.pictures(9)
            eventually(lambda: all(session.ended for session in host.sessions.values()))
        with PlainClient(server) as again:
            again.send("session.resume", token=token, from_frame=9)
            assert again.until("session.done")["stopped"] is False
            frames = [m["first_frame"] for m in again.of_type("video.chunk_metadata")]
            assert frames == list(range(9, 16))
            assert again.close_code() == 1000
        with PlainClient(server) as late:
            late.send("session.resume", token=token)
            assert late.until("error")["code"] == "unknown_session"


class EndingHost(FakeHost):
    """Sessions end while they are taken up, and their listener hears of it a little later."""

    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        self._find(session).ended = True
        threading.Timer(0.1, listener.on_end, (None, False)).start()
        raise Refused("There is no such session.")


def test_a_session_that_ends_while_it_is_taken_up_is_shown_to_its_end() -> None:
    host = EndingHost(chunk_frames=8)
    with web(host) as server:
        with PlainClient(server) as client:
            token = client.start()["token"]
            last = client.pictures(5)[-1]["first_frame"]
        eventually(lambda: ("detach",) in host.calls)
        with PlainClient(server) as again:
            again.send("session.resume", token=token, from_frame=last + 1)
            assert again.until("session.done")["stopped"] is False
            frames = [m["first_frame"] for m in again.of_type("video.chunk_metadata")]
            assert frames[:3] == [last + 1, last + 2, last + 3]
        with PlainClient(server) as other:
            other.send("session.resume", token="nobody's")
            assert other.until("error")["code"] == "unknown_session"


def test_figures_of_a_session_that_has_ended_end_no_socket() -> None:
    with web(FakeHost(fps=5.0)) as server, PlainClient(server) as client:
        client.start(num_frames=8)
        assert client.until("session.done")["chunks"] == 8
        client.socket.close()
    with web(FakeHost(fps=5.0)) as server, PlainClient(server) as client:
        client.start(num_frames=8)
        client.pictures(5)
        client.send("session.pause")
        client.send("session.pause", paused=False)
        assert client.until("session.done")["chunks"] == 8
        assert {e["code"] for e in client.of_type("error")} <= {"interaction_failed"}


def test_a_second_socket_takes_the_session_over() -> None:
    host = FakeHost()
    with web(host) as server, PlainClient(server) as first, PlainClient(server) as second:
        token = first.start()["token"]
        first.pictures(2)
        second.send("session.resume", token=token)
        second.until("video.start")
        assert "another connection" in first.until("error")["message"]
        first.close_code()
        second.pictures(6)
        assert ("detach",) not in host.calls


def test_two_sockets_that_take_up_the_same_session_meet() -> None:
    """Of a server before this one, of which the web side knows nothing yet."""
    host = FakeHost()
    with web(host) as server:
        with PlainClient(server) as client:
            token = client.start()["token"]
        eventually(lambda: ("detach",) in host.calls)
        server._app.state.accounts.sessions.clear()
        with PlainClient(server) as first, PlainClient(server) as second:
            for socket in (first, second):
                socket.send("session.resume", token=token)
            codes = set()
            for socket in (first, second):
                try:
                    socket.pictures(6)
                except ConnectionClosed:
                    codes |= {error["code"] for error in socket.of_type("error")}
            assert codes == {"unknown_session"}, "one of them goes on, the other is told"


def test_an_unknown_token_is_refused() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.send("session.resume", token="nobody's")
        assert client.until("error")["code"] == "unknown_session"
        assert client.close_code() == 1008


def test_a_session_that_fails_ends_alone_and_no_path_leaves_the_server() -> None:
    host = FakeHost()
    with web(host) as server, PlainClient(server) as client:
        client.start()
        host.fail = "NaN in /srv/models/secret/weights.pt at step 3"
        error = client.until("error")
        assert error["code"] == "session_failed"
        assert "secret" not in error["message"] and "step 3" in error["message"]
        assert client.close_code() == 1011
        host.fail = None
        with PlainClient(server) as other:
            other.start()
            other.pictures(2)


@pytest.mark.parametrize(
    ("prompt", "code"), [("refuse", "not_allowed"), ("crash", "session_failed")]
)
def test_what_fails_at_the_opening_says_no_path(prompt: str, code: str) -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.send("session.start", prompt=prompt)
        error = client.until("error")
        assert error["code"] == code and "/srv" not in json.dumps(error)


def test_a_server_that_stops_shows_the_last_chunk_says_so_and_refuses_new_sessions() -> None:
    host = FakeHost(fps=8.0)
    with web(host) as server, PlainClient(server) as client:
        client.start()
        client.pictures(1)
        server.gate.enter("draining")
        (session,) = host.sessions.values()
        with host._changed:
            host._end(session, "The server restarts.", False)
        with PlainClient(server) as late:
            late.send("session.start")
            assert late.until("error")["code"] == "draining"
        server.stop()
        assert client.until("error")["code"] == "draining"
        shown = [message["first_frame"] for message in client.of_type("video.chunk_metadata")]
        assert shown == list(range(session.frame)), "its snapshot goes on after them"
        assert client.close_code() == 1012


def test_a_server_that_still_loads_says_so() -> None:
    with web(FakeHost()) as server:
        server.gate.enter("warming")
        with PlainClient(server) as client:
            client.send("session.start")
            error = client.until("error")
            assert error["code"] == "not_ready" and "warmed up" in error["message"]
            assert client.close_code() == 1013
        server.gate.enter("ready")


def test_sockets_are_counted() -> None:
    with web(FakeHost(), max_sockets=1) as server, PlainClient(server) as client:
        client.start()
        with pytest.raises(Exception, match="403"):
            PlainClient(server)
        assert urllib.parse.urlsplit(server.url).port == server.port
