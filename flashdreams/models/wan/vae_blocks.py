"""Layers of the Wan video autoencoders."""

# Shapes: B batch, C channels, T frames at the layer's own rate, H W rows and columns.
# Activations are [B, C, T, H, W]; layers that see single frames fold T into the batch.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.models.carried_frames import CarriedFrames, memory_format
from flashdreams.models.decoder_forms import (
    PLAIN,
    DecoderForms,
    UpsampledConv2d,
    by_pixel,
    padded_channels,
    pair_weight,
    pointwise_ops,
)

_ONEDNN = torch.backends.mkldnn.is_available()


class CausalConv3d(nn.Module):
    """Causal 3-D convolution: its left context in time is carried state.

    ``forward`` puts the carried frames before the input and passes both to ``convolve``, the only
    place that pads in space; a convolution split by width replaces only ``convolve``.
    ``slot`` names the layer's carried frames and is set once by the network that owns the layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        time_stride: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride = (time_stride, 1, 1)
        self.padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        self.carried_frames = kernel_size[0] - time_stride
        self.slot = ""
        self.forms = PLAIN
        self.padded: tuple[Tensor, Tensor] | None = None
        self.paired: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv3d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def take_form(self, forms: DecoderForms) -> None:
        """See `flashdreams.models.decoder_forms.select_forms`."""
        self.forms, self.padded, self.paired = forms, None, None
        if self.weight.shape[0] % forms.head_channels:
            self.padded = _padded(self.weight, self.bias, forms.head_channels)

    def take_pairs(self) -> None:
        """Prepare for inputs of two frames beside each other, ``[B, 2 C, T / 2, H, W]``."""
        both = pair_weight(self.weight), self.bias.repeat(2)
        self.paired = _padded(*both, self.forms.head_channels)

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """Convolve ``[B, C, T, H, W]`` as the continuation of what ``carried`` has seen."""
        if self.carried_frames == 0:
            return self.convolve(x)
        context = self.reserve(x, carried)
        x = torch.cat((context, x), dim=2)
        context.copy_(x[:, :, -self.carried_frames :])
        return self.convolve(x)

    def reserve(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """This layer's left context for inputs like ``x``; zeros at the start of a rollout."""
        batch, _, _, height, width = x.shape
        channels = self.weight.shape[1]
        return carried.slot(self.slot, (batch, channels, self.carried_frames, height, width), x)

    def convolve(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """Convolve without left context, with zeros of ``padding`` around every frame."""
        own = self.weight.shape
        form, frames = (self.padded, 1) if x.shape[1] == own[1] else (self.paired, 2)
        if form is not None:
            weight, form_bias = form
            y = F.conv3d(x, weight, form_bias if with_bias else None, self.stride, self.padding)
            return y[:, : frames * own[0]]
        bias = self.bias if with_bias else None
        if x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN:
            # torch 2.13 takes its own kernel for float32 below 20480 rows of one clip, which is 2
            # to 14 times slower at 16 to 128 channels; remove this when F.conv3d no longer does.
            return torch.ops.aten.mkldnn_convolution(
                x, self.weight, bias, self.padding, self.stride, (1, 1, 1), 1
            )
        return F.conv3d(x, self.weight, bias, self.stride, self.padding)


def _padded(weight: Tensor, bias: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Weight, with channels innermost in memory, and bias for more output channels, of zeros."""
    weight = padded_channels(weight, multiple)
    return weight.contiguous(memory_format=torch.channels_last_3d), padded_channels(bias, multiple)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of ``[B, C, ...]``, with a gain per channel."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; same shape and dtype."""
        least = max(1e-12, torch.finfo(x.dtype).tiny)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(least)
        return (x / norm) * (self.gamma * self.scale)


class ResidualBlock(nn.Module):
    """Two causal convolutions with norm and SiLU before each, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        kernel = (3, 3, 3)
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels, 3),
                "2": CausalConv3d(in_channels, out_channels, kernel),
                "3": RMSNorm(out_channels, 3),
                "6": CausalConv3d(out_channels, out_channels, kernel),
            }
        )
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """Add the residual to ``x``: ``[B, C, T, H, W]`` to ``[B, C', T, H, W]``."""
        layers: Any = self.residual
        if layers["2"].forms.pointwise != "plain":
            return self._fused(x, carried)
        shortcut = x if self.shortcut is None else self.shortcut(x, carried)
        x = layers["2"](F.silu(layers["0"](x), inplace=True), carried)
        x = layers["6"](F.silu(layers["3"](x), inplace=True), carried)
        return x.add_(shortcut)

    def _fused(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """The same with biases added by the passes that read the convolutions' results."""
        layers: Any = self.residual
        first, second = layers["2"], layers["6"]
        bias, shortcut = second.bias, x
        if isinstance(self.shortcut, CausalConv3d):
            shortcut = self.shortcut.convolve(x, with_bias=False)
            bias = bias + self.shortcut.bias
        y = first.convolve(normed_input(layers["0"], first, x, carried), with_bias=False)
        joined = normed_input(layers["3"], second, y, carried, first.bias)
        cells = by_pixel(second.convolve(joined, with_bias=False))
        rows, residual = (part.view(-1, len(bias)) for part in (cells, by_pixel(shortcut)))
        pointwise_ops(first.forms).add_(rows, bias, residual)
        return cells.movedim(-1, 1)


def run_head(head: Any, x: Tensor, carried: CarriedFrames) -> Tensor:
    """Norm, SiLU and causal convolution of ``[B, C, T, H, W]``: ``"0"`` and ``"2"`` of ``head``."""
    norm, conv = head["0"], head["2"]
    if conv.forms.pointwise == "plain":
        return conv(F.silu(norm(x), inplace=True), carried)
    frames = conv.convolve(normed_input(norm, conv, x, carried))
    group = x.shape[1] // conv.weight.shape[1]
    return frames.unflatten(1, (group, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def normed_input(
    norm: RMSNorm,
    conv: CausalConv3d,
    x: Tensor,
    carried: CarriedFrames,
    bias: Tensor | None = None,
) -> Tensor:
    """Norm and SiLU of ``x + bias``, written behind the carried frames of ``conv``.

    Args:
        norm: gives the gains.
        conv: its carried frames are replaced by the last ones of the result.
        x: ``[B, C, T, H, W]``, or pairs of frames ``[B, 2 C, T / 2, H, W]``.
        carried: this rollout's state.
        bias: C values; None adds nothing.

    Returns:
        ``[B, C, carried + T, H, W]`` or likewise in pairs, what ``conv.convolve`` takes.
    """
    cells, context, gain = by_pixel(x), conv.reserve(x, carried), norm.gamma.flatten()
    batch, frames, *size = cells.shape
    group = x.shape[1] // len(gain)  # frames beside each other
    lead = context.shape[2] // group
    joined = torch.empty((batch, lead + frames, *size), dtype=x.dtype, device=x.device)
    steps = joined.unflatten(-1, (group, -1)).permute(0, 5, 1, 4, 2, 3)  # [B, C, T, group, H, W]
    stored = context.unflatten(2, (lead, group))
    steps[:, :, :lead] = stored
    least = max(1e-12, torch.finfo(x.dtype).tiny)
    rows, out = (part.view(batch, -1, len(gain)) for part in (cells, joined[:, lead:]))
    pointwise_ops(conv.forms).norm_silu(rows, gain, norm.scale, least, out, bias)
    stored.copy_(steps[:, :, -lead:])
    return joined.movedim(-1, 1)


class FrameAttention(nn.Module):
    """Attention among the positions of one frame; owns no parameters.

    A split by width wraps it: queries stay local, keys and values are gathered over dim -2.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: ``[B T, 1, H W, C]`` each, one head."""
        return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.core = FrameAttention()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each frame of ``[B, C, T, H, W]``; same shape."""
        batch = x.shape[0]
        frames = fold_frames(x)
        qkv = self.to_qkv(self.norm(frames))
        tokens = qkv.flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = (part.contiguous() for part in tokens.chunk(3, dim=-1))
        y = self.core(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return unfold_frames(frames + self.proj(y), batch)


class Middle(nn.ModuleList):
    """What both halves have at the lowest resolution: attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        before, attention = ResidualBlock(channels, channels), AttentionBlock(channels)
        super().__init__([before, attention, ResidualBlock(channels, channels)])

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """Run the three layers over ``[B, C, T, H, W]``; same shape."""
        before, attention, after = self
        return after(attention(before(x, carried)), carried)


class Upsample(nn.Module):
    """Doubling of height and width, and optionally of the frame rate."""

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": UpsampledConv2d(channels, out_channels)})
        self.time_conv: CausalConv3d | None = None
        self.in_pairs = False
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """Upsample ``[B, C, T, H, W]``; the very first frame of a rollout stays one frame.

        With ``in_pairs`` an even number of frames becomes pairs, ``[B, 2 C', T / 2, 2 H, 2 W]``.
        """
        batch = x.shape[0]
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, carried)
        conv: Any = self.resample["1"]
        pairs = self.in_pairs and x.shape[2] % 2 == 0
        frames = fold_frames(x)
        return unfold_frames(conv.convolve(frames, pairs=True) if pairs else conv(frames), batch)

    def _double_frames(self, conv: CausalConv3d, x: Tensor, carried: CarriedFrames) -> Tensor:
        if carried.position > 0:
            return interleave_frames(conv(x, carried))
        # The first frame skips the convolution and is no context for the second one.
        conv.reserve(x, carried)
        if x.shape[2] == 1:
            return x
        rest = interleave_frames(conv(x[:, :, 1:], carried))
        return torch.cat((x[:, :, :1], rest), dim=2)


class Downsample(nn.Module):
    """Halving of height and width, and optionally of the frame rate."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv: CausalConv3d | None = None
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2)

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """Downsample ``[B, C, T, H, W]``; the very first frame of a rollout stays one frame."""
        batch = x.shape[0]
        # One row below and one column to the right: the grid of the official weights.
        frames = self.resample["1"](F.pad(fold_frames(x), (0, 1, 0, 1)))
        x = unfold_frames(frames, batch)
        if self.time_conv is None:
            return x
        if carried.position > 0:
            return self.time_conv(x, carried)
        # The first frame skips the convolution but is context for the next ones.
        first, rest = x[:, :, :1], x[:, :, 1:]
        self.time_conv.reserve(first, carried).copy_(first)
        if rest.shape[2] == 0:
            return first
        return torch.cat((first, self.time_conv(rest, carried)), dim=2)


def fold_frames(x: Tensor) -> Tensor:
    """``[B, C, T, H, W]`` to ``[B T, C, H, W]``; a view where the memory layout allows it.

    The stride over a single frame has no meaning, but operators guess the memory layout from
    strides: with the channels temporarily moved last it becomes one that they recognise.
    """
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def unfold_frames(frames: Tensor, batch: int) -> Tensor:
    """``[B T, C, H, W]`` to ``[B, C, T, H, W]``; always a view, with strides as ``fold_frames``."""
    return frames.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).permute(0, 4, 1, 2, 3)


def interleave_frames(x: Tensor) -> Tensor:
    """``[B, 2 C, T, H, W]`` to ``[B, C, 2 T, H, W]``: the first C channels come earlier."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels // 2, 2 * frames, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    out.unflatten(2, (frames, 2)).copy_(x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5))
    return out


def name_slots(network: nn.Module) -> None:
    """Name the carried frames of every causal layer after the layer's path in ``network``."""
    for name, module in network.named_modules():
        if isinstance(module, CausalConv3d):
            module.slot = name
