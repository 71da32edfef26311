"""Noise as a pure function of its place in the rollout."""

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

NoiseFunction = Callable[[int, int, Sequence[int]], Tensor]
"""``(autoregressive_index, denoising_step, shape) -> float32 CPU tensor``; called by a rollout."""

SEED_LIMIT = 2**64
"""Seeds and indices are unsigned 64-bit numbers."""


class NoiseSource:
    """Standard normal noise as a pure function of seed, AR step, denoising step and shape.

    Drawn on the CPU with a counter-based generator, so that the values are the same on every
    device and every rank, in any order and number of calls. Any callable with
    the same signature (:data:`NoiseFunction`) may replace it.

    The seed is the generator's key; AR step and denoising step are the upper half of its counter.
    Streams cannot overlap: one would have to draw 2**128 blocks first. Of two shapes the smaller
    one gets the first values of the larger, so the first sample of a batch is the same at every
    batch size.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """

    def __init__(self, seed: int) -> None:
        self.seed = _word("seed", seed)
        # Made once: a new generator asks the system for entropy first, only to drop it.
        self._bits = np.random.Philox(key=np.array([self.seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._unused = self._bits.state
        self._ahead: tuple[tuple[int, int, tuple[int, ...]], Tensor] | None = None

    def draw_ahead(
        self, autoregressive_index: int, denoising_step: int, shape: Sequence[int]
    ) -> None:
        """Draw the noise that the next call is likely to need, while the host is idle.

        Arguments as in a call. With CUDA the noise is kept in pinned memory. A call for
        anything else draws it without using this.
        """
        key = (autoregressive_index, denoising_step, tuple(shape))
        noise = self._draw(*key)
        self._ahead = (key, noise.pin_memory() if torch.cuda.is_available() else noise)

    def __call__(
        self, autoregressive_index: int, denoising_step: int, shape: Sequence[int]
    ) -> Tensor:
        """Draw the noise of one denoising step.

        Args:
            autoregressive_index: the AR step, from 0.
            denoising_step: 0 for the initial latent, k >= 1 for the re-noising before step k.
            shape: of the tensor.

        Returns:
            float32, CPU. Drawn in float64 and rounded, so that two machines whose math libraries
            differ in the last bit all but never differ in the result.

        Raises:
            ValueError: a number that is negative or does not fit into 64 bits.
        """
        key = (autoregressive_index, denoising_step, tuple(shape))
        if self._ahead is not None and self._ahead[0] == key:
            noise, self._ahead = self._ahead[1], None
            return noise
        return self._draw(*key)

    def _draw(
        self, autoregressive_index: int, denoising_step: int, shape: tuple[int, ...]
    ) -> Tensor:
        steps = (
            _word("denoising_step", denoising_step),
            _word("autoregressive_index", autoregressive_index),
        )
        self._unused["state"]["counter"][2:] = steps
        self._bits.state = self._unused
        values = self._generator.standard_normal(shape)
        return torch.from_numpy(np.asarray(values, dtype=np.float32))

    def __repr__(self) -> str:
        return f"NoiseSource(seed={self.seed})"


def _word(name: str, value: int) -> int:
    value = operator.index(value)
    if not 0 <= value < SEED_LIMIT:
        raise ValueError(f"{name}={value} is out of range: it must be from 0 to 2**64 - 1.")
    return value
