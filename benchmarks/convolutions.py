"""The convolutions of a network, timed alone: what is left of its time if all else were free."""

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

LAYOUTS = ("contiguous", "channels last")
"""Memory layouts."""


PER_TAP = "as three 2-D ms"


@dataclass(frozen=True)
class Convolution:
    """One convolution; padding in time is none, the carried frames are a part of the input."""

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

    def frame_by_frame(self) -> "Convolution | None":
        """One of the three 2-D convolutions whose sum this one is; None where there are none."""
        batch, channels, _, *size = self.input
        if len(self.input) != 5 or self.weight[2:] != (3, 3, 3) or batch > 1:
            return None
        frames = self.output[2]
        shapes = (frames, channels, *size), (*self.weight[:2], 3, 3)
        return Convolution(*shapes, self.stride[1:], self.padding[1:])

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.input))} * {'x'.join(map(str, self.weight))}"


class _Recorder(TorchDispatchMode):
    """Notes the convolutions that are called."""

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
    """The convolutions that a call makes, and how often."""
    with _Recorder() as recorder:
        call()
    return recorder.found


def measure(
    found: Counter[Convolution], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Time each convolution alone, without a bias, on random inputs.

    Args:
        found: from ``record``.
        dtype: of inputs and weights.
        device: where they are.

    Returns:
        One row per convolution: milliseconds of one call in each layout, the number of calls, and
        teraflops per second in the best layout; for 3-D ones the time of three 2-D ones beside it,
        whose sum they are.
    """
    rows = []
    for conv, count in found.items():
        times = {layout: _time(conv, layout, dtype, device) for layout in LAYOUTS}
        how = LAYOUTS[1], dtype, device
        best = min(times.values())
        per_tap = conv.frame_by_frame()
        rows.append(
            {
                "case": str(conv),
                "variant": min(times, key=times.__getitem__),
                "calls": count,
                "best_ms": best,
                "gflop": conv.gflop,
                "tflops": conv.gflop / best,
                **{f"{layout} ms": ms for layout, ms in times.items()},
                **({} if per_tap is None else {PER_TAP: 3 * _time(per_tap, *how)}),
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
