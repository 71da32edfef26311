"""Runs that are killed and go on: the same records, latents, log and video as without it."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from safetensors.torch import load_file

from flashdreams.integrations.toy_world import config
from tests.forked_torchrun import start_torchrun
from tests.harness import run_engine

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 30, 4
LIMIT_S = 240.0
KILLS = int(os.environ.get("FLASHDREAMS_KILLS", "1"))
"""Ranks that are killed in each of four cases; one keeps the suite short."""
KILL_SEED = os.environ.get("FLASHDREAMS_KILL_SEED", "0")
KILLS_PER_RUN = 5
WORDS = [
    "toy-world", "--device", "cpu", "--total-blocks", str(STEPS), "--snapshot-every", str(EVERY),
    "--save-latents", "True", "--scale", "2",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
        reason="needs the toy world's weights",
    ),
]


def start(folder, ranks, *words, launcher=("--standalone",), restarts=3):
    """A run in its own process group, under torch's agent."""
    torchrun = [*launcher, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    words = [*torchrun, "-m", "flashdreams.run", *WORDS, *words, "--output-dir", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    printed = folder.with_suffix(".txt")
    return start_torchrun(words, ROOT, printed, printed)


def complete(folder, ranks, *words):
    """The folder of a run that nobody kills, without torchrun."""
    words = [*WORDS, *words, "--output-dir", str(folder)]
    run_engine(ranks, words, folder.with_suffix(".txt"))
    return folder


def said(folder):
    return folder.with_suffix(".txt").read_text().replace("\r", "\n")


def finish(process, folder):
    try:
        assert process.wait(LIMIT_S) == 0, said(folder)[-3000:]
    finally:
        stop(process)


def stop(process):
    """End the run and every process that it has started."""
    if process.poll() is None:
        for child in workers(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def workers(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_of(folder):
    log = folder / "log_toy-world.jsonl"
    return log.read_bytes().count(b'{"step"') if log.exists() else 0


def wait_until(happens, process, folder, may_end=False, every_s=0.02):
    """Wait for something; False if the run, which ``may_end``, has ended before."""
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        if process.poll() is not None and may_end:
            return False
        assert process.poll() is None and time.monotonic() < deadline, said(folder)[-3000:]
        time.sleep(every_s)
    return True


def results(folder):
    """Hashes of all steps, latents, frames, and the rows of the log."""
    records = json.loads((folder / "stats_toy-world.json").read_text())["records"]
    video = imageio_ffmpeg.read_frames(folder / "toy-world.mp4")
    width, height = next(video)["size"]
    frames = np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in video])
    rows = [json.loads(x) for x in (folder / "log_toy-world.jsonl").read_text().splitlines()[1:]]
    return {
        "indices": [r["autoregressive_index"] for r in records],
        "hashes": [r["latent_sha256"] for r in records],
        "latents": load_file(folder / "latents_toy-world.safetensors")["latents"].numpy(),
        "frames": frames,
        "turns": [row for row in rows if "turn" in row],
        "steps": [(row["step"], row["latent_sha256"]) for row in rows if "step" in row],
    }


def assert_same(folder, reference, bits=True):
    found, expected = results(folder), results(reference)
    assert found["indices"] == list(range(STEPS)) and len(found["frames"]) == STEPS
    assert found["turns"] == expected["turns"]
    assert [n for n, _ in found["steps"]] == list(range(STEPS))
    if bits:
        assert found["hashes"] == expected["hashes"] and found["steps"] == expected["steps"]
        assert np.array_equal(found["latents"], expected["latents"])
        assert np.array_equal(found["frames"], expected["frames"])
    else:
        largest = np.abs(expected["latents"]).max()
        assert np.abs(found["latents"] - expected["latents"]).max() <= 1e-5 * largest
    assert not list(folder.glob("*.partial.*"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run that never fails, on one process."""
    return complete(tmp_path_factory.mktemp("reference") / "out", 1)


@pytest.fixture(scope="module")
def reference_on(tmp_path_factory):
    """The same on some ranks."""
    made = {}

    def get(ranks):
        if ranks not in made:
            made[ranks] = complete(tmp_path_factory.mktemp(f"reference{ranks}") / "out", ranks)
        return made[ranks]

    return get


def unfinished(folder):
    """Snapshots that are being written, or were when their writer was killed."""
    return {path.name for path in folder.glob("resume_toy-world/*/.step-*.tmp")}


def make_steps(count, process, folder):
    """Wait until the log has grown by so many AR steps; False if the run ends before."""
    last, made = steps_of(folder), 0

    def has_grown():
        nonlocal last, made
        before, last = last, steps_of(folder)
        made += max(0, last - before) if before else 0  # a resume writes all lines anew
        return made >= count

    return wait_until(has_grown, process, folder, may_end=True)


def resumes(folder):
    return said(folder).count("resumed before AR step")


def kill_a_rank(moment, process, folder, draw):
    """Kill one rank, and wait until the group that takes over makes a step.

    Returns:
        Seconds until then, and whether a snapshot was left half; None if the run ended before.
    """
    runs = make_steps(draw.randint(1, 8 if moment == "chunk" else 2), process, folder)
    old, alive, resumed = unfinished(folder), workers(process.pid), resumes(folder)
    if moment == "snapshot" and runs:
        writes = lambda: unfinished(folder) - old  # noqa: E731
        runs = wait_until(writes, process, folder, may_end=True, every_s=0.002)
    time.sleep(draw.random() * (0.1 if moment == "chunk" else 0.01))
    if not runs or not workers(process.pid):
        return None
    os.kill(draw.choice(alive), signal.SIGKILL)
    killed, half = time.monotonic(), bool(unfinished(folder) - old)
    must_resume = (folder / "resume_toy-world" / "run.json").exists() and any(
        folder.glob("resume_toy-world/*/step-*")
    )
    takes_over = lambda: set(workers(process.pid)) - set(alive)  # noqa: E731
    wait_until(takes_over, process, folder, may_end=True)
    if make_steps(1, process, folder) and must_resume:
        wait_until(lambda: resumes(folder) > resumed, process, folder, may_end=True)
        assert resumes(folder) > resumed, said(folder)[-3000:]
    return time.monotonic() - killed, half


@pytest.mark.parametrize("moment", ["chunk", "snapshot"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_are_killed_at_random_moments_leave_the_same_run(
    ranks, moment, tmp_path, reference_on
):
    """``FLASHDREAMS_KILLS=50`` kills 50 ranks in each case, up to five in a run."""
    draw = random.Random(f"{KILL_SEED} {ranks} {moment}")
    kills, runs = [], 0
    while len(kills) < KILLS:
        assert runs < 3 * KILLS + 3, "runs end before their rank is killed"
        folder, runs = tmp_path / str(runs), runs + 1
        process = start(folder, ranks, restarts=KILLS_PER_RUN)
        try:
            for _ in range(min(KILLS_PER_RUN, KILLS - len(kills))):
                if (found := kill_a_rank(moment, process, folder, draw)) is not None:
                    kills.append(found)
            finish(process, folder)
        finally:
            stop(process)
        assert_same(folder, reference_on(ranks))
        assert not unfinished(folder)
    seconds = sorted(seconds for seconds, _ in kills)
    print(
        f"{ranks} ranks, {moment}: {len(kills)} kills in {runs} runs, "
        f"{sum(half for _, half in kills)} left half a snapshot; the next AR step came "
        f"{seconds[0]:.1f} to {seconds[-1]:.1f} s later, median {seconds[len(seconds) // 2]:.1f} s"
    )


def kill_all_after(steps, folder, ranks, *words):
    process = start(folder, ranks, *words)
    try:
        wait_until(lambda: steps_of(folder) >= steps, process, folder)
    finally:
        stop(process)


def test_a_run_comes_back_on_fewer_ranks(tmp_path, reference):
    """All of 4 ranks and their agent die; 2 ranks go on. The degrees that were asked for are 4."""
    folder = tmp_path / "out"
    kill_all_after(14, folder, 4, "--parallel.ring-degree", "4")
    finish(start(folder, 2, "--parallel.ring-degree", "4", "--resume", "True"), folder)
    assert "This run continues with degrees that fit." in said(folder)
    assert "resumed before AR step" in said(folder)
    assert_same(folder, reference, bits=False)


def test_a_fresh_run_in_an_old_folder_begins_anew(tmp_path, reference):
    folder = tmp_path / "out"
    kill_all_after(10, folder, 1)
    old = {path.name for path in (folder / "resume_toy-world").iterdir()} - {"run.json"}
    complete(folder, 1)
    assert "resumed" not in said(folder)
    assert_same(folder, reference)
    left = {path.name for path in (folder / "resume_toy-world").iterdir()}
    assert len(old) == 1 and left.isdisjoint(old) and len(left) == 1
    kept = sorted(path.name for path in (folder / "resume_toy-world" / left.pop()).iterdir())
    assert kept == ["step-00000024", "step-00000028"]  # the ring


def test_a_damaged_snapshot_falls_back_to_the_one_before(tmp_path, reference):
    folder = tmp_path / "out"
    kill_all_after(18, folder, 1)
    snapshots = sorted(folder.glob("resume_toy-world/*/step-*"))
    part = snapshots[-1] / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    copy = shutil.copytree(folder, tmp_path / "undamaged")
    complete(folder, 1, "--resume", "True")
    step = int(snapshots[-2].name.removeprefix("step-"))
    assert "Trying an older snapshot." in said(folder)
    assert f"resumed before AR step {step}" in said(folder)
    assert_same(folder, reference)
    assert copy.exists()
    with pytest.raises(AssertionError):  # negative control: another seed is another run
        assert_same(complete(tmp_path / "other", 1, "--seed", "9"), reference)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_three_agents_go_on_when_the_fourth_is_lost(tmp_path, reference):
    """One agent per rank; an agent dies with its rank, and nobody types anything."""
    folder, steps = tmp_path / "out", 8
    where = f"localhost:{free_port()}"
    rendezvous = ("--nnodes", "2:4", "--rdzv-backend", "c10d", "--rdzv-endpoint", where)
    agents = []
    try:
        for _ in range(4):
            launcher = (*rendezvous, "--rdzv-id", "job")
            agents.append(start(folder, 1, "--parallel.ring-degree", "4", launcher=launcher))
            time.sleep(1)  # the first one holds the store
        wait_until(lambda: steps_of(folder) >= steps, agents[0], folder)
        lost = agents.pop()
        stop(lost)
        for agent in agents:
            assert agent.wait(LIMIT_S) == 0, said(folder)[-3000:]
    finally:
        for agent in agents:
            stop(agent)
    assert "This run continues with degrees that fit." in said(folder)
    assert "resumed before AR step" in said(folder)
    assert_same(folder, reference, bits=False)
