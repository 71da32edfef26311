"""What the ranks do when their agent, a neighbour or the machine goes away, or does not come."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.forked_torchrun import start_torchrun

ROOT = Path(__file__).parents[2]
TINY = "self-forcing-tiny-random"
LIMIT_S = 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc"),
]


class Job:
    """torchrun with two ranks; its processes are found by a variable that all of them inherit."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        variables |= {"OMP_NUM_THREADS": "1", "MARK": self.mark, "PYTHONPATH": path}
        with (folder / "said").open("wb") as said:
            self.process = subprocess.Popen(
                [*command, "--nproc-per-node", "2", *words],
                cwd=folder, stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, **variables},
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace").replace("\r", "\n")

    def members(self) -> dict[int, int | None]:
        """Rank, or None, by process."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_bytes()
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                program = (entry / "cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            if f"MARK={self.mark}".encode() in environ and not dead:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", environ)
                is_rank = rank is not None and b"ffmpeg" not in program
                found[int(entry.name)] = int(rank[1]) if rank is not None and is_rank else None
        return found

    def pid(self, rank: int) -> int | None:
        return next((pid for pid, number in self.members().items() if number == rank), None)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def is_gone_after(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def steps(self) -> int:
        found = re.findall(r"(\d+)/\d+ \[", self.said())
        return int(found[-1]) if found else 0


@pytest.fixture
def start(tmp_path: Path):
    jobs: list[Job] = []

    def begin(*words: str, **variables: str) -> Job:
        jobs.append(Job(tmp_path, *words, **variables))
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in job.members():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


def rollout(*options: str) -> list[str]:
    return ["-m", "flashdreams.run", TINY, "--total-blocks", "5000", "--output-dir", "o", *options]


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "o" / f"stats_{TINY}.json").read_text())["records"]


def test_ranks_end_with_their_agent(start, tmp_path: Path) -> None:
    job = start(*rollout())
    job.wait_for(lambda: job.steps() > 10)
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.is_gone_after(20), job.said()
    assert "torchrun's agent has gone" in job.said()
    assert len(records(tmp_path)) >= 10


def test_ranks_that_still_import_end_with_their_agent(start) -> None:
    job = start(*rollout())
    job.wait_for(lambda: job.pid(0) and job.pid(1))
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.is_gone_after(60), job.said()


KILLED = re.compile(
    r"flashdreams: error: Rank 1 \(process \d+\) was killed by signal 9 \(SIGKILL\), .*"
)


def first_error(job: Job) -> str:
    lines = job.said().splitlines()
    return next(line for line in lines if "rror" in line or "Traceback" in line)


def test_a_killed_rank_is_named_first(start, tmp_path: Path) -> None:
    """And not the address that the other one could not reach."""
    job = start(*rollout())
    job.wait_for(lambda: job.steps() > 10)
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.is_gone_after(30), job.said()
    lines = job.said().splitlines()
    assert KILLED.fullmatch(first_error(job)), first_error(job) + job.said()
    ours = [line for line in lines if line.startswith("flashdreams-run: error: ")]
    # Torchrun's SIGTERM may come before its own error.
    assert len(ours) <= 1
    assert all("Rank 1" in line and "gloo" not in line.lower() for line in ours)
    assert len(records(tmp_path)) >= 10


@pytest.mark.parametrize("stage", ["import", "meeting", "warm-up"])
def test_a_rank_killed_before_the_first_step_is_named_first(start, stage: str) -> None:
    job = start(
        "-m", "flashdreams.run", "toy-world", "--total-blocks", "2", "--device", "cpu",
        FLASHDREAMS_RUNNER_CONFIGS="toy-world=tests.parallel.dying:DYING", DIES_AT=stage,
    )  # fmt: skip
    job.wait_for(lambda: KILLED.search(job.said()))
    os.kill(job.process.pid, signal.SIGCONT)  # stopped by the rank that died
    assert job.is_gone_after(60), job.said()
    assert KILLED.fullmatch(first_error(job)), first_error(job) + job.said()
    assert "gloo" not in job.said().lower()


def test_a_stopped_rank_leaves_the_stats_of_the_others(start, tmp_path: Path) -> None:
    """The watchdog's end is no less than another one."""
    job = start(*rollout("--step-deadline-s", "4"))
    job.wait_for(lambda: job.steps() > 10)
    os.kill(job.pid(1), signal.SIGSTOP)
    job.wait_for(lambda: (tmp_path / "o" / f"stats_{TINY}.json").exists())
    assert len(records(tmp_path)) >= 10
    assert "\nflashdreams: deadline passed: rank 0: " in job.said()


def test_a_rank_that_does_not_come_is_named(start) -> None:
    job = start(*rollout("--start-deadline-s", "15"))
    job.wait_for(lambda: job.pid(1))
    os.kill(job.pid(1), signal.SIGSTOP)
    job.wait_for(lambda: "did not arrive" in job.said())
    assert "1 of 2 ranks did not arrive within 15 s: 1." in job.said()


MEETS = """
import os, time
import torch, torch.distributed as dist
from flashdreams.parallel.environment import init, shutdown

place = init("cpu", timeout_s=60)
dist.all_reduce(torch.ones(1))
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < 2 and place.rank == 1:
    os._exit(3)
if attempt < 2:
    time.sleep(600)
print(f"rank {place.rank} in attempt {attempt}", flush=True)
shutdown()
"""


def test_ranks_that_are_started_again_meet_no_old_addresses(tmp_path: Path) -> None:
    (tmp_path / "meets.py").write_text(MEETS)
    said = tmp_path / "said"
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "meets.py"]
    job = start_torchrun(words, tmp_path, said, said)
    try:
        assert job.wait(LIMIT_S) == 0, said.read_text()
    finally:
        job.kill()
    for rank in (0, 1):
        assert f"rank {rank} in attempt 2" in said.read_text()
