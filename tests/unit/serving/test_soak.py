"""Many AR steps of sessions that come and go: memory stays what it was."""

import os

import psutil
import pytest

from flashdreams.serving.interface import Opening
from tests.live import Visit, served

STEPS = int(os.environ.get("FLASHDREAMS_SOAK_STEPS", "800"))
GROWTH_BYTES = 12 * 2**20
"""Of the last three quarters; a leak of one rollout a session would be 5 times that in 800."""


class Forgetful(list):
    """A list of chunks that keeps their number alone."""

    def append(self, chunk):
        super().append(None)


def round_of(host, number):
    """A visit of twenty chunks with all that a client may do."""
    visit = Visit(host, Opening(seed=number, prompt="night sky" if number % 3 else None))
    visit.client.chunks = Forgetful()
    for step in range(10):
        visit.keys("wlsaj"[(number + step) % 5], f"event{step}")
        host.control(visit.id, {"look": [3, 0]}, None)
        ask(visit, 1)
    visit.command("fork", name="a")
    visit.command("save", name="b")
    host.prompt(visit.id, "red floor" if number % 7 else "gold floor", None)
    ask(visit, 5)
    visit.command("rewind", name="ab"[number % 2])
    host.detach(visit.id)
    visit.client.wait(lambda: visit.client.states[-1][0] == "parked")
    host.attach(visit.id, visit.client)
    ask(visit, 3)
    visit.command("reset", seed=number)
    ask(visit, 2)
    visit.close()


def ask(visit, chunks):
    before = len(visit.client.chunks)
    visit.client.asked = before + chunks
    visit.host.pause(visit.id, False)
    visit.client.wait(lambda: len(visit.client.chunks) >= before + chunks)


@pytest.mark.slow
def test_memory_is_steady(runner, folder):
    with served(runner, state_dir=folder, park_after_s=0.0, snapshot_every=2.0) as server:
        lasting = Visit(server.host)
        lasting.client.chunks = Forgetful()
        before = 0
        for number in range(STEPS // 40):
            ask(lasting, 20)
            lasting.keys("wl"[number % 2])
            round_of(server.host, number)
            if number == STEPS // 40 // 4:
                before = psutil.Process().memory_info().rss
        growth = psutil.Process().memory_info().rss - before
        assert server.host.figures().steps >= STEPS
        print(f"{server.host.figures().steps} AR steps: {growth / 2**20:.1f} MiB more")
        assert growth < GROWTH_BYTES
        assert server.engine.live.keys() == {lasting.id} and not server.engine.parked
    assert {path.name for path in folder.iterdir()} == {lasting.id, "logs", ".in-use"}
