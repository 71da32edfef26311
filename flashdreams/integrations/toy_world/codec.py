"""The toy world's codec: a fixed linear encoder and a small streaming decoder."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.decoder.base import StreamingDecoder, StreamingDecoderConfig
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.parallel.plan import state

PATCH = 8
"""Pixels along a side of the square that one latent pixel stands for."""
LATENT_CHANNELS = 24
"""Of the latent of the small world."""


@dataclass(kw_only=True)
class PatchEncoderConfig(EncoderConfig):
    """Config of the linear picture encoder."""

    _target: type["PatchEncoder"] = field(default_factory=lambda: PatchEncoder)

    channels: int = LATENT_CHANNELS
    """Principal components that are kept of a patch."""

    def __post_init__(self) -> None:
        check_range(self, "channels", most=3 * PATCH * PATCH)


class PatchEncoder(Encoder):
    """Whitened principal components of 8x8 patches; its buffers come from the checkpoint."""

    config: PatchEncoderConfig
    mean: Tensor
    basis: Tensor
    std: Tensor

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(3 * PATCH * PATCH))
        self.register_buffer("basis", torch.zeros(config.channels, 3 * PATCH * PATCH))
        self.register_buffer("std", torch.ones(config.channels))

    def forward(self, input: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            input: ``[B, 3, height, width]`` in [-1, 1], sides multiples of 8.

        Returns:
            ``[B, channels, 1, height / 8, width / 8]``, unit variance per channel.
        """
        patches = F.pixel_unshuffle(input.to(self.mean), PATCH)
        centred = patches - self.mean[:, None, None]
        latent = torch.einsum("bphw,cp->bchw", centred, self.basis / self.std[:, None])
        return latent[:, :, None]


class ResidualConvs(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return x + self.second(F.silu(self.first(F.silu(x))))


@dataclass(kw_only=True)
class PatchDecoderConfig(StreamingDecoderConfig):
    """Config of the convolutional decoder."""

    _target: type["PatchDecoder"] = field(default_factory=lambda: PatchDecoder)

    channels: int = LATENT_CHANNELS
    """Channels of the latent."""
    width: int = 80
    """Channels at the latent resolution; halved at every doubling of the resolution."""

    def __post_init__(self) -> None:
        check_range(self, "channels")
        check_range(self, "width", least=4)


@dataclass
class PatchDecoderCache:
    """The last latent frame that was decoded, ``[B, C, 1, H, W]``; None before the first."""

    previous: Tensor | None = state("whole", default=None)


class PatchDecoder(StreamingDecoder):
    """Decodes each latent frame with its predecessor; the first is its own predecessor."""

    config: PatchDecoderConfig

    def __init__(self, config: PatchDecoderConfig) -> None:
        super().__init__(config)
        width = config.width
        self.linear = nn.Conv2d(config.channels, 3 * PATCH * PATCH, 1)
        self.stem = nn.Conv2d(2 * config.channels, width, 3, padding=1)
        self.stages = nn.ModuleList()
        for channels in (width, width // 2, width // 4):
            outgoing = channels // 2 if channels > width // 4 else 3
            up = nn.Conv2d(channels, 4 * outgoing, 3, padding=1)
            self.stages.append(nn.Sequential(ResidualConvs(channels), nn.SiLU(), up))

    def initialize_cache(self) -> PatchDecoderCache:
        """Fresh state for one rollout."""
        return PatchDecoderCache()

    def forward(
        self,
        latent: Tensor,
        autoregressive_index: int = 0,
        cache: PatchDecoderCache | None = None,
    ) -> Tensor:
        """Decode a chunk ``[B, C, T, H, W]`` to ``[B, T, 3, 8H, 8W]`` in [-1, 1]."""
        latent = latent.to(self.dtype)
        previous = cache.previous if cache is not None else None
        first = latent[:, :, :1] if previous is None else previous
        history = torch.cat([first, latent[:, :, :-1]], dim=2)
        if cache is not None:
            cache.previous = latent[:, :, -1:]
        frames = torch.cat([latent, history], dim=1).transpose(1, 2)
        pictures = self.decode_pictures(frames.flatten(0, 1))
        return pictures.unflatten(0, frames.shape[:2]).clamp(-1, 1)

    def decode_pictures(self, pairs: Tensor) -> Tensor:
        """Decode ``[B, 2C, H, W]`` (a frame and the one before it) without clamping."""
        x = self.stem(pairs)
        for stage in self.stages:
            x = F.pixel_shuffle(stage(x), 2)
        return x + F.pixel_shuffle(self.linear(pairs[:, : self.config.channels]), PATCH)
