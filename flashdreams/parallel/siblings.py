"""Ranks that are killed, seen by the other ranks of their machine from the first line on.

Imports no PyTorch, so that it also covers the seconds in which the ranks import it.
"""

import contextlib
import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from flashdreams.runtime.text import say

_ASKED = {getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP")}
_NAME = "siblings"
_LOOKS = 40
_PERIOD_S = 0.25
_SAME_JOB = ("MASTER_ADDR", "MASTER_PORT")

Note = Callable[[int, int, str], None]
"""Called with a rank, the signal that killed it (0: none or unknown) and a line about its end."""


def watch_siblings() -> None:
    """Report a killed rank of this machine, until this process ends.

    Without it the others end by torchrun's SIGTERM, or with an error of their own that only has an
    address. The lowest remaining rank reports it. Siblings are the ranks that the same parent has
    started for the same job. Linux only; elsewhere, and with one rank, nothing is done. A second
    call does nothing.
    """
    if not hasattr(os, "pidfd_open") or any(t.name == _NAME for t in threading.enumerate()):
        return
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", ""))
    own = os.environ.get("RANK", "")
    if own.isdigit() and ranks.isdigit() and int(ranks) > 1:
        watch = _SiblingWatch(int(own), int(ranks))
        threading.Thread(target=watch.run, name=_NAME, daemon=True).start()


def watch_processes(pids: Mapping[int, int], note: Note, stopped: threading.Event) -> None:
    """Watch processes from a thread of their own.

    Args:
        pids: process by rank.
        note: is called in that thread for each of them that ends.
        stopped: ends the watch.
    """
    files = _open(pids)

    def watch() -> None:
        while files and not stopped.is_set():
            for rank in _ended(files):
                note(rank, *_how_it_ended(rank, pids[rank]))
        for file in files.values():
            os.close(file)

    if files:
        threading.Thread(target=watch, name="peers", daemon=True).start()


def _open(pids: Mapping[int, int]) -> dict[int, int]:
    """File descriptor by rank of the existing processes that may be watched."""
    files: dict[int, int] = {}
    for rank, pid in pids.items():
        if sys.platform == "linux":
            # Not allowed here, gone, or not in this build of Python.
            with contextlib.suppress(OSError, AttributeError):
                files[rank] = os.pidfd_open(pid)
    return files


def _ended(files: dict[int, int]) -> list[int]:
    """Wait a moment for the end of processes: their ranks; they are closed and taken out."""
    with selectors.DefaultSelector() as selector:
        for file in files.values():
            selector.register(file, selectors.EVENT_READ)
        found = {key.fd for key, _ in selector.select(_PERIOD_S)}
    ranks = sorted(rank for rank, file in files.items() if file in found)
    for rank in ranks:
        os.close(files.pop(rank))
    return ranks


def _how_it_ended(rank: int, pid: int) -> tuple[int, str]:
    """The signal that killed a process (0: none, or not known), and a line about it.

    Its parent has usually not reaped it yet, so the kernel still has it.
    Source: proc_pid_stat(5), field 52.
    """
    try:
        status = int(_stat(pid)[-1])
    except (OSError, ValueError, IndexError):
        return 0, f"Rank {rank} (process {pid}) has ended."
    number = status & 0x7F
    if number == 0:
        code = status >> 8
        return 0, f"Rank {rank} (process {pid}) ended with exit code {code} before the others."
    name = signal.Signals(number).name if number in list(signal.Signals) else "unknown"
    why = ", as the kernel does when memory is full" if name == "SIGKILL" else ""
    return number, f"Rank {rank} (process {pid}) was killed by signal {number} ({name}){why}."


class _SiblingWatch:
    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.pids: dict[int, int] = {}
        self.files: dict[int, int] = {}

    def run(self) -> None:
        looks = 0
        while looks < _LOOKS or self.files:
            if looks < _LOOKS and len(self.pids) < self.ranks - 1:  # some may not have started yet
                self._look()
            looks += 1
            for rank in _ended(self.files):
                self._note(rank)

    def _look(self) -> None:
        new = {r: pid for r, pid in _find_siblings(self.rank).items() if r not in self.pids}
        files = _open(new)
        self.files |= files
        self.pids |= {rank: new[rank] for rank in files}

    def _note(self, rank: int) -> None:
        number, text = _how_it_ended(rank, self.pids[rank])
        if number and number not in _ASKED and self.rank < min(self.files, default=self.rank + 1):
            say(f"flashdreams: error: {text}", beside=self.rank > 0)


def _find_siblings(own: int) -> dict[int, int]:
    """Process by rank of the other ranks that this process's parent has started for this job."""
    parent = str(os.getppid())
    job = {name: os.environ.get(name) for name in _SAME_JOB}
    found: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, LookupError):
            if _stat(int(entry.name))[1] != parent:
                continue
            lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            environ = dict(line.split("=", 1) for line in lines if "=" in line)
            if all(environ.get(name) == value for name, value in job.items()):
                found[int(environ["RANK"])] = int(entry.name)
    found.pop(own, None)
    return found


def _stat(pid: int) -> list[str]:
    """Fields of a process after its name: state, parent, ..., how it ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
