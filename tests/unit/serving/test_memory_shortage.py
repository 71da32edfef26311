"""Memory that is short ends no session whose state is kept: its client may try again."""

import errno
from unittest import mock

import pytest
import torch

from flashdreams.serving.interface import Opening, Refused
from tests.live import Client, Visit, served, until
from tests.unit.serving.test_loop import WALK, raise_memory_error, walk
from tests.unit.serving.test_parking import alone, attach, parked_with_a_fork

__all__ = ["alone"]


def be_refused(visit, text: str) -> None:
    """Take a session up that cannot come back, and hear of it."""
    attach(visit)
    visit.client.wait(lambda: visit.client.end is not None)
    error, stopped = visit.client.end
    assert text in error and "take it up again" in error and not stopped
    visit.client.end = None


@pytest.mark.parametrize(
    ("parked_gib", "failure", "text"),
    [
        (1.0, MemoryError, "no memory left"),
        (0.0, MemoryError, "no memory left"),
        (0.0, OSError(errno.EIO, "Input/output error"), "A file of the server failed"),
    ],
    ids=["in host memory", "on disk", "on a disk that fails"],
)
def test_session_that_cannot_come_back_stays_where_it_was_parked(
    runner, folder, alone, parked_gib, failure, text
):
    limits = {"park_after_s": 0.0, "parked_gib": parked_gib, "state_dir": folder}
    with served(runner, **limits) as server:
        visit = parked_with_a_fork(server)
        visit.keys(WALK[2])  # while it is parked
        pipeline = server.engine.pipeline
        if parked_gib:  # the rollout finds memory, and its fork does not
            unpark, found = pipeline.unpark, []

            def unpark_once(*arguments, **named):
                found.append(len(found))
                return unpark(*arguments, **named) if len(found) % 2 else raise_memory_error()

            patch = mock.patch.object(pipeline, "unpark", unpark_once)
        else:
            patch = mock.patch.object(pipeline, "resume", side_effect=failure)
        with patch:
            for _ in range(2):
                be_refused(visit, text)
                assert server.host.figures().parked == 1
        attach(visit)
        visit.ask(1)
        walk(visit, WALK[3:])
        assert server.host.saved(visit.id) == (["here"] if parked_gib else [])
    assert torch.equal(visit.client.frames, alone)


def test_session_whose_step_finds_no_memory_goes_back_to_its_snapshot(runner, folder, alone):
    with served(runner, state_dir=folder, snapshot_every=0.05) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, WALK[:2])
        live = server.host.sessions[visit.id]
        until(lambda: live.saved_changes == live.changes)
        with mock.patch.object(server.engine.live[visit.id], "step", raise_memory_error):
            visit.client.asked = 3
            server.host.pause(visit.id, False)
            visit.client.wait(lambda: visit.client.end is not None)
        assert "take it up again" in visit.client.end[0]
        visit.client.asked = 2
        assert attach(visit) == 2
        assert torch.equal(walk(visit, WALK[2:]), alone[2:])
        assert visit.client.chunks[-1].epoch == 1


def test_session_that_finds_no_memory_and_has_no_snapshot_ends(runner, folder):
    """Negative control: there is nothing to keep."""
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        with mock.patch.object(server.engine.live[visit.id], "step", raise_memory_error):
            visit.client.asked = 2
            server.host.pause(visit.id, False)
            visit.client.wait(lambda: visit.client.end is not None)
        assert "again" not in visit.client.end[0]
        with pytest.raises(Refused):
            server.host.attach(visit.id, Client())


def test_drain_keeps_the_snapshot_of_a_session_that_found_no_memory(runner, folder):
    with served(runner, state_dir=folder, snapshot_every=0.05) as server:
        visit = Visit(server.host)
        visit.ask(1)
        live = server.host.sessions[visit.id]
        until(lambda: live.saved_changes == live.changes)
        with server.host.lock:
            live.failed, live.blameless = "The device has no memory left for this session.", True
            server.drain()
    assert "no memory" in visit.client.end[0]
    with served(runner, state_dir=folder) as server:
        assert len(Visit(server.host, session=visit.id).ask(1)) == 1
