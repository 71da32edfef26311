"""Fast random weights of any size: one fixed block of normal numbers, copied everywhere."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BLOCK = 2**20 + 7
"""Size of the block; odd, so that the rows of a weight differ."""
SEED = 0


@contextmanager
def cheap_weights(device: torch.device) -> Iterator[None]:
    """Make the initialisers of ``torch.nn.init`` copy a block of numbers instead of drawing them.

    ``torch.randn`` without a generator does the same. Mean and standard deviation are unchanged,
    so activations keep their magnitude; the values of a tensor do not depend on what was built
    before it. Each initialised parameter is moved to ``device`` at once, because filling 14
    billion parameters there is faster than touching their memory on a CPU.

    Args:
        device: device of the parameters.
    """
    normal = torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED)).to(device)

    draw, on_cpu = torch.randn, normal.cpu()

    def randn(*size: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        if generator is not None:
            return draw(*size, generator=generator, **options)
        x = torch.empty(*size, **options)
        if not x.is_meta:
            for part in x.view(-1).split(BLOCK):
                part.copy_(on_cpu[: len(part)])
        return x

    def fill(x: Tensor, mean: float, std: float) -> Tensor:
        if x.is_meta:
            return x
        with torch.no_grad():
            new = torch.empty(x.shape, dtype=x.dtype, device=device)
            block = (mean + std * normal).to(x.dtype)
            for part in new.view(-1).split(BLOCK):
                part.copy_(block[: len(part)])
            x.data = new
        return x

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randn", randn))
        for name, moments in _INITIALISERS.items():
            replacement = _replacement(fill, moments)
            stack.enter_context(mock.patch.object(torch.nn.init, name, replacement))
        yield


Moments = Callable[..., tuple[float, float]]


def _replacement(fill: Callable[[Tensor, float, float], Tensor], moments: Moments) -> Callable:
    def initialise(tensor: Tensor, *args: float, **options: float) -> Tensor:
        return fill(tensor, *moments(tensor, *args, **options))

    return initialise


def _uniform(_: Tensor, a: float = 0.0, b: float = 1.0, **__: object) -> tuple[float, float]:
    return (a + b) / 2, (b - a) / math.sqrt(12)


def _normal(_: Tensor, mean: float = 0.0, std: float = 1.0, *__: float, **___: object) -> tuple:
    return mean, std


def _kaiming(x: Tensor, a: float = 0.0, *_: object, **__: object) -> tuple[float, float]:
    return 0.0, math.sqrt(2 / (1 + a**2) / max(1, x[:1].numel()))


def _xavier(x: Tensor, gain: float = 1.0, **_: object) -> tuple[float, float]:
    fan_in, fan_out = max(1, x[:1].numel()), max(1, x[:, :1].numel())
    return 0.0, gain * math.sqrt(2 / (fan_in + fan_out))


_INITIALISERS: dict[str, Moments] = {
    "uniform_": _uniform,
    "normal_": _normal,
    "trunc_normal_": _normal,
    "kaiming_uniform_": _kaiming,
    "kaiming_normal_": _kaiming,
    "xavier_uniform_": _xavier,
    "xavier_normal_": _xavier,
}
