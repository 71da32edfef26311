import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashdreams.parallel import watchdog as watchdog_module
from flashdreams.parallel.environment import Environment
from flashdreams.parallel.watchdog import EXIT_CODE, Watchdog
from tests.clock import Clock

ALONE = Environment(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, watchdog_module)


def test_a_stage_within_its_deadline_is_left_alone(clock):
    reports = []
    with clock.led(Watchdog(ALONE, deadline_s=0.4, end=reports.append)) as watchdog:
        for index in range(3):
            with watchdog.stage("generate", index):
                clock.move(0.3)
        clock.move(0.6)
        with watchdog.stage("load", limit_s=60.0):
            clock.move(0.6)
    assert reports == []


def test_a_hang_is_reported_with_all_ranks(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(watchdog_module, "_PEERS_S", 60.0)
    store = dist.FileStore(str(tmp_path / "store"), 2)
    here = replace(ALONE, world_size=2, store=store)
    ended = threading.Event()
    reports = []

    def end(report):
        reports.append(report)
        ended.set()

    with (
        Watchdog(replace(here, rank=1)) as other,
        other.stage("decode", 6),
        Watchdog(here, deadline_s=0.5, end=end) as watchdog,
        watchdog.stage("diffuse", 7),
    ):
        while "decode" not in store.get("rank1").decode():  # it waits for the first report
            time.sleep(0.01)
        assert not ended.is_set()
        clock.move(0.75)
        assert ended.wait(60.0)
    lines = reports[0].splitlines()
    assert lines[1] == "  rank 0: diffuse of AR step 7, for 0.8 s"
    assert lines[2] == "  rank 1: decode of AR step 6, for 0.8 s"


@pytest.mark.parametrize("outer_limit_s", [0.6, 60.0])
def test_a_stage_within_another_hands_the_watch_back(outer_limit_s, clock):
    """The outer deadline still counts after the inner stage, and not more than it did."""
    reports = []
    with clock.led(Watchdog(ALONE, deadline_s=60.0, end=reports.append)) as watchdog:
        with watchdog.stage("update_prompt", 3, outer_limit_s):
            with watchdog.stage("finalize", 2):
                clock.move(0.1)
            clock.move(1.0)
        clock.move(0.6)
    assert len(reports) == (outer_limit_s < 1)
    assert all("rank 0: update_prompt of AR step 3, for 1.1 s" in report for report in reports)


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline_s=0"):
        Watchdog(ALONE, deadline_s=0)


HANG = """
import time
import torch, torch.distributed as dist
from flashdreams.parallel.environment import init
from flashdreams.parallel.watchdog import Watchdog
environment = init("cpu")
with Watchdog(environment, deadline_s=1.0) as watchdog:
    if environment.rank == 1:
        with watchdog.stage("decode", 4, limit_s=3600.0):
            time.sleep(3600)
    while b"decode" not in environment.store.get("rank1"):  # it waits for the first report
        time.sleep(0.05)
    with watchdog.stage("diffuse", 5):
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
def test_a_hung_group_ends_after_the_deadline(tmp_path):
    """Long before the rank that hangs would go on."""
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode != 0
    assert "deadline passed: rank 0: diffuse of AR step 5" in done.stderr
    assert "rank 1: decode of AR step 4" in done.stderr
    assert f"exitcode: {EXIT_CODE}" in done.stderr.replace(" ", "").replace(":", ": ")


UNFINISHED = """
import dataclasses, sys, threading
import torch
from tests.parallel.test_watchdog import ALONE
from flashdreams.parallel.watchdog import Watchdog

class SlowStore:
    began = threading.Event()
    def set(self, key, value):
        self.began.set()
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)

watchdog = Watchdog(dataclasses.replace(ALONE, store=SlowStore()))
watchdog.__enter__()
SlowStore.began.wait()
sys.exit(3)
"""


@pytest.mark.slow
def test_a_run_that_fails_while_it_reports_ends_with_its_own_code():
    """A thread that is cut off inside PyTorch would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (3, "")
