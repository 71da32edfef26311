"""One server of a fleet, as a child process of its supervisor."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from flashdreams.serving.fleet.members import Member

START_S = 1800.0
"""Start timeout in seconds; long enough to download weights."""
DRAIN_S = 40.0
"""Stop timeout for writing sessions to disk: the server takes at most 25 s, torchrun 30."""
_READY = re.compile(r"READY (http://\S+?)/ ")
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("its parent has gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerProcess:
    """``flashdreams-serve`` in a separate process; under torchrun with several ranks.

    It drains when it is asked to stop, and also when its parent process dies.
    """

    def __init__(
        self,
        words: Sequence[str],
        root: Path,
        name: str,
        *,
        host: str = "127.0.0.1",
        ranks: int = 1,
    ) -> None:
        """Start the process; ``wait`` returns once it accepts sessions.

        Args:
            words: the command line of ``flashdreams-serve`` without address, token and folders.
            root: shared folder of all servers of the fleet.
            name: name of this server; never used by another one.
            host: address at which others reach it.
            ranks: processes on this node, one per GPU.
        """
        self.root, self.name = root, name
        self._token = secrets.token_urlsafe(24)
        self._ready = threading.Event()
        self._url = ""
        self._tail: list[str] = []
        module = ["-m", "flashdreams.serve"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        folders = ["--adopt-from", str(root), "--state-dir", str(root / name), "--name", name]
        folders += ["--output-dir", str(root / name / "output")]
        command = [
            *(sys.executable, *(module if ranks == 1 else torchrun + module), *words),
            *("--host", host, "--port", "0", "--token", self._token, *folders),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, name="server-output", daemon=True).start()

    def wait(self, seconds: float = START_S) -> None:
        """Wait until it accepts sessions; then the whole fleet can find it.

        Raises:
            RuntimeError: it has ended or takes longer; the message has its last lines.
        """
        if not self._ready.wait(seconds) or not self._url:
            self.stop()
            raise RuntimeError(f"A server did not start:\n{''.join(self._tail)}")
        self.member.announce(self.root)

    @property
    def member(self) -> Member:
        """Its announcement."""
        return Member(self.name, self._url, self._token)

    def check(self) -> None:
        """Check that it is running.

        Raises:
            RuntimeError: it has ended; the message has its last lines.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"The server has ended:\n{''.join(self._tail)}")

    def stop(self) -> None:
        """Let it write its sessions to disk and end; no effect if it has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(DRAIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.member.withdraw(self.root)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{self.name}: {line}", end="", flush=True)
            self._tail = [*self._tail[-19:], line]
            found = _READY.search(line)
            if found:
                self._url = found[1]
                self._ready.set()
        self._ready.set()
