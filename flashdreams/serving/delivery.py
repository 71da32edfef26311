"""Pictures on their way to the host, and the thread that tells listeners."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdreams.runtime.transfer import start_host_copy
from flashdreams.runtime.video import to_pixels

logger = logging.getLogger(__name__)


class Pictures:
    """The frames of a chunk as bytes, on their way to the host."""

    def __init__(self, chunk: Tensor) -> None:
        """Queue the conversion and, from a GPU, the copy; nothing waits.

        Args:
            chunk: ``[1, F, 3, height, width]`` in [-1, 1].
        """
        pixels = to_pixels(chunk).contiguous()
        self._arrived: torch.cuda.Event | None = None
        if pixels.is_cuda:
            pixels, self._arrived = start_host_copy(pixels)
        self._pixels = pixels

    @property
    def there(self) -> bool:
        """Whether nobody has to wait: they never were on a GPU."""
        return self._arrived is None

    def wait(self) -> Tensor:
        """``[F, height, width, 3]`` uint8 on the CPU, once they are there; any thread may ask."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._pixels


class Delivery:
    """Tells listeners what happened, in order, one at a time; the loop never waits for them."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._outstanding = 0
        self._counting = threading.Lock()
        self._telling = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a thread call a function after all that were handed in before."""
        with self._counting:
            self._outstanding += 1
        self._calls.put(lambda: function(*arguments))

    def call_here(self, function: Callable[[], Any]) -> None:
        """Call a function that returns at once: in this thread, unless others are before it.

        A loop that waits for another thread on a busy machine loses a millisecond of each AR step.
        """
        if not self._telling.acquire(blocking=False):
            self.call(function)
            return
        try:
            first = not self._outstanding
            if first:
                _tell(function)
        finally:
            self._telling.release()
        if not first:
            self.call(function)

    def close(self) -> None:
        """Make all calls that are outstanding, and end the thread."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            with self._telling:
                _tell(call)
                with self._counting:
                    self._outstanding -= 1


def _tell(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception:
        logger.exception("A listener failed; its session continues.")
