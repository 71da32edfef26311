"""A served toy world in this process, and clients that ask for one chunk after the other."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from flashdreams.registry import discover
from flashdreams.serving.interface import Chunk, Listener, Opening
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.server import Server

PATIENCE_S = 60.0
"""For a hang; a chunk takes some 20 ms."""


class Client(Listener):
    """Takes chunks when it has asked for them, and remembers what it was told."""

    def __init__(self, asked: float = 0.0) -> None:
        self.asked = asked
        """Chunks that it wants in all."""
        self.chunks: list[Chunk] = []
        self.states: list[tuple[str, int]] = []
        self.kept: list[tuple[str, str | None, str | None]] = []
        self.refused: list[tuple[str | None, str]] = []
        self.end: tuple[str | None, bool] | None = None
        self._news = threading.Condition()

    def _note(self, into: list, item: object) -> None:
        with self._news:
            into.append(item)
            self._news.notify_all()

    def on_state(self, state, position=0):
        self._note(self.states, (state, position))

    def on_chunk(self, chunk):
        self._note(self.chunks, chunk)

    def on_kept(self, command, name, event_id):
        self._note(self.kept, (command, name, event_id))

    def on_refused(self, event_id, message):
        self._note(self.refused, (event_id, message))

    def on_end(self, error, stopped):
        with self._news:
            self.end = (error, stopped)
            self._news.notify_all()

    def unshown_seconds(self):
        return 0.0 if len(self.chunks) < self.asked else math.inf

    def wait(self, holds) -> None:
        """Until something holds.

        Raises:
            TimeoutError: it never does.
        """
        with self._news:
            if not self._news.wait_for(holds, PATIENCE_S):
                raise TimeoutError(f"{self.states} {len(self.chunks)} chunks, end {self.end}")

    @property
    def frames(self) -> torch.Tensor:
        """All pictures, ``[F, height, width, 3]``."""
        return torch.cat([chunk.frames for chunk in self.chunks])


class Visit:
    """A client's session."""

    def __init__(self, host, opening: Opening | None = None, session: str | None = None) -> None:
        self.host, self.client = host, Client()
        if session is None:
            self.id = host.open(opening or Opening(), self.client)
        else:
            self.id = session
            host.attach(session, self.client)

    def ask(self, chunks: int) -> torch.Tensor:
        """The next chunks' pictures."""
        before = len(self.client.chunks)
        self.client.asked = before + chunks
        self.host.pause(self.id, False)
        self.client.wait(lambda: len(self.client.chunks) >= before + chunks)
        return torch.cat([chunk.frames for chunk in self.client.chunks[before:]])

    def keys(self, keys: str, event_id: str | None = None) -> None:
        """Hold keys from the next chunk on."""
        self.host.control(self.id, {"keys": keys}, event_id)

    def command(self, kind: str, **values: object) -> None:
        """Keep or take up a state, and wait for the receipt."""
        before = len(self.client.kept) + len(self.client.refused)
        self.host.command(self.id, kind, f"{kind}{before}", values)
        self.client.wait(lambda: len(self.client.kept) + len(self.client.refused) > before)

    def close(self) -> None:
        """End the session, and wait until it has ended."""
        self.host.close(self.id)
        self.client.wait(lambda: self.client.end is not None)


def toy_runner(folder: Path, **fields: object):
    """The toy world's runner, its files in a folder."""
    config = discover().resolve("toy-world")
    return replace(config.for_serving(), output_dir=folder, **fields).setup()


@contextmanager
def served(runner, **limits: object) -> Iterator[Server]:
    """Serve in a thread; drained at the end."""
    limits = {"max_sessions": 2, "snapshot_every": 0.0, "margin_ms": 0.0} | limits
    server = Server(runner, ServingLimits(**limits))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.drain()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        if failures:
            raise failures[0]


def until(holds, seconds: float = PATIENCE_S) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)
