"""How a run on several ranks ends when something goes wrong, and what it leaves."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flashdreams import run
from flashdreams.integrations.toy_world import config
from tests.forked_torchrun import Forked, start_torchrun
from tests.harness import meeting_point, new_process, run_engine

LIMIT_S = 240
WITHIN_S = 25
"""A group must be gone so soon after the fault: before torchrun would kill a rank that does not
react (30 s) and before a deadline would (60 s), which usually takes a second."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
        reason="needs the toy world's weights",
    ),
]


@pytest.fixture(autouse=True)
def faulty_is_registered(monkeypatch):
    monkeypatch.setenv("FLASHDREAMS_RUNNER_CONFIGS", "faulty=tests.parallel.faulty:FAULTY")


def start(words, folder):
    """Two ranks under torch's agent in a session of its own, output in files of ``folder``."""
    torchrun = ["--standalone", "--nproc-per-node", "2", "-m", "flashdreams.run"]
    return start_torchrun([*torchrun, *words], folder, folder / "out", folder / "err")


def run_alone(words, folder, variables):
    """The engine as one rank that no agent has started."""
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        with (folder / name).open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv[1:] = words
    run.entry_point()


def faulty(fault, folder, blocks=5):
    options = ["faulty", "--fault", fault, "--total-blocks", str(blocks), "--device", "cpu"]
    return [*options, "--output-dir", str(folder)]


def wait(process):
    try:
        return process.wait(LIMIT_S)
    finally:
        if process.poll() is None:
            for pid in [process.pid, *members(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def first_error(folder):
    text = (folder / "err").read_text()
    return text[text.index("flashdreams-run: error") :].splitlines()[0]


def wait_for(path, process):
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(*pids):
    """Whether the processes are gone, and reaped, in time."""
    deadline = time.monotonic() + WITHIN_S
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
    return not left


@pytest.mark.parametrize("fault", ["raise", "die"])
def test_a_rank_that_fails_takes_the_group_down(fault, tmp_path):
    process = start(faulty(fault, tmp_path), tmp_path)
    wait_for(tmp_path / "fault", process)
    assert has_ended(*(int((tmp_path / name).read_text()) for name in ("pid0", "pid1")))
    assert wait(process) != 0
    if fault == "raise":
        text = (tmp_path / "err").read_text()
        assert 0 <= text.find("Traceback") < text.index("flashdreams-run: error")
        assert first_error(tmp_path).startswith(
            "flashdreams-run: error on rank 1: LookupError: the map is torn"
        )
    else:
        assert "Signal 9 (SIGKILL)" in (tmp_path / "err").read_text()


@pytest.mark.parametrize("fault", ["stats", "video"])
def test_a_failing_write_reaches_all_ranks(fault, tmp_path):
    """Without torchrun, which would end the other ranks by itself."""
    words = faulty(fault, tmp_path)
    with meeting_point() as place:
        places = [dict(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
        ranks = [Forked(new_process(run_alone, words, tmp_path, place)) for place in places]
        assert [wait(rank) != 0 for rank in ranks] == [True, True]
    error = first_error(tmp_path)
    assert error.startswith("flashdreams-run: error: ")
    assert str(tmp_path / {"stats": "stats_faulty.json", "video": "faulty.mp4"}[fault]) in error


@pytest.mark.parametrize("whole_group", [False, True])
def test_an_interrupt_ends_all_ranks_and_leaves_a_playable_video(whole_group, tmp_path):
    """Also in a terminal, which interrupts ffmpeg as well, and the ranks beside torchrun."""
    process = start(faulty("slow", tmp_path, blocks=2000), tmp_path)
    wait_for(tmp_path / "step8", process)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    assert has_ended(*(int((tmp_path / name).read_text()) for name in ("pid0", "pid1")))
    assert wait(process) != 0
    assert "flashdreams-run: interrupted" in (tmp_path / "err").read_text()
    steps = len(json.loads((tmp_path / "stats_faulty.json").read_text())["records"])
    frames = count_frames(tmp_path / "faulty.partial.mp4")
    assert steps >= 8 and (frames >= 1 if whole_group else frames in (steps - 1, steps))


def test_a_termination_ends_all_processes_and_leaves_a_playable_video(tmp_path):
    """What a cluster sends first: its patience is for closing files, and nothing may be left."""
    process = start(faulty("slow", tmp_path, blocks=2000), tmp_path)
    wait_for(tmp_path / "step8", process)
    while count_frames(tmp_path / "faulty.partial.mp4") < 1:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert has_ended(*(int((tmp_path / name).read_text()) for name in ("pid0", "pid1")))
    assert wait(process) != 0
    assert has_ended(*members(process.pid)), "ffmpeg ends with its input"
    assert "flashdreams-run: terminated" in (tmp_path / "err").read_text()
    steps = len(json.loads((tmp_path / "stats_faulty.json").read_text())["records"])
    assert steps >= 8 and count_frames(tmp_path / "faulty.partial.mp4") in (steps - 1, steps)
    assert not (tmp_path / "faulty.mp4").exists()
    assert not (tmp_path / "stats_faulty.partial.jsonl").exists()


def members(session):
    """Processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(stat.parent.name))
    return found


def count_frames(path):
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:  # nothing has been written yet
        return 0


def test_strict_runs_have_the_same_checksums_on_one_and_three_ranks(tmp_path):
    options = ["toy-world", "--parallel.strict", "True", "--total-blocks", "10", "--device", "cpu"]
    options += ["--hash-frames", "True"]
    stats = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        run_engine(ranks, [*options, "--output-dir", str(folder)], tmp_path / "said")
        stats.append(json.loads((folder / "stats_toy-world.json").read_text()))
    one, three = stats
    keys = ("latent_sha256", "frames_sha256")
    steps = [[[record[key] for key in keys] for record in s["records"]] for s in stats]
    assert steps[0] == steps[1] and len(steps[0]) == 10
    assert len({tuple(step) for step in steps[0]}) == 10
    degrees = three["header"]["parallel"]
    assert degrees == {"cfg": 1, "ring": 1, "ulysses": 3, "tp": 1}
    sent = three["header"]["collectives"]
    assert sent["ulysses.all_to_all"]["bytes_sent"] > 0
    assert one["header"]["collectives"] == {}
