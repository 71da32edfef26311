"""torchrun without its imports: the agent and its ranks are forked from processes with torch.

It is torch's own agent, with its rendezvous, restarts and signals; only how it starts a rank is
replaced. A program that starts torch anew takes 2 s of CPU, and a killed group starts twice.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.harness import new_process


class Forked:
    """A process in a group of its own, with what torch's agent asks of ``subprocess.Popen``."""

    def __init__(self, process: Any) -> None:
        process.start()
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutExpired: it has not.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_torchrun(
    words: Sequence[str], folder: Path, out: Path, err: Path, **variables: str
) -> Forked:
    """Start ``torchrun WORDS`` in a folder and in a session of its own.

    Args:
        words: as typed; the program is ``-m flashdreams.run`` or a script.
        folder: where it runs.
        out: file to which what it prints is added.
        err: the same for errors.
        variables: of its environment, beside those of this process.
    """
    agent = new_process(_be_agent, list(words), folder, out, err, {**os.environ, **variables})
    return Forked(agent)


def _be_agent(
    words: list[str], folder: Path, out: Path, err: Path, variables: Mapping[str, str]
) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    for descriptor, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    subprocess_handler.SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign]
    run.main(words)


def _fork_rank(handler: Any, words: Sequence[str], variables: Mapping[str, str]) -> Forked:
    context = multiprocessing.get_context("fork")
    rank = Forked(context.Process(target=_be_rank, args=(words, variables)))
    _lead_a_group(rank.pid)  # the agent signals the group
    return rank


def _lead_a_group(pid: int) -> None:
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it has ended
        os.setpgid(pid, pid)


def _be_rank(words: Sequence[str], variables: Mapping[str, str]) -> None:
    _lead_a_group(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    Path("/proc/self/comm").write_text(f"rank{variables['RANK']}")
    torch.set_num_threads(1)
    program, *sys.argv = words[words.index("-u") + 1 :]
    if program == "-m":
        import_module(sys.argv[0]).entry_point()
    sys.argv.insert(0, program)
    runpy.run_path(program, run_name="__main__")
