"""Sessions that nobody looks at: parked in host memory or on disk, and back; frames bit by bit."""

from dataclasses import replace

import pytest
import torch

from flashdreams.serving import restart
from flashdreams.serving.interface import Opening, Refused
from tests.live import Client, Visit, served, until
from tests.unit.serving.test_loop import WALK, walk


@pytest.fixture(scope="module")
def alone(runner, tmp_path_factory):
    with served(runner, state_dir=tmp_path_factory.mktemp("alone")) as server:
        return walk(Visit(server.host, Opening(seed=1)))


def state_of(visit):
    return visit.client.states[-1][0]


def parked_with_a_fork(server):
    """A session that has walked, forked and lost its client."""
    visit = Visit(server.host, Opening(seed=1))
    walk(visit, WALK[:2])
    visit.command("fork", name="here")
    server.host.detach(visit.id)
    visit.client.wait(lambda: state_of(visit) == "parked")
    return visit


def attach(visit):
    """Take up a session again with the same client."""
    return visit.host.attach(visit.id, visit.client)


@pytest.mark.parametrize("parked_gib", [1.0, 0.0], ids=["in host memory", "on disk"])
def test_detached_session_is_parked_and_goes_on_where_it_was(runner, folder, alone, parked_gib):
    limits = {"park_after_s": 0.0, "parked_gib": parked_gib, "state_dir": folder}
    with served(runner, **limits) as server:
        visit = parked_with_a_fork(server)
        figures = server.host.figures()
        assert (figures.sessions, figures.parked) == (0, 1)
        assert (figures.parked_bytes > 2**18) == (parked_gib > 0)
        visit.keys("wl")  # while it is parked
        assert attach(visit) == 2
        visit.client.wait(lambda: state_of(visit) == "running")
        visit.ask(1)
        walk(visit, WALK[3:])
        assert server.host.figures().parked_bytes == 0
        assert server.host.saved(visit.id) == (["here"] if parked_gib else [])
    assert torch.equal(visit.client.frames, alone)


@pytest.mark.parametrize("parked_gib", [1.0, 0.0], ids=["in host memory", "on disk"])
def test_an_event_on_the_way_back_to_the_device_restores_a_session_once(
    runner, folder, monkeypatch, parked_gib
):
    limits = {"park_after_s": 0.0, "parked_gib": parked_gib, "state_dir": folder}
    with served(runner, **limits) as server:
        visit, told = parked_with_a_fork(server), []
        carry_out = server.host.engine.carry_out

        def and_an_event(order):
            told.append(order.kind)
            if order.kind in ("unpark", "resume"):
                visit.keys("l")
            return carry_out(order)

        monkeypatch.setattr(server.host.engine, "carry_out", and_an_event)
        attach(visit)
        visit.ask(2)
        visit.close()
    assert [kind for kind in told if kind in ("unpark", "resume")] == [
        "unpark" if parked_gib else "resume"
    ]


def test_fork_survives_parking(runner, folder, alone):
    with served(runner, park_after_s=0.0, state_dir=folder) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, WALK[:2])
        visit.command("fork", name="here")
        visit.ask(3)
        server.host.pause(visit.id, True)
        visit.client.wait(lambda: state_of(visit) == "parked")
        server.host.pause(visit.id, False)
        visit.command("rewind", name="here")
        assert torch.equal(walk(visit, WALK[2:]), alone[2:])


def test_time_in_the_queue_is_not_idle_time(runner, folder):
    with served(runner, max_sessions=1, state_dir=folder) as server:
        first, second = Visit(server.host), Visit(server.host)
        second.client.asked = 1
        second.client.wait(lambda: second.client.states == [("waiting", 1)])
        server.host.sessions[second.id].last_input -= 2 * server.host.limits.pause_after_s
        first.close()
        second.client.wait(lambda: second.client.chunks)


def test_paused_session_gives_its_place_to_one_that_waits(runner, folder, alone):
    with served(runner, max_sessions=1, park_after_s=0.2, state_dir=folder) as server:
        first = Visit(server.host, Opening(seed=1))
        walk(first, WALK[:2])
        second = Visit(server.host)
        second.client.wait(lambda: second.client.states == [("waiting", 1)])
        server.host.detach(first.id)
        assert len(second.ask(2)) == 2
        assert state_of(first) == "parked"
        attach(first)
        first.client.wait(lambda: first.client.states[-1] == ("waiting", 1))
        third = Visit(server.host)
        third.client.wait(lambda: third.client.states[-1:] == [("waiting", 2)])
        second.close()
        walk(first, WALK[2:])
        third.close()
    assert torch.equal(first.client.frames, alone)


def test_client_that_leaves_the_queue_is_passed_over(runner, folder, alone):
    with served(runner, max_sessions=1, state_dir=folder) as server:
        first, gone, third = (Visit(server.host, Opening(seed=1)) for _ in range(3))
        first.ask(1)
        gone.client.wait(lambda: gone.client.states == [("waiting", 1)])
        server.host.detach(gone.id)
        first.close()
        assert torch.equal(walk(third, WALK[:2]), alone[:2])
        assert state_of(gone) == "waiting"
        third.close()
        assert attach(gone) == 0
        assert torch.equal(walk(gone), alone)


def test_session_whose_client_does_not_come_back_ends(runner, folder):
    with served(runner, park_after_s=0.0, end_after_s=0.3, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        server.host.detach(visit.id)
        visit.client.wait(lambda: visit.client.end is not None)
        assert "No client came back" in visit.client.end[0]
        with pytest.raises(Refused):
            server.host.attach(visit.id, Client())
        assert not (folder / visit.id).exists()


def test_only_so_many_sessions_are_kept_for_clients_that_are_gone(runner, folder):
    with served(runner, park_after_s=0.0, max_kept=2, state_dir=folder) as server:
        visits = []
        for _ in range(3):
            visits.append(Visit(server.host))
            visits[-1].ask(1)
            server.host.detach(visits[-1].id)
            visits[-1].client.wait(lambda: state_of(visits[-1]) == "parked")
        visits[0].client.wait(lambda: visits[0].client.end is not None)
        assert "idle the longest" in visits[0].client.end[0]
        assert [visit.client.end for visit in visits[1:]] == [None, None]
        attach(visits[1])
        visits[1].ask(1)


def test_session_without_input_pauses_and_goes_on_with_a_key(runner, folder):
    with served(runner, pause_after_s=0.3, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        visit.client.wait(lambda: state_of(visit) == "paused")
        visit.keys("w")
        visit.client.wait(lambda: state_of(visit) == "running")


def test_session_lasts_no_longer_than_allowed(runner, folder):
    with served(runner, max_session_s=1.0, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        visit.client.wait(lambda: visit.client.end is not None)
        assert "at most 1 s" in visit.client.end[0]


def test_restarted_server_goes_on_with_all_sessions(runner, folder, alone):
    with served(runner, state_dir=folder, park_after_s=0.0) as server:
        live, parked = (Visit(server.host, Opening(seed=1)) for _ in range(2))
        waiting = Visit(server.host)
        walk(live, WALK[:2]), walk(parked, WALK[:3])
        live.command("save", name="two")
        server.host.detach(parked.id)
        parked.client.wait(lambda: state_of(parked) == "parked")
        waiting.close()
        gone = Visit(server.host)
        gone.ask(1)
        gone.close()
    for visit in (live, parked):
        assert "resume the session" in visit.client.end[0]
    with served(runner, state_dir=folder) as server:
        until(lambda: server.host.figures().parked == 2)
        for visit, steps in ((live, 2), (parked, 3)):
            visit.host, visit.client.end = server.host, None
            assert attach(visit) == steps
            assert torch.equal(walk(visit, WALK[steps:]), alone[steps:])
        live.command("rewind", name="two")
        assert torch.equal(walk(live, WALK[2:]), alone[2:])
        live.command("reset")
        live.keys("")
        assert len(live.ask(1)) == 1
        with pytest.raises(Refused):
            server.host.attach(gone.id, Client())


def test_restarted_server_counts_on_from_what_the_client_has_seen(runner, folder, alone):
    with served(runner, state_dir=folder, snapshot_every=0.05) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, WALK[:2])
        until(lambda: (folder / visit.id).is_dir() and any((folder / visit.id).iterdir()))
    with served(runner, state_dir=folder) as server:
        until(lambda: server.host.figures().parked == 1)
        visit.host = server.host
        assert server.host.attach(visit.id, visit.client, from_frame=7) == 7
        assert torch.equal(walk(visit, WALK[2:]), alone[2:])
        assert visit.client.chunks[-1].first_frame == 9
        assert visit.client.chunks[-1].epoch == 1


def test_prompt_and_image_of_a_session_hold_after_a_restart(runner, folder):
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
    opening = Opening(seed=3, image=image, prompt="night sky, red floor")
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, opening)
        first = walk(visit)
    with served(runner, state_dir=folder) as server:
        until(lambda: server.host.figures().parked == 1)
        visit.host = server.host
        attach(visit)
        visit.keys("")
        visit.command("reset")
        assert torch.equal(walk(visit), first)


def test_session_of_another_method_is_left_alone(runner, folder, caplog, monkeypatch):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
    monkeypatch.setattr(restart, "describe_config", lambda pipeline: {"name": "another"})
    with served(runner, state_dir=folder) as server:
        until(lambda: "was saved with another config" in caplog.text)
        with pytest.raises(Refused):
            server.host.attach(visit.id, visit.client)
    monkeypatch.undo()
    with served(runner, state_dir=folder) as server:
        until(lambda: server.host.figures().parked == 1)


def test_damaged_session_is_left_out(runner, folder, caplog):
    with served(runner, state_dir=folder) as server:
        good, bad = Visit(server.host), Visit(server.host)
        good.ask(1), bad.ask(1)
    header = next((folder / bad.id).glob("state-*")) / "snapshot.json"
    header.write_bytes(header.read_bytes()[:-9])
    with served(runner, state_dir=folder) as server:
        until(lambda: server.host.figures().parked == 1)
        with pytest.raises(Refused):
            server.host.attach(bad.id, bad.client)
        good.host = server.host
        attach(good)
        good.ask(1)
    assert "damaged" in caplog.text


def paused(server, state):
    """A visit that has paused after two steps, once it is in a state."""
    visit = Visit(server.host, Opening(seed=1))
    walk(visit, WALK[:2])
    server.host.pause(visit.id, True)
    visit.client.wait(lambda: state_of(visit) == state)
    return visit


def test_events_of_a_paused_session_wait_for_it_on_disk(runner, folder, alone):
    with served(runner, parked_gib=0.0, state_dir=folder) as server:
        visit = paused(server, "paused")
        visit.keys("wl")
        with server.host.lock:
            server.host.limits = replace(server.host.limits, park_after_s=0.0)
            server.host.wake()
        visit.client.wait(lambda: state_of(visit) == "parked")
        visit.ask(1)
    assert torch.equal(visit.client.frames, alone[:3])


def test_seed_of_a_reset_holds_on_disk_and_after_a_restart(runner, folder, alone):
    def walk_again(host):
        visit.host = host
        attach(visit)
        visit.command("reset")
        return walk(visit)

    limits = {"park_after_s": 0.0, "parked_gib": 0.0, "state_dir": folder}
    with served(runner, **limits) as server:
        visit = Visit(server.host, Opening(seed=2))
        visit.ask(1)
        visit.command("reset", seed=1)
        visit.ask(1)
        server.host.detach(visit.id)
        visit.client.wait(lambda: state_of(visit) == "parked")
        assert torch.equal(walk_again(server.host), alone)
    with served(runner, **limits) as server:
        assert torch.equal(walk_again(server.host), alone)


def test_parked_session_carries_out_a_command_in_its_pause(runner, folder, alone):
    with served(runner, park_after_s=0.3, state_dir=folder) as server:
        visit = paused(server, "parked")
        visit.client.asked = 9
        visit.command("reset")
        visit.client.wait(lambda: len(visit.client.chunks) == 3)
        visit.client.wait(lambda: state_of(visit) == "parked")
        assert len(visit.client.chunks) == 3
    assert torch.equal(visit.client.chunks[2].frames, alone[:1])


def test_session_that_cannot_be_parked_stays_and_is_parked_in_its_next_pause(
    runner, folder, monkeypatch
):
    tried = []

    def fail(cache):
        tried.append(cache)
        raise MemoryError

    with served(runner, park_after_s=0.0, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        with monkeypatch.context() as patch:
            patch.setattr(runner.pipeline, "park", fail)
            server.host.pause(visit.id, True)
            until(lambda: tried)
            visit.ask(2)
            assert len(tried) == 1
        server.host.pause(visit.id, True)
        visit.client.wait(lambda: state_of(visit) == "parked")
        visit.ask(1)
        assert visit.client.end is None


def test_session_is_over_if_its_client_has_seen_all_frames_before_a_restart(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(num_frames=5))
        visit.ask(2)
    with served(runner, state_dir=folder) as server:
        client = Client(asked=1)
        assert server.host.attach(visit.id, client, from_frame=7) == 7
        client.wait(lambda: client.end is not None)
        assert client.end == (None, False) and client.chunks == []
