"""A server process for tests, as a user would start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

START_S = 120.0
ROOT = Path(__file__).parents[2]


class LiveServer:
    """``flashdreams-serve`` in a process of its own; what it prints is kept."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, port: int = 0, **environment: str
    ) -> None:
        """Start it, and wait until it has printed its address.

        Args:
            arguments: of the command line, the slug first.
            folder: working folder.
            port: TCP port; 0 takes a free one.
            environment: added variables.
        """
        paths = [str(ROOT), str(ROOT / "kernels")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flashdreams.serve", *arguments, "--port", str(port)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._found = threading.Event()
        self.port = port
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + START_S
        while not self._found.wait(0.2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no server: {self.output}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"http://[\w.:\[\]]+?:(\d+)", line)
            if found:
                self.port = int(found[1])
                self._found.set()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self.lines)

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://localhost:{self.port}/"

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """Ask it to end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
