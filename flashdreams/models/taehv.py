"""TAEHV, a tiny video autoencoder: the streaming decoder."""

# Shapes: B batch, C latent channels, T latent frames, F pixel frames, H W latent rows and columns;
# height = 8 H * patch_size and so for the width. Layers see frames folded into the batch,
# [B n, C, rows, columns] with n frames at the layer's own rate, channels innermost in memory.
# Source: madebyollin/taehv, taehv.py.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.decoder.base import StreamingDecoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.carried_frames import CarriedFrames, memory_format
from flashdreams.models.decode_graph import DecodeGraph
from flashdreams.models.decoder_forms import (
    PLAIN,
    DecoderForms,
    PaddedConv2d,
    UpsampledConv2d,
    activated,
    frames_at_once,
)
from flashdreams.models.taehv_forms import TAEHVPhases, convolve_halves, pair_weight
from flashdreams.models.video_decoder import VideoDecoder
from flashdreams.models.wan.vae import (
    WAN21_LATENT_MEAN,
    WAN21_LATENT_STD,
    channels_innermost,
    check_latent,
    denormalise,
)
from flashdreams.models.wan.vae_blocks import fold_frames
from flashdreams.parallel.plan import ParallelPlan

BLOCKS_PER_LEVEL = 3
"""Memory blocks at each resolution."""


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the frame before it, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                "0": PaddedConv2d(2 * channels, channels),
                "2": PaddedConv2d(channels, channels),
                "4": PaddedConv2d(channels, channels),
            }
        )
        self.slot = ""
        self.forms = PLAIN
        self.pair: Tensor | None = None

    def take_form(self, forms: DecoderForms) -> None:
        """See `flashdreams.models.decoder_forms.select_forms`."""
        self.forms = forms
        first: Any = self.conv["0"]
        self.pair = pair_weight(first.weight, forms)

    def forward(self, frames: Tensor, batch: int, carried: CarriedFrames) -> Tensor:
        """Continue ``[B n, C, rows, columns]`` from the last frame in ``carried``; same shape."""
        if self.forms != PLAIN:
            layers: Any = self.conv
            y = self._first(layers["0"], frames, batch, carried)
            y = activated(layers["2"], y, self.forms)
            return activated(layers["4"], y, self.forms, residual=frames)
        both = self._with_previous(frames, batch, carried)
        y = F.relu(self.conv["0"](both), inplace=True)
        y = F.relu(self.conv["2"](y), inplace=True)
        return self.conv["4"](y).add_(frames).relu_()

    def _first(
        self, conv: PaddedConv2d, frames: Tensor, batch: int, carried: CarriedFrames
    ) -> Tensor:
        """The first convolution with its ReLU, in the selected form."""
        if self.pair is None:
            both = self._with_previous(frames, batch, carried)
            return activated(conv, both, self.forms)
        _count, channels, *size = frames.shape
        last = carried.slot(self.slot, (batch, channels, *size), frames)
        y = convolve_halves(conv, self.pair, frames, last, self.forms)
        last.copy_(frames.unflatten(0, (batch, -1))[:, -1])
        return y

    def _with_previous(self, frames: Tensor, batch: int, carried: CarriedFrames) -> Tensor:
        """Each frame and the one before it, stacked over channels: ``[B n, 2 C, ...]``."""
        count, channels, *size = frames.shape
        last = carried.slot(self.slot, (batch, channels, *size), frames)
        both = new_frames((count, 2 * channels, *size), frames)
        both[:, :channels] = frames
        previous = both[:, channels:].unflatten(0, (batch, -1))
        in_time = frames.unflatten(0, (batch, -1))
        previous[:, 0] = last
        previous[:, 1:] = in_time[:, :-1]
        last.copy_(in_time[:, -1])
        return both


class TemporalGrow(nn.Module):
    """One frame to ``stride`` frames by a 1x1 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """``[B n, C, ...]`` to ``[B n * stride, C, ...]``."""
        y = self.conv(frames)
        if self.stride == 1:
            return y
        count, channels, *size = frames.shape
        grown = new_frames((count * self.stride, channels, *size), frames)
        grown.unflatten(0, (count, self.stride)).copy_(y.unflatten(1, (self.stride, channels)))
        return grown


class TAEHVDecoderNetwork(nn.ModuleDict):
    """Layers from latents to frames, named as in the public files; state is handed in."""

    def __init__(self, config: "TAEHVDecoderConfig") -> None:
        super().__init__()
        widths = config.channels
        self.levels: list[tuple[list[str], str, str]] = []
        self["1"] = PaddedConv2d(config.latent_channels, widths[0])
        index = 3
        for level, doubles in enumerate(config.temporal_upsample):
            blocks = [str(index + i) for i in range(BLOCKS_PER_LEVEL)]
            for name in blocks:
                self[name] = MemoryBlock(widths[level])
            grow, conv = str(index + BLOCKS_PER_LEVEL + 1), str(index + BLOCKS_PER_LEVEL + 2)
            self[grow] = TemporalGrow(widths[level], 2 if doubles else 1)
            self[conv] = UpsampledConv2d(widths[level], widths[level + 1], bias=False)
            self.levels.append((blocks, grow, conv))
            index += BLOCKS_PER_LEVEL + 3
        self.last = str(index + 1)
        self[self.last] = PaddedConv2d(widths[-1], 3 * config.patch_size**2)
        self.phases: TAEHVPhases | None = None

    def take_form(self, forms: DecoderForms) -> None:
        """See `flashdreams.models.decoder_forms.select_forms`."""
        self.phases = None
        if forms.upsampling == "phases":
            levels = [(self[grow], self[conv]) for _, grow, conv in self.levels]
            last: Any = self[self.last]
            self.phases = TAEHVPhases(levels, last, forms)

    def forward(self, latent: Tensor, trim: int, carried: CarriedFrames) -> Tensor:
        """Decode ``[B, C, T, H, W]`` to ``[B n, 3 * patch_size^2, rows, columns]``.

        Of the first call's frames of each clip, the ``trim`` leading ones are dropped.
        """
        batch = latent.shape[0]
        x = fold_frames(latent)
        x = F.relu(self["1"](torch.tanh(x / 3) * 3), inplace=True)
        if self.phases is not None:
            for number, (blocks, _, _) in enumerate(self.levels):
                for name in blocks:
                    x = self[name](x, batch, carried)
                x = self.phases.upsample(number, x)
            first = trim if carried.position == 0 else 0
            carried.position += latent.shape[2]
            return x.unflatten(0, (batch, -1))[:, first:].flatten(0, 1)
        for number, (blocks, grow, conv) in enumerate(self.levels, start=1):
            for name in blocks:
                x = self[name](x, batch, carried)
            # The public order is upsampling, then growth; both act on single pixels or copies of
            # them, so growing first is the same function at a quarter of the work.
            x = self[grow](x)
            if number == len(self.levels) and carried.position == 0:
                x = x.unflatten(0, (batch, -1))[:, trim:].flatten(0, 1)
            x = self[conv](x)
        carried.position += latent.shape[2]
        return self[self.last](F.relu(x, inplace=True))


@dataclass(kw_only=True)
class TAEHVDecoderConfig(StreamingDecoderConfig):
    """Tiny decoder: ``decoder.*`` of the public files.

    The defaults are ``taew2_1``, for the latents of Wan 2.1. ``lighttaew2_1`` has
    ``latents="raw"``; ``taew2_2`` has ``latent_channels=48, patch_size=2``.
    """

    _target: type["TAEHVDecoder"] = field(default_factory=lambda: TAEHVDecoder)

    latent_channels: int = 16
    """Channels of a latent."""

    patch_size: int = 1
    """Pixels per side that the outermost convolutions hold in their channels."""

    latents: Literal["normalised", "raw"] = "normalised"
    """What the weights were trained on: latents as the diffusion model sees them, or raw ones, to
    which ``z * std + mean`` leads."""

    latent_mean: tuple[float, ...] = WAN21_LATENT_MEAN
    """Per-channel mean; used with raw latents only."""

    latent_std: tuple[float, ...] = WAN21_LATENT_STD
    """Per-channel standard deviation; used with raw latents only."""

    channels: tuple[int, ...] = (256, 128, 64, 64)
    """Channels of each resolution, coarsest first, and of the output stage."""

    temporal_upsample: tuple[bool, ...] = (False, True, True)
    """Which of the resolutions, coarsest first, double the frame rate."""

    decode_frames_at_once: int | None = None
    """Latent frames per pass of the network. 1: the same bits however latents are cut into chunks;
    0 or None: the whole chunk, faster and equal up to rounding."""

    def __post_init__(self) -> None:
        check_range(self, "latent_channels", "patch_size")
        for name in ("latent_mean", "latent_std"):
            count = len(getattr(self, name))
            if self.latents == "raw" and count != self.latent_channels:
                raise ValueError(
                    f"{name} has {count} values for latent_channels={self.latent_channels}: raw "
                    "latents need one per channel."
                )
        if len(self.channels) != len(self.temporal_upsample) + 1:
            raise ValueError(
                f"channels={self.channels} needs one more entry than "
                f"temporal_upsample={self.temporal_upsample}: one per resolution, and the output's."
            )
        check_range(self, "decode_frames_at_once", least=0)

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal_upsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return self.patch_size * 2 ** len(self.temporal_upsample)


class TAEHVDecoder(VideoDecoder):
    """Latents to frames, chunk by chunk, at a small fraction of the full decoder's cost."""

    config: TAEHVDecoderConfig

    def __init__(self, config: TAEHVDecoderConfig) -> None:
        super().__init__(config)
        self.decoder = TAEHVDecoderNetwork(config)
        name_memory_slots(self)
        self.to(self.dtype)

    @torch.no_grad()
    def capture(self, latent: Tensor) -> None:
        """Capture a CUDA graph for chunks of this shape, used from the second chunk on."""
        self.graph = DecodeGraph(self.decode, self.device)
        self.graph.capture(latent)

    def decode(self, latent: Tensor, carried: CarriedFrames) -> Tensor:
        """See `VideoDecoder.decode`."""
        config = self.config
        check_latent(latent, config.latent_channels)
        if config.latents == "raw":
            latent = denormalise(latent, config.latent_mean, config.latent_std)
        latent = channels_innermost(latent, self.device, self.dtype)
        parts = []
        count = frames_at_once(config.decode_frames_at_once, self.device, latent.shape[2])
        for part in latent.split(count, dim=2):
            frames = self.decoder(part, config.time_factor - 1, carried).float()
            if config.patch_size > 1:
                frames = F.pixel_shuffle(frames, config.patch_size)
            parts.append(frames.unflatten(0, (latent.shape[0], -1)))
        video = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return video.contiguous().clamp_(0, 1).mul_(2).sub_(1)

    def checkpoint_slices(
        self, shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, tuple[int, int, int]]:
        """Slices of the temporal-grow weights that a file has longer than this model.

        Light variants ship weights of two frames where the model grows one; of those the last
        rows, which make the last frame, are the model's.
        """
        slices = {}
        for name, module in self.named_modules():
            if isinstance(module, TemporalGrow):
                weight = f"{name}.conv.weight"
                rows, wanted = shapes.get(weight, (0,))[0], module.conv.out_channels
                if rows > wanted:
                    slices[weight] = (0, rows - wanted, wanted)
        return slices

    def parallel_plan(self) -> ParallelPlan:
        """Where frames may be split by width: at every convolution over columns."""
        halo = {"decoder.1", f"decoder.{self.decoder.last}"}
        for blocks, _, conv in self.decoder.levels:
            halo.add(f"decoder.{conv}")
            halo.update(f"decoder.{name}.conv.{i}" for name in blocks for i in ("0", "2", "4"))
        return ParallelPlan(spatial={name: "halo" for name in sorted(halo)})


DECODER_IGNORES = (r"encoder\.",)
"""``CheckpointConfig.ignore`` of a decoder that reads a file with both halves."""


def new_frames(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised frames of the device, dtype and memory layout of ``like``."""
    layout = memory_format(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def name_memory_slots(network: nn.Module) -> None:
    """Name the carried frame of every memory block after the block's path in ``network``."""
    for name, module in network.named_modules():
        if isinstance(module, MemoryBlock):
            module.slot = name
