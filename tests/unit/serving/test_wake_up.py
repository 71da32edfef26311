"""The loop of turns is woken by whatever happens, also while it decides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashdreams.serving.host import LiveHost
from flashdreams.serving.interface import Opening
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.loop import TurnLoop
from tests.live import Client


@pytest.mark.parametrize("happens", [False, True])
def test_what_happens_while_the_loop_decides_wakes_it(
    happens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an event it waits: the negative control."""
    offer: Any = SimpleNamespace(seed=0, prompt=None)
    host = LiveHost(offer, ServingLimits(), 1, None, None, torch.device("cpu"))  # type: ignore[arg-type]
    session = host.open(Opening(), Client())
    host.queue.remove(live := host.sessions[session])
    live.where = "device"

    def decide() -> float:
        if happens:
            with host.lock:
                host.wake()
        return 1.0

    waits: list[float] = []
    monkeypatch.setattr(host.lock, "wait", waits.append)
    dispatcher: Any = SimpleNamespace(host=host, rest=lambda: None)
    keeper: Any = SimpleNamespace(keeps=True)
    turns: Any = SimpleNamespace(next=decide)
    TurnLoop(dispatcher, keeper, turns).run_once()
    assert len(waits) == (0 if happens else 1)
    host.delivery.close()


def test_every_request_of_a_client_wakes_the_loop() -> None:
    offer: Any = SimpleNamespace(seed=0, prompt=None, commands=("reset",), model="m")
    host = LiveHost(offer, ServingLimits(), 1, None, None, torch.device("cpu"))  # type: ignore[arg-type]
    session = host.open(Opening(), Client())
    requests = [
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
    host.delivery.close()
