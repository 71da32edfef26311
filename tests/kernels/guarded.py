"""Tensors between guard regions, to catch reads and writes that go astray."""

import torch
from torch import Tensor

GUARD = 512


class Guarded:
    """A contiguous tensor filled with NaN, with a NaN guard on both sides.

    A value read from a guard poisons the result; a write to it is seen by :meth:`intact`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        numel = torch.Size(shape).numel()
        self.storage = torch.full((numel + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        self.tensor = self.storage[GUARD : GUARD + numel].view(shape)

    @classmethod
    def around(cls, values: Tensor) -> "Guarded":
        guarded = cls(tuple(values.shape), values.dtype, values.device)
        guarded.tensor.copy_(values)
        return guarded

    def intact(self) -> bool:
        return bool(self.storage[:GUARD].isnan().all() and self.storage[-GUARD:].isnan().all())


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs().max()
    worst = (difference / expected.double().abs().max()).item()
    return worst if worst == worst else float("inf")


TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""16 bits: two units in the last place, as the interpreter truncates to bf16 where a GPU rounds.
float32: a GPU multiplies in three tf32 products."""
