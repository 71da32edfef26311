"""Copies of pictures to the host, and the thread that calls listeners."""

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
    """The frames of a chunk as uint8, being copied to the host."""

    def __init__(self, chunk: Tensor) -> None:
        """Queue the conversion and, on a GPU, the copy to the host, without waiting.

        Args:
            chunk: ``[1, F, 3, height, width]`` in [-1, 1].
        """
        pixels = to_pixels(chunk).contiguous()
        self._arrived: torch.cuda.Event | None = None
        if pixels.is_cuda:
            pixels, self._arrived = start_host_copy(pixels)
        self._pixels = pixels

    def wait(self) -> Tensor:
        """``[F, height, width, 3]`` uint8 on the CPU, after waiting for the copy; thread-safe."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._pixels


class Delivery:
    """One thread that calls listeners in order, so that the loop never waits for them."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call after all earlier ones; its errors are logged."""
        self._calls.put(lambda: function(*arguments))

    def close(self) -> None:
        """Make all queued calls, then end the thread."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:
                logger.exception("A listener failed; its session continues.")
