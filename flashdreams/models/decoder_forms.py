"""The forms in which a decoder computes its layers: the plain one, and faster ones for GPUs."""

# Every form computes the same function; outputs differ by rounding alone. Shapes: N frames of all
# clips, C channels, H W rows and columns; channels are innermost in memory.

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from flashdreams_kernels import channels, channels_reference
from torch import Tensor, nn

from flashdreams.attention.backends import why_unusable


@dataclass(frozen=True)
class DecoderForms:
    """The form of each kind of layer of a decoder; the default is the plain one."""

    pointwise: Literal["plain", "reference", "triton"] = "plain"
    """Norm with SiLU, and sums of bias, residual and ReLU. ``"plain"``: one PyTorch operator each;
    ``"triton"``: one kernel, which writes the input of a causal convolution right behind its
    carried frames; ``"reference"``: the same data flow in PyTorch, for machines without Triton."""

    upsampling: Literal["interpolate", "phases"] = "interpolate"
    """Convolutions after a nearest upsampling. ``"phases"``: four 2x2 convolutions on the small
    frames, 2.25 times fewer operations and nothing of the large size to read."""

    memory: Literal["stack", "halves"] = "stack"
    """TAEHV's convolutions over a frame and the one before it. ``"stack"``: over their stacked
    channels; ``"halves"``: both halves of the weight in one convolution of twice the output
    channels, summed afterwards."""

    frames: Literal["single", "pairs"] = "single"
    """Convolutions in time at the finest level of the Wan 2.1 autoencoder. ``"pairs"``: two frames
    at once over the channels of both, a third more operations and no half-empty steps of a matmul;
    where channels are no multiple of `WHOLE_CHANNELS` and ``pointwise`` is not plain."""

    head_channels: int = 1
    """Output channels of the last convolution are padded with zeros to a multiple of this."""


PLAIN = DecoderForms()
"""What a CPU computes, and the reference of all tests."""

AT_ONCE_ON_GPU = 4
"""Latent frames per pass on a GPU: a chunk of most methods, and a bound on activations for clips
that are decoded whole."""

WHOLE_CHANNELS = 64
"""Input channels that a step of a convolution's matmul takes on Hopper in 16 bits: 96 channels of
the Wan autoencoder reach 294 TFLOP/s on one H200, 192 reach 647."""

FAST = DecoderForms(pointwise="triton", upsampling="phases", memory="halves", head_channels=8)
"""What a GPU computes where Triton runs."""

PAIRED = replace(FAST, frames="pairs")
"""The same on pairs of frames; no decoder takes it by itself until it has been timed on a GPU."""


def forms_for(device: torch.device, dtype: torch.dtype) -> DecoderForms:
    """The default forms of a decoder.

    Args:
        device: of the weights.
        dtype: of the weights.
    """
    if device.type != "cuda":
        return PLAIN
    if why_unusable("triton", device, dtype) is not None:
        return replace(FAST, pointwise="reference")
    return FAST


@torch.no_grad()
def select_forms(decoder: nn.Module, forms: DecoderForms) -> None:
    """Set the form of every layer of a decoder, in place; call again when weights change.

    Layers with other forms have a method ``take_form``. Convolution weights are stored
    with channels innermost, unless all forms are plain.

    Args:
        decoder: on its device, with its weights.
        forms: the choice.
    """
    for module in reversed(list(decoder.modules())):  # parts before what owns them
        weight: Any = getattr(module, "weight", None)
        if forms != PLAIN and isinstance(weight, nn.Parameter) and weight.dim() in (4, 5):
            layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=layout)
        take: Any = getattr(module, "take_form", None)
        if take is not None:
            take(forms)


def frames_at_once(asked: int | str | None, device: torch.device, frames: int) -> int:
    """Latent frames per pass of a network.

    Args:
        asked: ``decode_frames_at_once`` of a config: a number; 0 or None for all; ``"auto"``.
        device: of the weights.
        frames: latent frames of the chunk.
    """
    if asked == "auto":
        return AT_ONCE_ON_GPU if device.type == "cuda" else 1
    return int(asked or frames)


def takes_pairs(forms: DecoderForms, channels: int) -> bool:
    """Whether convolutions of so many input channels work on pairs of frames."""
    fused = forms.pointwise != "plain"
    return fused and forms.frames == "pairs" and channels % WHOLE_CHANNELS != 0


def pointwise_ops(forms: DecoderForms) -> Any:
    """The module that has ``norm_silu``, ``add_``, ``sum_halves`` and ``spread_phases``."""
    return channels if forms.pointwise == "triton" else channels_reference


def phase_weight(weight: Tensor) -> Tensor:
    """The weight on small frames of a 3x3 convolution after a nearest upsampling by two.

    An output pixel sees three rows, which are copies of two; the taps of equal rows are added.

    Args:
        weight: ``[C', C, 3, 3]``.

    Returns:
        ``[2, 2, C', C, 2, 2]`` float32: phase of the row, phase of the column, and the taps.
    """
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device
    )  # [phase, row of the small frame, row of the kernel]
    return torch.einsum("ayk,bxl,oikl->aboiyx", taps, taps, weight.float())


def place_phases(
    y: Tensor,
    growth: int,
    bias: Tensor | None = None,
    forms: DecoderForms = PLAIN,
    pairs: bool = False,
) -> Tensor:
    """``[N, growth * 4 C, H + 1, W + 1]`` to ``[N * growth, C, 2 H, 2 W]``.

    Args:
        y: result of a convolution with ``phase_weight`` and a padding of 1.
        growth: frames that one frame becomes.
        bias: C values, added.
        forms: who does it.
        pairs: the result is ``[N / 2, 2 C, 2 H, 2 W]``, two frames beside each other; ``growth``
            is 1.
    """
    count, _width, rows, columns = y.shape
    cells = by_pixel(y).unflatten(3, (growth, 2, 2, -1))
    large, width = (2 * rows - 2, 2 * columns - 2), cells.shape[-1]
    shape = (count // 2, *large, 2, width) if pairs else (count, growth, *large, width)
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    pointwise_ops(forms).spread_phases(cells, out, bias, pairs=pairs)
    frames = out.flatten(3) if pairs else out.flatten(0, 1)
    return frames.permute(0, 3, 1, 2)


class PaddedConv2d(nn.Conv2d):
    """A 3x3 convolution with zeros around every frame, whose weight may come in another form.

    ``convolve`` is the one place that pads in space; a split by width replaces it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    @property
    def is_whole(self) -> bool:
        """Whether it sees whole frames, that is ``convolve`` is not replaced."""
        return "convolve" not in vars(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H, W]``."""
        return self.convolve(x)

    def convolve(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The same; with a ``weight`` of ``[C'', C, 3, 3]`` that one, and no bias."""
        bias = self.bias if weight is None else None
        weight = self.weight if weight is None else weight
        return F.conv2d(x, weight, bias, padding=1)


class UpsampledConv2d(PaddedConv2d):
    """A 3x3 convolution after a nearest upsampling by two: small frames in, large ones out."""

    upscale = 2
    """Columns out per column in."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, bias=bias)
        self.forms = PLAIN
        self.phases: Tensor | None = None

    def take_form(self, forms: DecoderForms) -> None:
        """See `select_forms`."""
        self.forms, self.phases = forms, None
        if forms.upsampling == "phases":
            self.phases = channels_last(phase_weight(self.weight).flatten(0, 2), self.weight.dtype)

    def convolve(
        self, x: Tensor, weight: Tensor | None = None, growth: int = 1, pairs: bool = False
    ) -> Tensor:
        """``[N, C, H, W]`` to ``[N * growth, C', 2 H, 2 W]``; zeros around every large frame.

        Args:
            x: small frames.
            weight: on small frames, ``[growth * 4 C', C, 2, 2]``; None takes the layer's own.
            growth: frames that one frame becomes.
            pairs: as in `place_phases`.
        """
        weight = self.phases if weight is None else weight
        if weight is not None:
            y = F.conv2d(x, weight, padding=1)
            return place_phases(y, growth, self.bias, self.forms, pairs)
        large = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.conv2d(large, self.weight, self.bias, padding=1)
        return join_pairs(y) if pairs else y


def activated(
    conv: PaddedConv2d,
    x: Tensor,
    forms: DecoderForms,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """``relu(conv(x) + residual)``; bias, residual and ReLU in one pass.

    Args:
        conv: has the bias.
        x: ``[N, C, H, W]``.
        forms: the implementation.
        residual: ``[N, C', H, W]``.
        weight: as in `PaddedConv2d.convolve`.
    """
    y = by_pixel(conv.convolve(x, conv.weight if weight is None else weight))
    rows = None if residual is None else by_pixel(residual).flatten(0, -2)
    pointwise_ops(forms).add_(y.flatten(0, -2), conv.bias, rows, relu=True)
    return y.movedim(-1, 1)


def join_pairs(frames: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N / 2, 2 C, H, W]``: each two frames beside each other."""
    cells = frames.unflatten(0, (-1, 2)).permute(0, 3, 4, 1, 2)
    return cells.flatten(3).permute(0, 3, 1, 2)


def pair_weight(weight: Tensor) -> Tensor:
    """The weight of a causal convolution over pairs of frames.

    Args:
        weight: ``[C', C, 3, 3, 3]``, over two frames that precede and one's own.

    Returns:
        ``[2 C', 2 C, 2, 3, 3]``, over the pair that precedes and one's own; a frame's taps stand
        one frame later for the second frame of a pair.
    """
    taps = torch.stack([F.pad(weight, (0, 0, 0, 0, late, 1 - late)) for late in (0, 1)])
    pairs = taps.unflatten(3, (2, 2))  # [own frame, C', C, pair, frame of it, 3, 3]
    return pairs.permute(0, 1, 4, 2, 3, 5, 6).flatten(2, 3).flatten(0, 1)


def by_pixel(x: Tensor) -> Tensor:
    """``[N, C, ...]`` as contiguous ``[N, ..., C]``; a view where channels are innermost."""
    return x.movedim(1, -1).contiguous()


def channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight of four dims in ``dtype`` with channels innermost in memory."""
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def padded_channels(weight: Tensor, multiple: int) -> Tensor:
    """A convolution's weight with zeros after its output channels, up to a multiple."""
    lacking = -weight.shape[0] % multiple
    return torch.cat((weight, weight.new_zeros(lacking, *weight.shape[1:])))
