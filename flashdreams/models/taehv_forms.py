"""Faster forms of TAEHV's layers: memory without stacked channels, upsampling on small frames."""

# Shapes: N frames of all clips, C channels, H W rows and columns of the small frames, G frames that
# one frame becomes; channels are innermost in memory.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.models.decoder_forms import (
    DecoderForms,
    PaddedConv2d,
    by_pixel,
    channels_last,
    padded_channels,
    phase_weight,
    pointwise_ops,
)


def pair_weight(weight: Tensor, forms: DecoderForms) -> Tensor | None:
    """The weight ``[C', 2 C, 3, 3]`` over a frame and the one before it, in the form asked for.

    Returns:
        ``"halves"``: ``[2 C', C, 3, 3]``, that of the frame first; None for stacked channels.
    """
    if forms.memory == "stack":
        return None
    return channels_last(torch.cat(weight.detach().chunk(2, dim=1)), weight.dtype)


def convolve_halves(
    conv: PaddedConv2d, halves: Tensor, frames: Tensor, last: Tensor, forms: DecoderForms
) -> Tensor:
    """``relu`` of each frame under one half of the weight and the frame before it under the other.

    Args:
        conv: pads, and has the bias.
        halves: ``[2 C', C, 3, 3]`` from ``pair_weight``.
        frames: ``[B n, C, H, W]``.
        last: ``[B, C, H, W]``, the frame before the first one of each clip.
        forms: who adds the two.
    """
    width, batch = len(halves) // 2, len(last)
    y = by_pixel(conv.convolve(frames, halves)).unflatten(0, (batch, -1))
    before = by_pixel(conv.convolve(last, halves[width:]))
    out = torch.empty((*y.shape[:-1], width), dtype=y.dtype, device=y.device)
    pixels = y.flatten(2, 3), before.flatten(1, 2)
    pointwise_ops(forms).sum_halves(*pixels, conv.bias, out.flatten(2, 3))
    return out.flatten(0, 1).movedim(-1, 1)


class TAEHVPhases:
    """Growth in time, upsampling and the convolution after it, as one convolution per level.

    All three are linear, so their weights are multiplied, in float32. After the last level the
    frames stay on the small grid, their four phases as channels: the output's convolution reads
    these, and only its few channels are put in the places of the large frame.
    """

    def __init__(
        self, levels: Sequence[tuple[Any, Any]], last: PaddedConv2d, forms: DecoderForms
    ) -> None:
        """Compute the weights.

        Args:
            levels: the growth and the `UpsampledConv2d` of each resolution, coarsest first.
            last: convolution to pixels.
            forms: of the decoder.
        """
        self.levels, self.last, self.forms = levels, last, forms
        self.weights = [grown_phases(grow.conv.weight, conv.weight) for grow, conv in levels]
        weight = pixel_weight(last.weight)
        self.outputs = len(weight)
        weight = padded_channels(weight, forms.head_channels)
        self.pixel_weight = channels_last(weight, last.weight.dtype)
        assert last.bias is not None
        self.pixel_bias = padded_channels(
            last.bias.detach().repeat_interleave(4), forms.head_channels
        )

    def upsample(self, level: int, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N G, C', 2 H, 2 W]``; to pixels after the last level."""
        conv, weight = self.levels[level][1], self.weights[level]
        if level < len(self.levels) - 1:
            return conv.convolve(x, weight.flatten(0, 3), len(weight))
        if self.last.is_whole:
            frames = [self._pixels(x, part.flatten(0, 2)) for part in weight]
            return torch.stack(frames, dim=1).flatten(0, 1)
        large = conv.convolve(x, weight.flatten(0, 3), len(weight))
        return self.last(F.relu(large, inplace=True))

    def _pixels(self, x: Tensor, weight: Tensor) -> Tensor:
        """Upsampling, ReLU and the output's convolution for one frame of each growth."""
        y = by_pixel(F.conv2d(x, weight, padding=1))
        pointwise_ops(self.forms).add_(y.flatten(0, 2), relu=True)
        cells = y.unflatten(3, (2, 2, -1))
        # Phases of rows and columns beyond the frame, where the output's convolution sees zeros.
        cells[:, 0, :, 1].zero_()
        cells[:, -1, :, 0].zero_()
        cells[:, :, 0, :, 1].zero_()
        cells[:, :, -1, :, 0].zero_()
        z = F.conv2d(y.movedim(-1, 1), self.pixel_weight, self.pixel_bias)
        return F.pixel_shuffle(z[:, : self.outputs], 2)


def grown_phases(grow: Tensor, weight: Tensor) -> Tensor:
    """The weight of growth in time, upsampling and a 3x3 convolution.

    Args:
        grow: ``[G C, C, 1, 1]``, frames of the growth one after the other.
        weight: ``[C', C, 3, 3]``.

    Returns:
        ``[G, 2, 2, C', C, 2, 2]`` in the type of ``weight``.
    """
    frames = grow.float().flatten(1).unflatten(0, (-1, weight.shape[1]))
    merged = torch.einsum("omkl,gmi->goikl", weight.float(), frames)
    phases = torch.stack([phase_weight(part) for part in merged])
    flat = channels_last(phases.flatten(0, 3), weight.dtype)
    return flat.unflatten(0, phases.shape[:4])


def pixel_weight(weight: Tensor) -> Tensor:
    """A 3x3 convolution of the large frame as one of its phases on the small grid.

    Row p of the grid has the large frame's rows 2 p (phase 0) and 2 p - 1 (phase 1), and the
    result's rows 2 i and 2 i + 1 are computed from the rows i and i + 1 of the grid.

    Args:
        weight: ``[C', C, 3, 3]``.

    Returns:
        ``[4 C', 4 C, 2, 2]``: phases of the result run faster than its channels, as
        ``F.pixel_shuffle`` reads them; phases of the input run slower than its channels.
    """
    taps = torch.zeros(2, 2, 2, 3, dtype=torch.float32, device=weight.device)
    for a in range(2):  # phase of the result
        for d in range(2):  # row of the window
            for q in range(2):  # phase of the input
                if 0 <= (k := 2 * d - q - a + 1) < 3:
                    taps[a, d, q, k] = 1
    found = torch.einsum("adqk,behl,oikl->oabqhide", taps, taps, weight.float())
    return found.flatten(3, 5).flatten(0, 2)
