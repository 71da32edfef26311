"""HTTP: step-driven sessions, probes, metrics, the OpenAPI document."""

import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flashdreams.serving.interface import Listener
from flashdreams.serving.protocol import schema
from flashdreams.serving.web.server import WebServer, _listen
from flashdreams.serving.web.settings import WebSettings
from tests.unit.serving.fake_host import FakeHost, picture
from tests.unit.serving.plain_client import PATIENCE_S, PlainClient, shown_frames, web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")


def client_of(server: WebServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S)


def create(http: httpx.Client, **fields: object) -> str:
    answer = http.post("v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return f"v1/sessions/{answer.json()['id']}"


def test_every_step_makes_exactly_one_chunk() -> None:
    host = FakeHost()
    with web(host) as server, client_of(server) as http:
        session = create(http, prompt="a wood", seed=5)
        assert host.chunks == 0, "nothing is made that nobody asked for"
        for index in range(3):
            answer = http.post(f"{session}/step", json={"format": "npy"})
            step = json.loads(answer.headers["x-flashdreams-step"])
            assert (step["autoregressive_index"], step["first_frame"]) == (index, 4 * index)
            pixels = np.load(io.BytesIO(answer.content), allow_pickle=False)
            expected = picture(range(4 * index, 4 * index + 4), 48, 64).numpy()
            assert np.array_equal(pixels, expected)
            assert host.chunks == index + 1
        assert ("open", "a wood", 5) in host.calls


def test_a_chunk_comes_as_mp4_or_as_jpeg_files_too() -> None:
    with web(FakeHost()) as server, client_of(server) as http:
        session = create(http)
        answer = http.post(f"{session}/step", json={})
        assert answer.headers["content-type"] == "video/mp4"
        assert shown_frames([answer.content]) == [0, 1, 2, 3]
        answer = http.post(f"{session}/step", json={"format": "jpeg"}).json()
        assert answer["step"]["first_frame"] == 4
        assert [url[:22] for url in answer["pictures"]] == 4 * ["data:image/jpeg;base64"]


def test_controls_prompts_and_commands_act_with_the_next_step() -> None:
    host = FakeHost()
    with web(host) as server, client_of(server) as http:
        session = create(http)
        body = {"values": {"keys": "w"}, "event_id": "k"}
        assert http.post(f"{session}/control", json=body).status_code == 202
        assert http.post(f"{session}/prompt", json={"prompt": "rain"}).status_code == 202
        assert http.post(f"{session}/snapshot", json={"name": "a"}).status_code == 202
        step = {"control": {"keys": "s"}, "format": "jpeg"}
        figures = http.post(f"{session}/step", json=step).json()["step"]
        assert figures["applied_event_ids"] == ["k"]
        assert figures["kept"] == [{"command": "save", "name": "a", "event_id": None}]
        controls = [call[1] for call in host.calls if call[0] == "control"]
        assert controls == [{"keys": "w"}, {"keys": "s"}]
        assert http.get(session).json()["saved"] == ["a"]
        assert http.post(f"{session}/rewind", json={"name": "a"}).status_code == 202
        assert http.post(f"{session}/reset", json={"seed": 9}).status_code == 202
        figures = http.post(f"{session}/step", json={"format": "jpeg"}).json()["step"]
        assert (figures["epoch"], figures["autoregressive_index"]) == (2, 0)
        assert [kept["command"] for kept in figures["kept"]] == ["rewind", "reset"]


def test_what_is_refused_says_why_and_makes_no_chunk() -> None:
    host = FakeHost()
    with web(host) as server, client_of(server) as http:
        answer = http.post("v1/sessions", json={"width": 9})
        assert answer.status_code == 422 and answer.json()["allowed"]["width"] == 64
        session = create(http)
        for path, body in (
            ("step", {"control": {"jump": 1}}),
            ("step", {"format": "gif"}),
            ("control", {"values": {"look": float("1e400")}}),
            ("prompt", {"prompt": "refuse"}),
            ("rewind", {"name": "nowhere"}),
            ("snapshot", {"name": "../x"}),
        ):
            text = json.dumps(body)
            assert http.post(f"{session}/{path}", content=text).status_code == 422, path
        assert host.chunks == 0
        assert http.post("v1/sessions/unknown-session/step", json={}).status_code == 404
        # What a refusal repeats may be what JSON or UTF-8 cannot hold.
        for text in (b"{", b'{"seed": NaN}', b'{"fps": 1e999}', b'{"prompt": "\\ud800"}'):
            assert http.post("v1/sessions", content=text).status_code == 422, text
        huge = b'{"values": {"look": [%s, 0]}}' % (b"9" * 400)
        assert http.post(f"{session}/control", content=huge).status_code == 422


def test_a_session_ends_when_it_is_closed_or_complete() -> None:
    with web(FakeHost(places=1, queue=0)) as server, client_of(server) as http:
        session = create(http, num_frames=4)
        assert http.post("v1/sessions", json={}).status_code == 503, "no place"
        assert http.post(f"{session}/step", json={}).status_code == 200
        assert http.post(f"{session}/step", json={}).status_code == 410
        other = create(http)
        assert http.delete(other).status_code == 204
        assert http.post(f"{other}/step", json={}).status_code == 404


def test_a_step_that_waits_when_the_server_stops_is_told_so() -> None:
    host = FakeHost(places=0)
    with web(host) as server, client_of(server) as http, ThreadPoolExecutor(1) as pool:
        session = create(http)
        step = pool.submit(http.post, f"{session}/step", json={})
        while ("pause", False) not in host.calls:
            time.sleep(0.01)
        server.stop()
        assert step.result().status_code == 410
        assert "shutting down" in step.result().json()["detail"]


def test_a_session_that_has_just_ended_is_gone_and_its_figures_stay() -> None:
    host = FakeHost()
    with web(host) as server, client_of(server) as http:
        session = create(http)
        host.sessions[session.rpartition("/")[2]].ended = True  # the web side hears of it later
        assert http.post(f"{session}/step", json={}).status_code == 410
        answer = http.get(session)
        assert answer.status_code == 200 and answer.json()["saved"] == []


def test_a_session_is_driven_by_one_side_alone() -> None:
    host = FakeHost()
    with web(host) as server, client_of(server) as http, PlainClient(server) as client:
        session = create(http)
        client.send("session.resume", token=session.rpartition("/")[2])
        error = client.until("error")
        assert error["code"] == "unknown_session" and "HTTP" in error["message"]
        assert http.post(f"{session}/step", json={}).status_code == 200


class SlowHost(FakeHost):
    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        time.sleep(0.1)
        return super().attach(session, listener, from_frame)


def test_requests_for_the_same_session_take_it_up_once() -> None:
    """Of a server before this one, of which the web side knows nothing yet."""
    host = SlowHost()
    with web(host) as server, client_of(server) as http, ThreadPoolExecutor(4) as pool:
        session = create(http)
        server._app.state.accounts.sessions.clear()
        assert {answer.status_code for answer in pool.map(http.get, 4 * [session])} == {200}
        assert host.calls.count(("attach",)) == 1


def test_a_session_that_nobody_asks_for_is_closed() -> None:
    host = FakeHost()
    with web(host, idle_s=0.0, reap_s=0.05) as server, client_of(server) as http:
        create(http)
        for _ in range(200):
            if ("close",) in host.calls:
                break
            http.get("healthz")
        assert ("close",) in host.calls


def test_probes_tell_the_phase() -> None:
    server = WebServer(WebSettings(port=0))
    server.start()
    host = FakeHost()
    try:
        with client_of(server) as http:
            for phase in ("loading", "warming"):
                server.gate.enter(phase)  # type: ignore[arg-type]
                answer = http.get("readyz")
                assert answer.status_code == 503 and answer.json()["phase"] == phase
                assert http.get("healthz").status_code == 200
                assert http.get("v1/models").status_code == 503
                assert http.post("v1/sessions", json={}).status_code == 503
            server.serve(host)
            assert http.get("readyz").json()["ready"] is True
            server.gate.enter("draining")
            assert http.get("readyz").status_code == 503
    finally:
        server.stop()
        host.stop()


def test_models_lists_what_is_served() -> None:
    with web(FakeHost()) as server, client_of(server) as http:
        (model,) = http.get("v1/models").json()["data"]
        assert (model["id"], model["width"], model["height"], model["fps"]) == ("fake", 64, 48, 50)
        assert model["formats"] == ["m4s", "jpeg"] and "keys" in model["controls"]["properties"]


def test_metrics_are_of_this_server_alone() -> None:
    with web(FakeHost()) as server, client_of(server) as http, PlainClient(server) as client:
        client.start(num_frames=8)
        client.send("session.shown", frame=3, key_to_photon_ms=[50.0], dropped=2)
        client.until("session.done")
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(http.get("metrics").text)
            for sample in family.samples
        }
        assert found["flashdreams_ar_steps_total",] == 2
        assert found["flashdreams_frames_total", "sent"] == 8
        assert found["flashdreams_stage_seconds_count", "network"] == 2
        assert found["flashdreams_encode_seconds_count",] == 8
        assert found["flashdreams_frame_lateness_seconds_count",] == 8
        assert found["flashdreams_key_to_photon_seconds_count",] == 1
        assert found["flashdreams_key_to_photon_recent_seconds", "0.99"] == 0.05
        assert found["flashdreams_client_dropped_frames_total",] == 2
        assert found["flashdreams_real_time_fraction",] == 1
        assert found["flashdreams_sessions",] == 0
        assert found["flashdreams_phase", "ready"] == 1
        assert found["flashdreams_messages_total", "session.start"] == 1
    with web(FakeHost()) as server, client_of(server) as http:
        assert "flashdreams_ar_steps_total 0.0" in http.get("metrics").text


def test_the_openapi_document_names_all_paths_and_the_schema_is_published() -> None:
    with web(FakeHost()) as server, client_of(server) as http:
        document = http.get("openapi.json").json()
        below = "/v1/sessions/{id}"
        assert set(document["paths"]) == {
            *("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/schema", "/v1/sessions"),
            "/v1/realtime/webrtc",
            *(below, f"{below}/step", f"{below}/control", f"{below}/prompt", f"{below}/snapshot"),
            *(f"{below}/fork", f"{below}/rewind", f"{below}/reset"),
        }
        assert (
            "video/mp4" in document["paths"][f"{below}/step"]["post"]["responses"]["200"]["content"]
        )
        assert http.get("v1/schema").json() == schema()
        assert http.get("docs").status_code == http.get("redoc").status_code == 404, "no CDN"


def test_sockets_send_small_messages_at_once() -> None:
    """Nagle's algorithm would hold every picture after a receipt back for 40 ms."""
    listening = _listen(WebSettings(port=0))
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.proto == socket.IPPROTO_TCP, "as asyncio asks"


def test_bodies_without_an_image_are_small() -> None:
    with web(FakeHost()) as server, client_of(server) as http:
        session = create(http)
        body = {"prompt": "x" * 100_000}
        assert http.post(f"{session}/prompt", json=body).status_code == 413
        assert http.post("v1/sessions", json=body).status_code == 422, "the prompt is too long"


def test_an_address_that_is_taken_is_refused() -> None:
    with web(FakeHost()) as server, pytest.raises(ValueError, match="--port 0"):
        WebServer(WebSettings(port=server.port)).start()
