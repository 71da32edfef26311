"""A session that two clients take up at once has one of them; one that found no memory is kept."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from flashdreams.serving.interface import Listener, Opening, Refused
from flashdreams.serving.protocol import SessionResume
from flashdreams.serving.web.accounts import Accounts, Denied
from flashdreams.serving.web.conversation import Conversation
from flashdreams.serving.web.gate import Gate
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.sessions import Steppers
from flashdreams.serving.web.settings import WebSettings
from tests.live import Client
from tests.unit.serving.fake_host import FakeHost
from tests.unit.serving.plain_client import PATIENCE_S, PlainClient, web
from tests.unit.serving.test_web_http import client_of, create


class Restarted(FakeHost):
    """Has a session of a server before this one; who takes it up is held until it may go on."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__()
        self.id = self.open(Opening(), Client())
        self.arrived, self.go = threading.Semaphore(0), threading.Event()
        self.refusals = refusals

    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        self.arrived.release()
        assert self.go.wait(PATIENCE_S)
        if self.refusals:
            self.refusals -= 1
            raise Refused("Another server has this session, and still runs.")
        return super().attach(session, listener, from_frame)

    def wait(self) -> None:
        """Until somebody takes the session up."""
        assert self.arrived.acquire(timeout=PATIENCE_S)


def test_a_socket_that_comes_while_a_request_takes_the_session_up_is_refused() -> None:
    host = Restarted()
    with web(host) as server, client_of(server) as http, ThreadPoolExecutor(1) as pool:
        request = pool.submit(http.get, f"v1/sessions/{host.id}")
        host.wait()
        with PlainClient(server) as client:
            client.send("session.resume", token=host.id)
            error = client.until("error")
        host.go.set()
        assert error["code"] == "unknown_session" and "over HTTP" in error["message"]
        assert request.result().status_code == 200
        assert host.calls.count(("attach",)) == 1


def test_a_request_that_comes_while_a_socket_takes_the_session_up_is_refused() -> None:
    host = Restarted()
    with web(host) as server, client_of(server) as http, PlainClient(server) as client:
        client.send("session.resume", token=host.id)
        host.wait()
        answer = http.get(f"v1/sessions/{host.id}")
        host.go.set()
        assert answer.status_code == 404 and "over a WebSocket" in answer.json()["message"]
        assert client.until("video.start")["resumed"]
        assert host.calls.count(("attach",)) == 1


def test_a_request_between_a_socket_that_is_refused_and_the_next_one_wins() -> None:
    """The second socket waited for the first; both sides would attach if it just went on."""
    host = Restarted(refusals=1)
    gate, settings = Gate(host), WebSettings(port=0)
    resume = SessionResume(type="session.resume", token=host.id)

    async def race() -> list[object]:
        accounts = Accounts(gate, settings, Metrics(gate))
        steppers = Steppers(accounts)
        transport: object = SimpleNamespace(format=None)
        sockets = [
            asyncio.create_task(Conversation(transport, accounts)._open(resume)) for _ in range(2)
        ]
        requests: list[asyncio.Task[object]] = []
        forget = accounts.forget

        def forget_and_ask(session: object) -> None:
            forget(session)
            requests.append(asyncio.create_task(steppers.find(host.id)))

        accounts.forget = forget_and_ask
        await asyncio.to_thread(host.wait)
        host.go.set()
        found = await asyncio.gather(*sockets, return_exceptions=True)
        return [*found, *await asyncio.gather(*requests, return_exceptions=True)]

    try:
        first, second, request = asyncio.run(race())
    finally:
        host.stop()
    assert isinstance(first, Denied) and "still runs" in str(first)
    assert isinstance(second, Denied) and "over HTTP" in str(second)
    assert not isinstance(request, BaseException)
    assert host.calls.count(("attach",)) == 1


def test_a_socket_goes_on_after_one_that_was_refused() -> None:
    """Negative control: without the request the second socket gets the session."""
    host = Restarted(refusals=1)
    with web(host) as server, PlainClient(server) as first, PlainClient(server) as second:
        first.send("session.resume", token=host.id)
        host.wait()
        second.send("session.resume", token=host.id)
        host.go.set()
        assert "still runs" in first.until("error", code="unknown_session")["message"]
        assert second.until("video.start")["resumed"]


def test_a_session_that_is_kept_is_driven_over_http_again() -> None:
    """The loop ends it for its listener and keeps it, as it does where memory is short."""
    host = FakeHost()
    with web(host) as server, client_of(server) as http:
        session = create(http, prompt="a wood")
        kept = host.sessions[session.rpartition("/")[2]]
        kept.listener.on_end("The device has no memory left for this session.", False)
        assert http.post(f"{session}/step", json={}).status_code == 200
        assert http.get(session).json()["config"]["prompt"] == "a wood"
        assert host.calls.count(("attach",)) == 1
