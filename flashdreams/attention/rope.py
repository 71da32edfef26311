"""Rotary position embedding over latent frames, rows and columns."""

import torch
from torch import Tensor, nn

from flashdreams.runtime.transfer import to_device


def axis_frequencies(head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor, Tensor]:
    """Angular frequencies of the three axes, in radians per position.

    The ``D/2`` complex pairs of a head are divided as ``[c - 2*(c//3), c//3, c//3]`` for
    (time, height, width), and every axis has its own geometric series.

    Args:
        head_dim: ``D``, even.
        theta: base of the series.

    Returns:
        Three float64 CPU vectors whose lengths add up to ``D/2``.

    Raises:
        ValueError: ``head_dim`` is odd or below 2.

    Source: RoFormer, arXiv:2104.09864, section 3.2; the split over axes is Wan 2.1's.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2 for rotary embedding.")
    pairs = head_dim // 2
    side = pairs // 3

    def series(count: int) -> Tensor:
        exponents = torch.arange(count, dtype=torch.float64, device="cpu") / max(count, 1)
        return theta**-exponents

    return series(pairs - 2 * side), series(side), series(side)


class RotaryEmbedding3D(nn.Module):
    """Builds the rotation table of a chunk; owns no parameters, computes angles in float64.

    Its output is a table over tokens, so a sequence-parallel plan splits it like the tokens.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.frequencies = axis_frequencies(head_dim, theta)

    def forward(self, frames: Tensor, height: int, width: int, device: torch.device) -> Tensor:
        """Rotations of all tokens of some latent frames, in (frame, row, column) order.

        Args:
            frames: ``[T]``, position of each latent frame.
            height: token rows of a frame.
            width: token columns of a frame.
            device: of the table.

        Returns:
            ``[T * height * width, D/2, 2]`` float32: cosine and sine of every pair's angle.
        """
        time, rows, columns = self.frequencies
        shape = (len(frames), height, width, -1, 2)
        row_positions = torch.arange(height, dtype=torch.float64, device="cpu")
        column_positions = torch.arange(width, dtype=torch.float64, device="cpu")
        # One small table per axis comes from the host, which tokens then share on the device.
        of_time = to_device(_rotations(frames.to("cpu", torch.float64), time), device)
        of_rows = to_device(_rotations(row_positions, rows), device)
        of_columns = to_device(_rotations(column_positions, columns), device)
        tables = [
            of_time[:, None, None].expand(shape),
            of_rows[None, :, None].expand(shape),
            of_columns[None, None, :].expand(shape),
        ]
        return torch.cat(tables, dim=3).flatten(0, 2)


def _rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """``[positions, frequencies, 2]`` float32: cosine and sine of each product, a float64 angle."""
    angles = positions[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def time_rotation(delta: float, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Rotation that moves a key by ``delta`` latent frames and leaves its row and column.

    Returns:
        ``[1, D/2, 2]`` float32 on the CPU; one table for every token and head.
    """
    time, rows, columns = axis_frequencies(head_dim, theta)
    angles = torch.cat([time * delta, torch.zeros_like(rows), torch.zeros_like(columns)])[None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: ``[B, L, N, D]``; neighbouring channels ``(2i, 2i+1)`` form a pair.
        table: ``[L, D/2, 2]`` or ``[1, D/2, 2]`` float32, cosine and sine.

    Returns:
        ``[B, L, N, D]`` in the dtype of ``x``; the arithmetic is float32.
    """
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, but no complex one
        cos, sin = table[:, None].unbind(-1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return rotated.flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    rotation = torch.view_as_complex(table)[:, None]
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
