"""Runs that are killed and go on: the same records, latents, log and video as without it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from safetensors.torch import load_file

from flashdreams.integrations.toy_world import config

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 30, 4
LIMIT_S = 240.0
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
    """A run in its own process group; torchrun for several ranks or restarts."""
    torchrun = ["-m", "torch.distributed.run", *launcher, "--nproc-per-node", str(ranks)]
    torchrun += ["--max-restarts", str(restarts), "-m", "flashdreams.run"]
    program = torchrun if restarts else ["-m", "flashdreams.run"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, *program, *WORDS, *words, "--output-dir", str(folder)],
            stdout=out, stderr=out, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        )  # fmt: skip


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


def wait_until(happens, process, folder):
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        assert process.poll() is None and time.monotonic() < deadline, said(folder)[-3000:]
        time.sleep(0.002)


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
    folder = tmp_path_factory.mktemp("reference") / "out"
    finish(start(folder, 1, restarts=0), folder)
    return folder


@pytest.fixture(scope="module")
def reference_on(tmp_path_factory):
    """The same on some ranks."""
    made = {}

    def get(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"reference{ranks}") / "out"
            finish(start(made[ranks], ranks), made[ranks])
        return made[ranks]

    return get


@pytest.mark.parametrize("seed", range(int(os.environ.get("FLASHDREAMS_KILLS", "3"))))
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_is_killed_at_any_moment_leaves_the_same_run(
    ranks, seed, tmp_path, reference_on
):
    draw = random.Random(f"{ranks} {seed}")
    folder, victim_at = tmp_path / "out", draw.randint(1, STEPS - 2)
    process = start(folder, ranks)
    try:
        wait_until(lambda: steps_of(folder) >= victim_at, process, folder)
        time.sleep(draw.random() * 0.2)
        alive = workers(process.pid)
        if alive:
            os.kill(draw.choice(alive), signal.SIGKILL)
        killed = time.monotonic()
        finish(process, folder)
    finally:
        stop(process)
    seconds = time.monotonic() - killed
    print(f"{ranks} ranks, killed after {victim_at} steps, ended {seconds:.1f} s later")
    assert_same(folder, reference_on(ranks))
    assert (
        ("resumed before AR step" in said(folder)) == (victim_at > EVERY + 1)
        or not alive
        or (abs(victim_at - EVERY) <= 2)
    )


@pytest.mark.parametrize("ranks", [2])
def test_a_rank_that_is_killed_while_a_snapshot_is_written(ranks, tmp_path, reference_on):
    folder = tmp_path / "out"
    process = start(folder, ranks)
    try:
        unfinished = lambda: list(folder.glob("resume_toy-world/*/.step-*.tmp"))  # noqa: E731
        wait_until(lambda: steps_of(folder) >= EVERY and unfinished(), process, folder)
        os.kill(workers(process.pid)[-1], signal.SIGKILL)
        finish(process, folder)
    finally:
        stop(process)
    assert_same(folder, reference_on(ranks))
    assert not unfinished()


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
    finish(start(folder, 1, restarts=0), folder)
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
    finish(start(folder, 1, "--resume", "True", restarts=0), folder)
    step = int(snapshots[-2].name.removeprefix("step-"))
    assert "An older snapshot is tried." in said(folder)
    assert f"resumed before AR step {step}" in said(folder)
    assert_same(folder, reference)
    assert copy.exists()
    with pytest.raises(AssertionError):  # negative control: another seed is another run
        other = tmp_path / "other"
        finish(start(other, 1, "--seed", "9", restarts=0), other)
        assert_same(other, reference)


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
