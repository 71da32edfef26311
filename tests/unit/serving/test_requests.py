"""What clients ask of a host wakes its loop, and waits in order; no model runs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashdreams.serving.host import LiveHost
from flashdreams.serving.interface import Opening
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.loop import TurnLoop
from tests.live import Client


@pytest.fixture
def host() -> Iterator[LiveHost]:
    """With one place; all events are valid."""
    offer: Any = SimpleNamespace(seed=0, prompt=None, commands=("reset",), model="m")
    controller: Any = SimpleNamespace(check=lambda values: None)
    nobody: Any = None
    host = LiveHost(offer, ServingLimits(), 1, nobody, controller, torch.device("cpu"))
    yield host
    host.delivery.close()


@pytest.mark.parametrize("happens", [False, True])
def test_what_happens_while_the_loop_decides_wakes_it(
    host: LiveHost, happens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an event it waits: the negative control."""
    live = host.sessions[host.open(Opening(), Client())]
    host.queue.remove(live)
    live.where, live.waits = "device", False

    def decide() -> float:
        if happens:
            host.pause(live.id, False)
        return 1.0

    waits: list[float] = []
    monkeypatch.setattr(host.lock, "wait", waits.append)
    dispatcher: Any = SimpleNamespace(host=host, rest=lambda: None)
    keeper: Any = SimpleNamespace(keeps=True)
    turns: Any = SimpleNamespace(next=decide)
    TurnLoop(dispatcher, keeper, turns).run_once()
    assert len(waits) == (0 if happens else 1)


def test_every_request_of_a_client_wakes_the_loop(host: LiveHost) -> None:
    session = host.open(Opening(), Client())
    assert host.news == 1
    requests = [
        lambda: host.control(session, {}, None),
        lambda: host.pause(session, True),
        lambda: host.pause(session, False),
        lambda: host.command(session, "reset", None, {}),
        lambda: host.detach(session),
        lambda: host.attach(session, Client()),
        lambda: host.close(session),
    ]
    for request in requests:
        before = host.news
        request()
        assert host.news > before


@pytest.mark.parametrize(
    ("where", "waits"), [("nowhere", True), ("disk", True), ("device", False), ("host", False)]
)
def test_events_of_a_session_without_a_place_wait_behind_the_older_ones(
    host: LiveHost, where: Any, waits: bool
) -> None:
    """Also while it gets its place, when its rollout is there and its events are not."""
    live = host.sessions[host.open(Opening(), Client())]
    handed_over: list[Any] = []
    rollout: Any = SimpleNamespace(submit=handed_over.append)
    host.engine_of = lambda session: rollout
    live.where = where
    host.control(live.id, {"keys": "w"}, "a")
    assert [command.id for command in live.commands] == (["a"] if waits else [])
    assert [command.id for command in handed_over] == ([] if waits else ["a"])
