"""CUDA streams and events that keep account of what comes after what."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flashdreams.runtime.streams import SideStream


class Stream:
    def __init__(self, device: object = None) -> None:
        self.before: set[int] = set()

    def wait_event(self, event: "Event") -> None:
        self.before |= event.before


class Event:
    def record(self, stream: Stream) -> None:
        self.before = set(stream.before)


class RecordedCuda:
    """In the place of ``torch.cuda``: numbers operations and knows which ones precede each."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.names: list[str] = []
        self.before: list[set[int]] = []
        self.on_main: list[bool] = []

    def current_stream(self, device: object) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outer

    def run(self, name: str) -> None:
        """Queue an operation on the current stream."""
        number = len(self.names)
        self.names.append(name)
        self.before.append(set(self.current.before))
        self.on_main.append(self.current is self.main)
        self.current.before.add(number)

    def precedes(self, first: int, second: int) -> bool:
        return first in self.before[second]


def recorded_side(cuda: RecordedCuda) -> SideStream:
    return SideStream(torch.device("cuda"), cuda)
