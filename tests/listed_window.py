"""A window that is a plain list of frames, in the official order: stands in for KV caches."""

from types import SimpleNamespace

import torch
from torch import Tensor


def turn_in_time(k: Tensor, frames: int) -> Tensor:
    """Rotate the time pairs of keys ``[B, S, N, D]`` on by some frames, in complex numbers."""
    pairs = k.shape[-1] // 2
    time_pairs = pairs - 2 * (pairs // 3)
    speeds = 10000.0 ** (-torch.arange(time_pairs, dtype=torch.float64) / time_pairs)
    turn = torch.polar(torch.ones(pairs, dtype=torch.float64), torch.zeros(pairs).double())
    turn[:time_pairs] = torch.polar(torch.ones_like(speeds), speeds * frames)
    spun = torch.view_as_complex(k.double().unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(spun).flatten(-2).float()


class Window:
    """The frames that attention sees: protected ones, rolling ones, the current chunk."""

    def __init__(self, sink: int, local: int) -> None:
        self.sink, self.local = sink, local
        self.frames: list[int] = []
        self.pin: list[int] = []
        self.current: list[int] = []
        self.sink_stays = False

    def admit(self, chunk: list[int]) -> None:
        self.current = chunk
        self.frames += chunk
        while len(self.frames) > self.local:
            behind = self.frames[self.sink : self.sink + len(self.pin)]
            protected = len(self.pin) if self.pin and behind == self.pin else 0
            del self.frames[self.sink + protected]


class Layer:
    """Stands in for the KV cache of a layer."""

    cursor, spec = SimpleNamespace(groups=()), SimpleNamespace(storage="native")
    scales, quantizes_early = None, False

    def __init__(self, window: Window, tokens: int, relative: bool) -> None:
        self.window, self.tokens, self.relative = window, tokens, relative
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(k.split(self.tokens, 1), v.split(self.tokens, 1), strict=True)
        frames = self.window.frames
        # Frames that are only asked, not kept: the first ones of a window that is computed anew.
        new = dict(zip(self.window.current, pairs, strict=True))
        sink = frames[: self.window.sink] if self.window.sink_stays else []
        self.kept |= {f: pair for f, pair in new.items() if f in frames and f not in sink}
        keys = [self._at_place(i, f) for i, f in enumerate(frames)]
        return torch.cat(keys, 1), torch.cat([self.kept[f][1] for f in frames], 1)

    def _at_place(self, place: int, frame: int) -> Tensor:
        """With relative positions: places in the window count, not frames."""
        frames, key = self.window.frames, self.kept[frame][0]
        behind = frames[-1] - (len(frames) - 1) + place - frame
        return turn_in_time(key, behind) if self.relative and behind else key
