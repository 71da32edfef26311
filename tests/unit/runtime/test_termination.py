"""What a process does at SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flashdreams.runtime.termination import DEADLINE_EXIT_CODE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

START = """
import ctypes, signal, sys, time
from flashdreams.runtime.termination import Terminated, raise_on_sigterm

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
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


def terminate(
    program: str, grace_s: float, signals: int = 1, number: int = signal.SIGTERM
) -> tuple[int, str, float]:
    """Exit code, what was said, and the seconds from the first signal to the end."""
    command = [sys.executable, "-c", START + program, str(grace_s)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        for _ in range(signals):
            process.send_signal(number)
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


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_terminal_that_goes_away_and_a_person_are_treated_alike(number):
    program = CLOSES_FILES.replace("Terminated", "KeyboardInterrupt")
    assert terminate(program, 100.0, 3, number)[:2] == (1, "closed\n")


def test_nohup_is_respected():
    program = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
raise_on_sigterm()
print("ready", flush=True)
time.sleep(1.0)
print("went on", file=sys.stderr)
"""
    assert terminate(program, 100.0, 1, signal.SIGHUP)[:2] == (0, "went on\n")


def test_a_process_that_hangs_closes_its_files():
    closes = "import atexit\natexit.register(lambda: {}print('closed', file=sys.stderr))\n" + HANGS
    assert terminate(closes.format(""), 0.3)[:2] == (128 + signal.SIGTERM, "closed\n")
    code, said, seconds = terminate(closes.format("time.sleep(600) or "), 0.3)
    assert (code, said) == (128 + signal.SIGTERM, "") and seconds < 100


SWALLOWS = """
import pathlib, sys, tempfile
folder = tempfile.mkdtemp()
pathlib.Path(folder, "swallows.py").write_text('''
import sys, time
print("ready", flush=True)
begin = time.monotonic()
while time.monotonic() - begin < SECONDS:
    try:
        time.sleep(0.01)
    except BaseException:
        print("swallowed", flush=True, file=sys.stderr)
'''.replace("SECONDS", sys.argv[2]))
sys.path.insert(0, folder)
try:
    import swallows
    time.sleep(600)
except ERROR:
    sys.exit("after the import")
"""


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, "Terminated"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_no_signal_is_raised_within_an_import(number, error):
    program = SWALLOWS.replace("ERROR", error).replace("sys.argv[2]", "'0.5'")
    assert terminate(program, 100.0, 1, number)[:2] == (1, "after the import\n")


def test_an_import_that_hangs_is_ended_by_a_signal():
    program = SWALLOWS.replace("ERROR", "Terminated").replace("sys.argv[2]", "'600'")
    code, said, seconds = terminate(program, 100.0)
    assert (code, said) == (128 + signal.SIGTERM, "") and seconds < 60


@pytest.mark.parametrize("limit_s", [0.3, 100.0])
def test_a_stage_that_hangs_is_ended_by_its_deadline(limit_s):
    program = """
from flashdreams.runtime.termination import ends_after
print("ready", flush=True)
with ends_after(LIMIT_S, lambda: print("hung", file=sys.stderr, flush=True)):
    time.sleep(2)
"""
    code, said, _ = terminate(program.replace("LIMIT_S", str(limit_s)), 100.0, signals=0)
    assert (code, said) == ((DEADLINE_EXIT_CODE, "hung\n") if limit_s < 1 else (0, ""))
