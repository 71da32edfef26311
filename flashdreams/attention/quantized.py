"""Keys and values in INT8, and powers of two as scales."""

from typing import Any, Literal

import torch
from torch import Tensor

KVStorage = Literal["native", "fp8", "int8"]
"""How cached keys and values are stored: as they are computed, in 8 bits with a scale per token and
head, or in e4m3 with a fixed scale per head (`flashdreams.attention.fp8`)."""

LARGEST = 127.0
"""The largest value; the range is kept symmetric."""

LARGEST_EXPONENT = 126
"""Powers of two up to this one, and their inverses, are normal float32 numbers."""


class QuantizedTokens:
    """``[B, tokens, N, D]`` in INT8, with one scale per token and head.

    Read and written along its tokens like the tensor that it represents: ``x[:, a:b]`` gives new
    numbers in ``dtype``, assignments and ``index_copy_`` quantize. Scales are
    powers of two, one byte each. So what is read is exact in every ``dtype`` that was written, and
    writing it again changes nothing: moving, exporting and importing tokens lose nothing more.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate zeros.

        Args:
            shape: ``(B, tokens, N, D)``.
            dtype: type of what is read.
            device: where it is allocated.
        """
        self.dtype = dtype
        self.values = torch.zeros(shape, dtype=torch.int8, device=device)
        self.exponents = torch.zeros((*shape[:3], 1), dtype=torch.int8, device=device)

    @property
    def shape(self) -> torch.Size:
        """``[B, tokens, N, D]``."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where it is allocated."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.exponents.nbytes

    @property
    def parts(self) -> list[Tensor]:
        """The stored values and scales, ``[B, ...]`` each."""
        return [self.values, self.exponents]

    def __getitem__(self, index: Any) -> Tensor:
        return dequantize(self.values[index], self.exponents[index], self.dtype)

    def __setitem__(self, index: Any, x: Tensor) -> None:
        self.values[index], self.exponents[index] = quantize(x)

    def index_copy_(self, dim: int, index: Tensor, x: Tensor) -> None:
        """Write ``x`` to the places of ``index`` along ``dim``, as `torch.Tensor.index_copy_`."""
        values, exponents = quantize(x)
        self.values.index_copy_(dim, index, values)
        self.exponents.index_copy_(dim, index, exponents)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to INT8 with a power of two per row.

    The power is the least one with which the row fits: ``values * 2 ** exponents`` is closest to
    ``x`` without any entry being cut.

    Args:
        x: ``[..., D]``.

    Returns:
        Values ``[..., D]`` and exponents ``[..., 1]``, both int8.
    """
    wide = x.float()
    exponents = least_exponents(wide.abs().amax(-1, keepdim=True) / LARGEST)
    scaled = (wide * power_of_two(-exponents)).clamp(-LARGEST, LARGEST).round()
    return scaled.to(torch.int8), exponents.to(torch.int8)


def least_exponents(x: Tensor) -> Tensor:
    """The least exponents, -126 to 126, whose powers of two are not below ``x``, float32."""
    mantissa, exponents = torch.frexp(x)
    # frexp's mantissa is in [0.5, 1), so an exact power of two needs one less.
    return (exponents - (mantissa == 0.5).int()).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def dequantize(values: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * 2 ** exponents`` in ``dtype``: the inverse of `quantize`, up to rounding.

    Args:
        values: ``[..., D]`` int8.
        exponents: ``[..., 1]`` int8.
        dtype: of the result.
    """
    return scaled(values, power_of_two(exponents), dtype)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * factor`` in ``dtype``.

    Float16 holds few powers of two. There the multiplication is in float32, and where rounding went
    past the largest float16 the value saturates.

    Args:
        values: ``[..., D]``, 8 bits.
        factor: float32 powers of two that broadcast to ``values``.
        dtype: of the result.
    """
    if dtype != torch.float16:
        return values.to(dtype) * factor.to(dtype)
    largest = torch.finfo(dtype).max
    return (values.float() * factor).clamp_(-largest, largest).to(dtype)


def power_of_two(exponents: Tensor) -> Tensor:
    """``2 ** exponents`` as float32, exact on every device; integers from -126 to 126."""
    return (exponents.int() + 127 << 23).view(torch.float32)
