"""Live sessions on 1 and 2 strict ranks: the same frames, bit by bit; also over a restart."""

import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from flashdreams.parallel.environment import group_rank
from flashdreams.parallel.mesh import ParallelConfig
from flashdreams.registry import discover
from flashdreams.serving.interface import Opening
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.server import Server
from tests.harness import run_ranks
from tests.live import Visit, until

WALK = ["w", "w", "wl", "l", "", "j", "wj", "w", "w", "w"]
"""Ten chunks: the window of eight frames is full before the end."""


def serve(folder, script, limits):
    """What ``script(host)`` returns, on rank zero; all ranks serve until it is done."""
    config = replace(
        discover().resolve("toy-world").for_serving(),
        output_dir=Path(folder),
        parallel=ParallelConfig(strict=True),
    )
    runner = config.setup()
    server = Server(runner, ServingLimits(max_sessions=2, **limits))
    found = []

    def play() -> None:
        try:
            found.append(script(server.host))
        finally:
            server.drain()

    if group_rank() == 0:
        threading.Thread(target=play).start()
    server.run()
    runner._resources.close()  # the process group is the harness's
    runner._output.close()
    return found[0] if found else None


def walk(visit, steps):
    frames = []
    for keys in steps:
        visit.keys(keys)
        frames.append(visit.ask(1))
    return torch.cat(frames)


def tour(host):
    """Two sessions, their forks, parking and what refuses to be; then the server restarts."""
    a, b = (Visit(host, Opening(seed=seed)) for seed in (1, 2))
    for keys in WALK[:4]:
        walk(a, [keys]), walk(b, [keys])
    a.command("fork", name="four")
    walk(a, WALK[4:6])
    a.command("save", name="six")
    host.detach(b.id)
    b.client.wait(lambda: b.client.states[-1][0] == "parked")
    a.command("rewind", name="four")
    walk(a, WALK[4:])
    host.prompt(a.id, "night sky, red floor", None)
    a.ask(1)
    host.attach(b.id, b.client)
    walk(b, WALK[4:6])
    return (a.id, a.client.frames), (b.id, b.client.frames)


def after_restart(sessions):
    def script(host):
        until(lambda: host.figures().parked == 2)
        visits = []
        for session, steps in sessions:
            visit = Visit(host, session=session)
            walk(visit, steps)
            visits.append(visit)
        visits[0].command("rewind", name="six")
        walk(visits[0], WALK[6:])
        return [visit.client.frames for visit in visits]

    return script


def first(folder):
    return serve(folder, tour, {"park_after_s": 0.0})


def second(folder, a, b):
    sessions = [(a, WALK[:2]), (b, WALK[6:])]
    return serve(folder, after_restart(sessions), {})


@cache
def on(world_size, folder):
    return run_ranks(first, world_size, folder)[0]


def test_two_ranks_serve_the_frames_of_one(tmp_path):
    one, two = (on(n, str(tmp_path / str(n))) for n in (1, 2))
    for (_, mine), (_, theirs) in zip(one, two, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(one[0][1][:4], one[1][1][:4])  # another seed


def test_sessions_go_on_at_another_number_of_ranks(tmp_path):
    found = {}
    for begun, resumed in ((1, 1), (2, 1), (1, 2)):
        folder = str(tmp_path / f"{begun}{resumed}")
        (a, _), (b, before) = run_ranks(first, begun, folder)[0]
        found[begun, resumed] = run_ranks(second, resumed, folder, a, b)[0]
        whole = torch.cat([before, found[begun, resumed][1]])
        assert len(whole) == len(WALK)
    for frames in found.values():
        for mine, theirs in zip(frames, found[1, 1], strict=True):
            assert torch.equal(mine, theirs)


def break_one(host):
    """A session that is broken on every rank, beside one that is well."""
    ill, well = Visit(host, Opening(seed=1)), Visit(host, Opening(seed=2))
    walk(ill, WALK[:2]), walk(well, WALK[:2])
    host.prompt(ill.id, "night sky, red floor", "break")
    ill.client.asked = 10
    host.pause(ill.id, False)
    ill.client.wait(lambda: ill.client.end is not None)
    walk(well, WALK[2:])
    return ill.client.end, len(ill.client.chunks), well.client.frames


def serve_broken(folder):
    """As ``serve``; a prompt that is changed is so large that keys overflow, on all ranks alike."""
    from flashdreams.serving import prompts

    encode = prompts.Prompts.encode

    def overflowing(self, text):
        return {name: x * 1e38 for name, x in encode(self, text).items()}

    prompts.Prompts.encode = overflowing
    return serve(folder, break_one, {})


def test_values_that_are_not_finite_end_one_session_on_all_ranks(tmp_path):
    end, chunks, well = run_ranks(serve_broken, 2, str(tmp_path / "broken"))[0]
    assert end[1] is False and chunks == 2
    assert len(well) == len(WALK)
