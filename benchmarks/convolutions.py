"""The convolutions of a network, timed alone: a lower bound of its time."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import report
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashdreams.models.decoder_forms import WHOLE_CHANNELS

LAYOUTS = ("contiguous", "channels last")
"""Memory layouts."""


IN_PAIRS = "in pairs ms"


@dataclass(frozen=True)
class Convolution:
    """One convolution; without padding in time, since the input includes the carried frames."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the result."""
        sizes = zip(self.input[2:], self.weight[2:], self.stride, self.padding, strict=True)
        return self.input[0], self.weight[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)

    @property
    def gflop(self) -> float:
        """Billions of additions and multiplications."""
        return 2e-9 * math.prod(self.output) * math.prod(self.weight[1:])

    def in_pairs(self) -> "Convolution | None":
        """The equivalent convolution over pairs of frames; None if there is none."""
        batch, channels, frames, *size = self.input
        if self.weight[2:] != (3, 3, 3) or channels % WHOLE_CHANNELS == 0 or frames % 2:
            return None
        weight = 2 * self.weight[0] + -2 * self.weight[0] % 8, 2 * channels, 2, 3, 3
        shape = batch, 2 * channels, frames // 2, *size
        return Convolution(shape, weight, self.stride, self.padding)

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.input))} * {'x'.join(map(str, self.weight))}"


class _Recorder(TorchDispatchMode):
    """Records convolutions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = {
            torch.ops.aten.convolution.default: (3, 4),
            torch.ops.aten.mkldnn_convolution.default: (4, 3),
        }
        if func in names:
            stride, padding = (tuple(args[i]) for i in names[func])
            shapes = tuple(args[0].shape), tuple(args[1].shape)
            self.found[Convolution(*shapes, stride, padding)] += 1
        return func(*args, **(kwargs or {}))


def record(call: Callable[[], Any]) -> Counter[Convolution]:
    """The convolutions of a call and their counts."""
    with _Recorder() as recorder:
        call()
    return recorder.found


def measure(
    found: Counter[Convolution], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Time each convolution alone, without a bias, on random inputs.

    Args:
        found: from ``record``.
        dtype: dtype of inputs and weights.
        device: device of inputs and weights.

    Returns:
        One row per convolution: milliseconds of one call in each layout, the number of calls, and
        TFLOP/s in the best layout; also the time over pairs of frames, with channels last, if a
        decoder can use that form.
    """
    rows = []
    for conv, count in found.items():
        times = {layout: _time(conv, layout, dtype, device) for layout in LAYOUTS}
        how = LAYOUTS[1], dtype, device
        best = min(times.values())
        in_pairs = conv.in_pairs()
        rows.append(
            {
                "case": str(conv),
                "variant": min(times, key=times.__getitem__),
                "calls": count,
                "best_ms": best,
                "gflop": conv.gflop,
                "tflops": conv.gflop / best,
                **{f"{layout} ms": ms for layout, ms in times.items()},
                **({} if in_pairs is None else {IN_PAIRS: _time(in_pairs, *how)}),
            }
        )
    return rows


def total_ms(rows: Sequence[dict[str, Any]]) -> float:
    """Milliseconds of all calls, each in its best layout."""
    return sum(row["calls"] * row["best_ms"] for row in rows)


def _time(conv: Convolution, layout: str, dtype: torch.dtype, device: torch.device) -> float:
    """Median milliseconds of a call."""
    order = torch.contiguous_format
    if layout != LAYOUTS[0]:
        order = torch.channels_last if len(conv.input) == 4 else torch.channels_last_3d
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return drawn.contiguous(memory_format=order)

    x, weight = normal(conv.input), normal(conv.weight)
    function = F.conv2d if len(conv.input) == 4 else F.conv3d
    times = report.time_calls(
        lambda: function(x, weight, None, conv.stride, conv.padding), device, repeats=3
    )
    return report.percentile(times, 0.5)
