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

from flashdreams.parallel.environment import Environment
from flashdreams.parallel.watchdog import EXIT_CODE, Watchdog

ALONE = Environment(0, 0, 1, torch.device("cpu"))


def test_a_stage_within_its_deadline_is_left_alone():
    reports = []
    with Watchdog(ALONE, deadline_s=0.4, end=reports.append) as watchdog:
        for index in range(3):
            with watchdog.stage("generate", index):
                time.sleep(0.15)
        time.sleep(0.6)
        with watchdog.stage("load", limit_s=60.0):
            time.sleep(0.6)
    assert reports == []


def test_a_hang_is_reported_with_all_ranks(tmp_path):
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
        assert ended.wait(5.0)
    lines = reports[0].splitlines()
    assert lines[1].startswith("  rank 0: diffuse of AR step 7, for 0.")
    assert lines[2].startswith("  rank 1: decode of AR step 6, for 0.")


@pytest.mark.parametrize("outer_limit_s", [0.6, 60.0])
def test_a_stage_within_another_hands_the_watch_back(outer_limit_s):
    """The outer deadline still counts after the inner stage, and not more than it did."""
    reports = []
    with Watchdog(ALONE, deadline_s=60.0, end=reports.append) as watchdog:
        with watchdog.stage("update_prompt", 3, outer_limit_s):
            with watchdog.stage("finalize", 2):
                time.sleep(0.1)
            time.sleep(1.0)
        time.sleep(0.6)
    assert len(reports) == (outer_limit_s < 1)
    assert all("rank 0: update_prompt of AR step 3, for " in report for report in reports)


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline_s=0"):
        Watchdog(ALONE, deadline_s=0)


HANG = """
import time
import torch, torch.distributed as dist
from flashdreams.parallel.environment import init
from flashdreams.parallel.watchdog import Watchdog
environment = init("cpu")
with Watchdog(environment, deadline_s=2.0) as watchdog:
    if environment.rank == 1:
        with watchdog.stage("decode", 4, limit_s=60.0):
            time.sleep(60)
    with watchdog.stage("diffuse", 5):
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
def test_a_hung_group_ends_within_the_deadline(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [*torchrun, "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode != 0 and time.monotonic() - started < 30
    assert "deadline passed: rank 0: diffuse of AR step 5" in done.stderr
    assert "rank 1: decode of AR step 4" in done.stderr
    assert f"exitcode: {EXIT_CODE}" in done.stderr.replace(" ", "").replace(":", ": ")
