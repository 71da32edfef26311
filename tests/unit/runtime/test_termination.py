"""What a process does at SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

START = """
import ctypes, sys, time
from flashdreams.runtime.termination import Terminated, raise_on_sigterm

raise_on_sigterm(grace_s=float(sys.argv[1]))
"""
CLOSES_FILES = """
try:
    print("ready", flush=True)
    time.sleep(600)
except Terminated:
    time.sleep(0.3)
    sys.exit("closed")
"""
HANGS = """
ctypes.CDLL(None).system(b"echo ready; read _")  # waits outside of Python once it is ready
"""


def terminate(program: str, grace_s: float, signals: int = 1) -> tuple[int, str, float]:
    """Exit code, what was said, and the seconds from the first signal to the end."""
    command = [sys.executable, "-c", START + program, str(grace_s)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        code = process.wait(200)
        seconds = time.monotonic() - begin
        return code, process.communicate()[1], seconds


@pytest.mark.parametrize("signals", [1, 3])
def test_files_can_be_closed_however_often_it_comes(signals):
    code, said, seconds = terminate(CLOSES_FILES, 100.0, signals)
    assert (code, said) == (1, "closed\n")
    assert seconds < 100


def test_a_process_that_hangs_outside_of_python_ends_all_the_same():
    code, said, seconds = terminate(HANGS, 0.3)
    assert (code, said) == (128 + signal.SIGTERM, "")
    assert seconds >= 0.3
