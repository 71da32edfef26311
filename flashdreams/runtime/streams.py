"""Work on a second CUDA stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """A second CUDA stream, for work whose result is not needed at once.

    The work starts after a mark and ends before the next use of the same state::

        side.mark()             # all that the work builds on is queued
        ...                     # the caller continues: frames are decoded and copied
        with side.work(state):  # runs beside that
            ...
        side.join()             # what the caller queues from here on comes after the work

    The given state is kept until the join: its memory must not be reused while the
    work is running. One stream serves one piece of work after the other. Without CUDA the work
    is done in place, and nothing is kept.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        """Prepare; the stream is made when it is first needed.

        Args:
            device: anything but CUDA means that there is no side.
            cuda: stands in for ``torch.cuda``.
        """
        self.device = device
        self._cuda = cuda if cuda is not None else torch.cuda
        self._beside = device.type == "cuda"
        self._stream: Any = None
        self._ready: Any = None
        self._done: Any = None
        self._kept: Any = None

    def mark(self) -> None:
        """Work queued by the caller so far comes before the next side work."""
        if self._beside:
            self._ready = self._cuda.Event()
            self._ready.record(self._cuda.current_stream(self.device))

    @contextmanager
    def work(self, state: object) -> Iterator[None]:
        """Within this context work is queued on the side, behind the last mark.

        Args:
            state: what is worked on.
        """
        if not self._beside:
            yield
            return
        if self._ready is None:
            self.mark()
        if self._stream is None:
            self._stream = self._cuda.Stream(self.device)
        self._stream.wait_event(self._ready)
        self._kept = (self._kept, state)
        try:
            with self._cuda.stream(self._stream):
                yield
        finally:
            self._done = self._cuda.Event()
            self._done.record(self._stream)

    def join(self) -> None:
        """Work queued by the caller from now on comes after the side work."""
        if self._done is not None:
            self._cuda.current_stream(self.device).wait_event(self._done)
            self._done = self._kept = None
