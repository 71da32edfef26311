"""Ranks that do not come are named, and nobody waits for ever."""

import os
import socket
import subprocess
import sys
import time

import pytest

CODE = """
import sys
from flashdreams.parallel import joining
joining.REPORT_PERIOD_S = 0.5
from flashdreams.parallel.environment import init
init("cpu", join_limit_s=2.0)
"""


def start(rank: int, world_size: int, port: int) -> subprocess.Popen:
    variables = {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", CODE],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_left_over_rank_zero_gives_up_and_names_who_is_missing(port):
    printed, _ = start(0, 3, port).communicate(timeout=120)
    assert "flashdreams: waiting for ranks 1, 2 of 3" in printed
    assert "TimeoutError: Ranks 1, 2 of 3 did not come within 2 s" in printed
    assert "unset RANK LOCAL_RANK WORLD_SIZE" in printed


def test_a_left_over_other_rank_names_rank_zero(port):
    began = time.monotonic()
    printed, _ = start(1, 2, port).communicate(timeout=120)
    assert f"rank 1 waits for the store of rank 0 at 127.0.0.1:{port}" in printed
    assert "reached no rank 0" in printed and time.monotonic() - began < 100


def test_ranks_that_come_one_after_the_other_meet(port):
    """Negative control."""
    first = start(0, 2, port)
    second = start(1, 2, port)
    for process in (first, second):
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
