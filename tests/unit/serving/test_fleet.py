"""The relay in front of several servers, and how many there should be."""

import asyncio
import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from flashdreams.serving.fleet import relay as relay_module
from flashdreams.serving.fleet.members import Fleet, Health, Member, find_folder, read_members
from flashdreams.serving.fleet.relay import create_relay
from flashdreams.serving.web.settings import WebSettings
from tests.unit.serving.fake_host import FakeHost
from tests.unit.serving.plain_client import PlainClient, web

TOKEN = "of-the-users"


class NamedHost(FakeHost):
    """Its tokens begin with the server's name."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name

    def open(self, opening: Any, listener: Any) -> str:
        with self._changed:
            id = super().open(opening, listener)
            self.sessions[f"{self.name}-{id}"] = self.sessions.pop(id)
            return f"{self.name}-{id}"


class Relay:
    """What `PlainClient` wants of a server."""

    def __init__(self, root: Path, **settings: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.fleet, self.url = Fleet(root), f"http://127.0.0.1:{port}/"
        app = create_relay(self.fleet, WebSettings(**settings))
        config = uvicorn.Config(app, port=port, log_level="warning", ws="websockets-sansio")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)


def until(holds: Any) -> None:
    limit = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


@contextmanager
def relayed(root: Path, **settings: Any) -> Iterator[Relay]:
    relay = Relay(root, **settings)
    try:
        yield relay
    finally:
        relay.server.should_exit = True
        relay.thread.join(20)


@contextmanager
def member(root: Path, name: str, **settings: Any) -> Iterator[NamedHost]:
    host = NamedHost(name)
    with web(host, token=f"of-{name}", **settings) as server:
        Member(name, server.url.rstrip("/"), f"of-{name}").announce(root)
        yield host


def test_sessions_are_spread_and_come_back_to_their_server(tmp_path):
    with member(tmp_path, "a") as a, member(tmp_path, "b") as b, relayed(tmp_path) as relay:
        tokens = []
        for _ in range(2):
            with PlainClient(relay) as client:  # type: ignore[arg-type]
                tokens.append(client.start()["token"])
                client.pictures(3)
        assert sorted(token[0] for token in tokens) == ["a", "b"]
        for token in tokens * 2:
            with PlainClient(relay) as client:  # type: ignore[arg-type]
                client.send("session.resume", token=token, from_frame=3)
                assert client.until("video.start")["resumed"]
                client.pictures(2)
        assert [len(host.sessions) for host in (a, b)] == [1, 1]


def test_client_that_waits_moves_to_a_server_that_has_a_place(tmp_path):
    with member(tmp_path, "a") as a, relayed(tmp_path) as relay:
        a.places = 1
        until(lambda: "a" in relay.fleet.health)
        with (
            PlainClient(relay) as first,  # type: ignore[arg-type]
            PlainClient(relay) as second,  # type: ignore[arg-type]
        ):
            first.start()
            second.send("session.start")
            second.until("video.queued")
            with member(tmp_path, "b"):
                assert second.until("video.start")["token"].startswith("b-")
                second.pictures(2)
                first.pictures(2)


def test_server_that_is_lost_closes_its_sockets_with_a_word(tmp_path):
    with relayed(tmp_path) as relay:
        with member(tmp_path, "a"):
            until(lambda: "a" in relay.fleet.health)
            client = PlainClient(relay)  # type: ignore[arg-type]
            client.start()
        assert client.close_code() == 1012 and client.of_type("error")[-1]["code"] == "draining"
        with PlainClient(relay) as late:  # type: ignore[arg-type]
            late.send("session.start")
            assert late.until("error")["code"] == "not_ready"


def test_server_that_refuses_a_socket_is_passed_over(tmp_path):
    with member(tmp_path, "a", max_sockets=1) as a, relayed(tmp_path) as relay:
        until(lambda: "a" in relay.fleet.health)
        with PlainClient(relay) as first:  # type: ignore[arg-type]
            first.start()
            with PlainClient(relay) as second:  # type: ignore[arg-type]
                second.send("session.start")
                assert second.until("error")["code"] == "not_ready"
                assert second.close_code() == 1013
        assert len(a.sessions) == 1


def test_servers_are_asked_again_after_a_failure(monkeypatch, caplog):
    monkeypatch.setattr(relay_module, "REFRESH_S", 0.0)
    asked_twice = asyncio.Event()

    class FailingFleet(Fleet):
        calls = 0

        async def refresh(self, client: Any) -> None:
            self.calls += 1
            if self.calls == 1:
                raise PermissionError("of the shared folder")
            asked_twice.set()

    async def run() -> None:
        watch = asyncio.create_task(relay_module._watch(FailingFleet(Path()), None))
        asked = asyncio.create_task(asked_twice.wait())
        await asyncio.wait({watch, asked}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        for task in (watch, asked):
            task.cancel()

    asyncio.run(run())
    assert asked_twice.is_set()
    assert "of the shared folder" in caplog.text


def test_http_goes_to_the_server_of_the_session(tmp_path):
    with member(tmp_path, "a"), member(tmp_path, "b"), relayed(tmp_path) as relay:
        ids = [httpx.post(f"{relay.url}v1/sessions", json={}).json()["id"] for _ in range(2)]
        assert sorted(id[0] for id in ids) == ["a", "b"]
        for id in ids:
            answer = httpx.post(f"{relay.url}v1/sessions/{id}/step", json={"format": "npy"})
            assert answer.status_code == 200 and "x-flashdreams-step" in answer.headers
        assert httpx.get(f"{relay.url}v1/sessions/b-of-nobody-at-all").status_code == 404
        assert httpx.get(f"{relay.url}readyz").json()["ready"]
        assert "flashdreams_fleet_servers 2" in httpx.get(f"{relay.url}metrics").text


def test_users_need_their_token_and_never_see_that_of_a_server(tmp_path):
    with member(tmp_path, "a"), relayed(tmp_path, token=TOKEN) as relay:
        for path in ("", "v1/models", "metrics", "page/main.js"):
            assert httpx.get(relay.url + path).status_code == 401
            of_server = {"Authorization": "Bearer of-a"}
            assert httpx.get(relay.url + path, headers=of_server).status_code == 401
        with PlainClient(relay) as client:  # type: ignore[arg-type]
            assert client.until("error")["code"] == "unauthorized"
        with httpx.Client(base_url=relay.url) as browser:
            answer = browser.get(f"/?token={TOKEN}", follow_redirects=True)
            assert answer.status_code == 200 and "of-a" not in answer.text
            assert browser.get("/v1/models").status_code == 200
        with PlainClient(relay, f"?token={TOKEN}") as client:  # type: ignore[arg-type]
            client.start()
        strange = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}
        assert httpx.post(f"{relay.url}v1/sessions", json={}, headers=strange).status_code == 403


def test_address_of_a_server_is_for_its_user_alone(tmp_path):
    Member("a", "http://127.0.0.1:1", "secret").announce(tmp_path)
    assert (tmp_path / "a" / "server.json").stat().st_mode & 0o077 == 0
    assert [m.token for m in read_members(tmp_path)] == ["secret"]
    Member("a", "", "").withdraw(tmp_path)
    assert read_members(tmp_path) == []


def test_session_is_where_its_folder_is(tmp_path):
    token = "a-0123456789abcdef"
    (tmp_path / "b" / token).mkdir(parents=True)
    assert find_folder(tmp_path, token) == "b"
    assert find_folder(tmp_path, "../b") is None and find_folder(tmp_path, "*" * 20) is None


def test_session_of_a_server_that_is_gone_goes_to_the_one_that_took_it_over(tmp_path):
    token = "gone-0123456789abcdef"
    (tmp_path / "b" / token).mkdir(parents=True)
    fleet = Fleet(tmp_path)
    fleet.members = {name: Member(name, "", "") for name in ("b", "c")}
    fleet.health = {"b": Health(sessions=3, places=4), "c": Health(places=4)}
    owner = asyncio.run(fleet.of_session(token))
    assert owner is not None and owner.name == "b"
    other = asyncio.run(fleet.of_session("gone-of-nobody-at-all"))
    assert other is not None and other.name == "c", "no folder: the one with most free places"


def test_new_sessions_go_where_most_places_are_free(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.members = {name: Member(name, "", "") for name in ("a", "b", "c")}
    fleet.health = {
        "a": Health(sessions=3, places=4),
        "b": Health(sessions=1, queued=1, places=4),
    }
    chosen = [fleet.least_loaded() for _ in range(3)]
    assert [m.name for m in chosen if m] == ["b", "a", "b"]


def launcher() -> Any:
    path = Path(__file__).parents[3] / "launch" / "ray_serve.py"
    spec = importlib.util.spec_from_file_location("ray_serve", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("now", "sessions", "queued", "places", "known", "wanted"),
    [
        (2, 0, 0, 0, 0, 2),  # nobody has said anything yet
        (1, 2, 0, 2, 1, 1),
        (1, 2, 1, 2, 1, 2),  # one who waits is a replica more
        (2, 4, 5, 4, 2, 5),
        (4, 3, 0, 8, 4, 2),
        (3, 0, 0, 6, 3, 0),  # Serve keeps its minimum
    ],
)
def test_replicas_follow_sessions_and_queue(now, sessions, queued, places, known, wanted):
    pytest.importorskip("ray.serve", reason="pip install 'flashdreams[ray]'")
    total = {"sessions": sessions, "queued": queued, "places": places}
    assert launcher().wanted(now, total, known) == wanted
