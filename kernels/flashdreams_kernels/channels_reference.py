"""The functions of `flashdreams_kernels.channels` in PyTorch; arguments as there."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_silu(
    x: Tensor, gain: Tensor, scale: float, least: float, out: Tensor, bias: Tensor | None = None
) -> None:
    """RMS norm over the channels of ``[B, R, C]`` and SiLU, in float32, rounded once."""
    values = x.float() if bias is None else x.float() + bias.float()
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_min(least)
    out.copy_(F.silu((values / norm) * (gain.float() * scale)))


def add_(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """``x + bias + residual`` of ``[R, C]`` in place, in float32, rounded once."""
    values = x.float()
    for term in (bias, residual):
        if term is not None:
            values = values + term.float()
    return x.copy_(F.relu(values) if relu else values)


def sum_halves(y: Tensor, last: Tensor, bias: Tensor, out: Tensor) -> None:
    """``relu(y[t, :C] + y[t - 1, C:] + bias)`` of ``[B, F, R, 2 C]``, in float32."""
    own, late = y.float().chunk(2, dim=-1)
    before = torch.cat((last.float().unsqueeze(1), late[:, :-1]), dim=1)
    out.copy_(F.relu(own + before + bias.float()))


def spread_phases(
    y: Tensor, out: Tensor, bias: Tensor | None = None, *, pairs: bool = False
) -> None:
    """Place the four phases ``[N, H + 1, W + 1, G, 2, 2, C]`` in ``[N, G, 2 H, 2 W, C]``; with
    ``pairs`` in ``[N / 2, 2 H, 2 W, 2, C]``."""
    if pairs:
        y = y.unflatten(0, (-1, 2)).squeeze(4).movedim(1, 3)  # the frame within its pair as growth
        out = out.movedim(3, 1)
    height, width = y.shape[1] - 1, y.shape[2] - 1
    for a in range(2):
        for b in range(2):
            phase = y[:, a : a + height, b : b + width, :, a, b].permute(0, 3, 1, 2, 4)
            out[:, :, a::2, b::2] = phase if bias is None else phase.float() + bias.float()
