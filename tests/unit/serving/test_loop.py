"""Live sessions of the toy world on one rank: uint8 frames compared bit by bit."""

import pytest
import torch

from flashdreams.serving import turns
from flashdreams.serving.delivery import Pictures
from flashdreams.serving.interface import Full, Opening, Refused
from flashdreams.serving.turns import PICTURES_LOST
from tests.live import Client, Visit, served, until

WALK = ["w", "w", "wl", "l", ""]


def walk(visit, steps=WALK):
    """Frames of a walk that changes its keys before every chunk."""
    frames = []
    for keys in steps:
        visit.keys(keys)
        frames.append(visit.ask(1))
    return torch.cat(frames)


def raise_memory_error(*arguments):
    raise MemoryError


@pytest.fixture(scope="module")
def alone(runner, tmp_path_factory):
    """The walk with nobody else there, under two seeds."""
    with served(runner, state_dir=tmp_path_factory.mktemp("alone")) as server:
        return {seed: walk(Visit(server.host, Opening(seed=seed))) for seed in (1, 2)}


def test_two_sessions_interleave_and_see_what_each_sees_alone(runner, folder, alone):
    with served(runner, state_dir=folder) as server:
        visits = {seed: Visit(server.host, Opening(seed=seed)) for seed in (1, 2)}
        for keys in WALK:
            for visit in visits.values():
                visit.keys(keys)
                visit.ask(1)
    for seed, visit in visits.items():
        assert torch.equal(visit.client.frames, alone[seed])
    assert not torch.equal(alone[1], alone[2])


def test_chunks_are_numbered_and_name_their_events(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.keys("w", "first")
        visit.keys("wl", "second")
        visit.ask(1)
        visit.ask(1)
        visit.keys("", "third")
        visit.ask(1)
    chunks = visit.client.chunks
    assert [chunk.applied for chunk in chunks] == [("first", "second"), (), ("third",)]
    assert [chunk.first_frame for chunk in chunks] == [0, 1, 2]
    assert chunks[0].frames.shape == (1, 64, 64, 3) and chunks[0].frames.dtype == torch.uint8
    assert chunks[1].stage_ms["total"] > 0


def test_event_that_comes_twice_acts_once(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.keys("w", "a")
        visit.keys("s", "a")
        visit.ask(1)
        assert visit.client.chunks[0].applied == ("a",)
        session = server.engine.live[visit.id]
        assert session.cache.controller.held == "w"


def test_events_that_are_none_are_refused(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        for values in ({"keys": "q"}, {"keys": 3}, {}, {"jump": True}):
            with pytest.raises(Refused):
                server.host.control(visit.id, values, None)
        with pytest.raises(Refused, match="no such session"):
            server.host.control("nobody", {"keys": "w"}, None)
        visit.ask(1)
        visit.close()
        with pytest.raises(Refused, match="ended"):
            visit.keys("w")


def test_flood_of_events_is_refused_and_the_session_goes_on(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        with pytest.raises(Refused, match="send fewer"):
            for _ in range(1000):
                visit.keys("w")
        visit.ask(2)
        visit.keys("a")


def test_third_session_waits_for_a_place(runner, folder):
    with served(runner, state_dir=folder, max_waiting=2) as server:
        first, second = Visit(server.host), Visit(server.host)
        first.ask(1), second.ask(1)
        third, fourth = Visit(server.host), Visit(server.host)
        third.client.wait(lambda: third.client.states == [("waiting", 1)])
        fourth.client.wait(lambda: fourth.client.states == [("waiting", 2)])
        with pytest.raises(Full, match="All 2 places"):
            Visit(server.host)
        assert server.host.figures().queued == 2
        first.close()
        assert first.client.end == (None, True)
        assert len(third.ask(2)) == 2
        fourth.client.wait(lambda: fourth.client.states[-1] == ("waiting", 1))
        fourth.close()
        assert server.host.figures().sessions == 2


def test_session_ends_after_its_frames(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(num_frames=3))
        visit.client.asked = 10
        server.host.pause(visit.id, False)
        visit.client.wait(lambda: visit.client.end is not None)
    assert visit.client.end == (None, False)
    assert len(visit.client.frames) == 3


def test_paused_session_makes_no_chunks(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(1)
        server.host.pause(visit.id, True)
        visit.client.wait(lambda: visit.client.states[-1][0] == "paused")
        visit.client.asked = 5
        other = Visit(server.host)
        other.ask(4)
        assert len(visit.client.chunks) == 1
        assert len(visit.ask(4)) == 4


def test_save_fork_and_rewind_lead_back_to_the_same_frames(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, ["w", "w"])
        visit.command("fork", name="here")
        visit.command("save", name="there")
        assert server.host.saved(visit.id) == ["here", "there"]
        once = walk(visit, ["wl", "wl"])
        epochs = [chunk.epoch for chunk in visit.client.chunks]
        for name in ("here", "there"):
            visit.command("rewind", name=name)
            assert torch.equal(walk(visit, ["wl", "wl"]), once)
        with pytest.raises(Refused, match="There is no kept state"):
            visit.command("rewind", name="nowhere")
        for kind, name in (("save", "there"), ("save", "here"), ("fork", "there")):
            with pytest.raises(Refused, match="already exists"):
                visit.command(kind, name=name)
    chunks = visit.client.chunks
    assert [chunk.epoch for chunk in chunks] == [*epochs, 1, 1, 2, 2]
    assert [chunk.first_frame for chunk in chunks] == list(range(len(chunks)))


@pytest.mark.parametrize("kind", ["save", "fork"])
def test_a_name_is_taken_while_the_state_is_being_kept(runner, folder, monkeypatch, kind):
    with served(runner, state_dir=folder) as server:
        visit, refused = Visit(server.host), []
        visit.ask(1)
        carry_out = server.engine.carry_out

        def and_once_more(order):
            if order.kind == kind:
                try:
                    server.host.command(visit.id, kind, None, {"name": "here"})
                except Refused as error:
                    refused.append(str(error))
            return carry_out(order)

        monkeypatch.setattr(server.engine, "carry_out", and_once_more)
        visit.command(kind, name="here")
        visit.ask(1)
        assert server.host.saved(visit.id) == ["here"]
    assert len(visit.client.kept) == len(refused) == 1 and "already exists" in refused[0]
    assert not visit.client.refused


def test_reset_begins_again(runner, folder, alone):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, ["a", "s"])
        visit.keys("")
        visit.ask(1)
        visit.command("reset", seed=2)
        assert torch.equal(walk(visit), alone[2])


def test_save_of_a_paused_session_is_where_it_paused(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(seed=1))
        walk(visit, ["w", "w"])
        server.host.pause(visit.id, True)
        visit.command("save", name="a")
        assert len(visit.client.chunks) == 2
        once = walk(visit, ["l", "l"])
        server.host.pause(visit.id, True)
        visit.client.asked = 100
        visit.command("rewind", name="a")
        visit.client.wait(lambda: len(visit.client.chunks) == 5)  # it shows where it is
        assert len(once) == 2 and visit.client.chunks[-1].epoch == 1


def test_prompt_changes_the_scene(runner, folder, alone):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host, Opening(seed=1))
        same = walk(visit, WALK[:2])
        server.host.prompt(visit.id, "night sky, red floor", "p")
        visit.keys("wl")
        changed = visit.ask(1)
        assert visit.client.chunks[-1].applied == ("p",)
        told = [command for _, command in server.engine.live[visit.id].log]
        assert told[-2].values["text"] == "night sky, red floor" and not told[-2].tensors
        with pytest.raises(Refused):
            server.host.prompt(visit.id, "purple elephants", None)
        with pytest.raises(Refused):
            server.host.open(Opening(prompt="purple elephants"), Client())
        other = Visit(server.host, Opening(seed=1, prompt="night sky, red floor"))
        assert not torch.equal(other.ask(1), alone[1][:1])
    assert torch.equal(same, alone[1][:2])
    assert not torch.equal(changed, alone[1][2:3])


def test_image_is_the_first_frame(runner, folder):
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
    with served(runner, state_dir=folder) as server:
        assert server.host.offer.takes_image
        seen = Visit(server.host, Opening(image=image)).ask(1)
        with pytest.raises(Refused, match=r"must be \[1, 3, 64, 64\]"):
            server.host.open(Opening(image=image[..., :32]), Client())
        with pytest.raises(Refused, match="from -1 to 1"):
            server.host.open(Opening(image=image * torch.nan), Client())
    shown = image[0].permute(1, 2, 0)
    assert (seen[0].float() / 127.5 - 1 - shown).abs().mean() < 0.2


def test_values_that_are_not_finite_end_one_session_alone(runner, folder, alone):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host, Opening(seed=1)), Visit(server.host, Opening(seed=2))
        ill.ask(2)
        frames = [walk(well, WALK[:2])]
        caches = server.engine.live[ill.id].cache.diffusion.conditional.layers()
        next(iter(caches)).k.fill_(torch.nan)
        ill.client.asked = 10
        server.host.pause(ill.id, False)
        ill.client.wait(lambda: ill.client.end is not None)
        frames.append(walk(well, WALK[2:]))
        third = Visit(server.host, Opening(seed=1))
        assert torch.equal(walk(third), alone[1])
    error, stopped = ill.client.end
    assert "not finite" in error and not stopped
    assert len(ill.client.chunks) == 2
    assert torch.equal(torch.cat(frames), alone[2])


def test_step_that_runs_out_of_memory_ends_one_session_alone(runner, folder, monkeypatch, caplog):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.ask(1), well.ask(1)

        def fail(turn):
            torch.empty(2**50, dtype=torch.uint8)  # a true error of the allocator

        monkeypatch.setattr(server.engine.live[ill.id], "step", fail)
        ill.client.asked = 10
        server.host.pause(ill.id, False)
        ill.client.wait(lambda: ill.client.end is not None)
        assert ill.client.end == ("The device has no memory left for this session.", False)
        assert "says how many sessions fit" in caplog.text and "Traceback" not in caplog.text
        well.ask(2)
        assert server.host.figures().sessions == 1


def test_listener_that_fails_harms_nobody(runner, folder, caplog):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.client.on_chunk = lambda chunk: 1 / 0
        ill.client.asked = 1
        server.host.pause(ill.id, False)
        until(lambda: "ZeroDivisionError" in caplog.text)
        assert len(well.ask(3)) == 3


def test_listener_that_cannot_say_what_it_has_harms_nobody(runner, folder, caplog):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.client.unshown_seconds = lambda: 1 / 0
        assert len(well.ask(3)) == 3
        until(lambda: "its session is stopped" in caplog.text)
        assert ill.client.chunks == []


def test_figures_of_server_and_session(runner, folder):
    with served(runner, state_dir=folder) as server:
        visit = Visit(server.host)
        visit.ask(4)
        visit.command("save", name="here")
        until(lambda: server.host.saved(visit.id) == ["here"])
        assert server.host.saved("nobody") == []
        until(lambda: server.host.figures(visit.id).frames_per_second > 0)
        own, whole = server.host.figures(visit.id), server.host.figures()
        assert (own.state, own.steps, whole.steps, whole.places) == ("running", 4, 4, 2)
        assert {"diffuse", "decode", "total"} <= own.chunk_ms.keys()
        assert own.host_bytes > 2**20 and own.device_bytes is None


def test_session_whose_pictures_are_lost_ends_alone(runner, folder, monkeypatch, caplog):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.ask(1), well.ask(1)
        with monkeypatch.context() as patch:
            patch.setattr(Pictures, "wait", lambda pictures: 1 / 0)
            ill.client.asked = 10
            server.host.pause(ill.id, False)
            ill.client.wait(lambda: ill.client.end is not None)
        assert ill.client.end == (PICTURES_LOST, False)
        assert "ZeroDivisionError" in caplog.text
        assert len(well.ask(2)) == 2


def test_session_whose_pictures_find_no_memory_ends_alone(runner, folder, monkeypatch):
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.ask(1), well.ask(1)
        with monkeypatch.context() as patch:
            patch.setattr(turns, "Pictures", raise_memory_error)
            ill.client.asked = 10
            server.host.pause(ill.id, False)
            ill.client.wait(lambda: ill.client.end is not None)
        assert "no memory" in ill.client.end[0]
        assert len(well.ask(2)) == 2


def test_session_whose_reset_fails_ends_alone(runner, folder, monkeypatch):
    """Its old rollout has made room for the new one."""
    with served(runner, state_dir=folder) as server:
        ill, well = Visit(server.host), Visit(server.host)
        ill.ask(1), well.ask(1)
        monkeypatch.setattr(server.engine.live[ill.id], "_begin", raise_memory_error)
        server.host.command(ill.id, "reset", "a", {})
        ill.client.wait(lambda: ill.client.end is not None)
        assert "no memory" in ill.client.end[0] and ill.client.refused == []
        assert len(well.ask(2)) == 2
