"""What clients ask of a host wakes its loop, and waits in order; no model runs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashdreams.serving.host import MAX_EVENTS, MAX_PROMPTS, LiveHost
from flashdreams.serving.interface import Opening, Refused
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.loop import TurnLoop
from flashdreams.serving.turns import IDLE_S
from tests.live import Client


@pytest.fixture
def host() -> Iterator[LiveHost]:
    """With one place; all events are valid."""
    offer: Any = SimpleNamespace(
        seed=0, prompt=None, commands=("reset",), model="m", prompts_change=True
    )
    controller: Any = SimpleNamespace(check=lambda values: None)
    prompts: Any = SimpleNamespace(encode=lambda text: {"text": torch.zeros(1, 2, 3)})
    engine: Any = SimpleNamespace()
    host = LiveHost(offer, ServingLimits(), 1, prompts, controller, engine)
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
    host.engine.rest = lambda: None
    keeper: Any = SimpleNamespace(keeps=True)
    turns: Any = SimpleNamespace(next=decide)
    TurnLoop(host, keeper, turns).run_once()
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


@pytest.mark.parametrize("where", ["nowhere", "disk", "device", "host"])
def test_events_wait_for_the_next_turn_wherever_the_session_is(host: LiveHost, where: Any) -> None:
    live = host.sessions[host.open(Opening(), Client())]
    live.where = where
    for name in ("a", "b", "a", None, None):
        host.control(live.id, {"keys": "w"}, name)
    assert [command.id for command in live.commands] == ["a", "b", "", ""], "no event acts twice"
    with pytest.raises(Refused):
        host.control(live.id, {"look": float("nan")}, None)


@pytest.mark.parametrize(("seconds", "in_flight", "rests"),
                         [(IDLE_S, 0, True), (0.01, 0, False), (IDLE_S, 1, False)])  # fmt: skip
def test_ranks_wait_outside_of_collectives_while_no_client_asks_for_a_chunk(
    host: LiveHost, monkeypatch: pytest.MonkeyPatch, seconds: float, in_flight: int, rests: bool
) -> None:
    """A collective waits no longer than half an hour; a client may."""
    live = host.sessions[host.open(Opening(), Client())]
    host.queue.remove(live)
    live.where, live.waits, live.in_flight = "device", False, in_flight
    calls: list[bool] = []
    monkeypatch.setattr(host.lock, "wait", lambda seconds: None)
    host.engine.rest = lambda: calls.append(True)
    keeper: Any = SimpleNamespace(keeps=True)
    turns: Any = SimpleNamespace(next=lambda: seconds)
    TurnLoop(host, keeper, turns).run_once()
    assert bool(calls) == rests


@pytest.mark.parametrize(("reason", "wants"), [("client", True), ("detached", False)])
def test_a_parked_session_gets_a_place_for_a_command(
    host: LiveHost, reason: Any, wants: bool
) -> None:
    live = host.sessions[host.open(Opening(), Client())]
    host.queue.remove(live)
    live.where, live.waits = "host", False
    live.pause(reason, 0.0)
    host.control(live.id, {"keys": "w"}, "a")
    assert host.queue == [], "an event waits until the session goes on"
    host.command(live.id, "reset", "b", {})
    assert host.queue == [live] * wants
    host.command(live.id, "reset", "c", {})
    assert host.queue == [live] * wants


def test_few_prompts_wait_for_a_chunk_beside_many_controls(host: LiveHost) -> None:
    """Each of them is work for the device, which others wait for."""
    session = host.open(Opening(), Client())
    for _ in range(MAX_PROMPTS):
        host.prompt(session, "a forest", None)
    with pytest.raises(Refused, match="send fewer"):
        host.prompt(session, "a forest", None)
    for _ in range(MAX_EVENTS - MAX_PROMPTS):
        host.control(session, {"keys": "w"}, None)
    with pytest.raises(Refused, match="send fewer"):
        host.control(session, {"keys": "w"}, None)
