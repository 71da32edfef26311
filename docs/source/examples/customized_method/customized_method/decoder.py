"""The decoder: converts latents to colours, upsampled in space and in time."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.decoder.base import StreamingDecoder, StreamingDecoderConfig


@dataclass(kw_only=True)
class MyStreamingDecoderConfig(StreamingDecoderConfig):
    """Config of the decoder."""

    # Point to the class that will be instantiated by this config
    _target: type["MyStreamingDecoder"] = field(default_factory=lambda: MyStreamingDecoder)

    # Expose your configurable parameters
    latent_channels: int = 4
    """Channels of the latent."""
    spatial_factor: int = 4
    """Upsampling factor per spatial dim."""
    temporal_factor: int = 2
    """Pixel frames per latent frame."""


@dataclass
class MyDecoderCache:
    """The last latent frame that was decoded, ``[B, C, 1, H, W]``; None before the first."""

    previous: Tensor | None = None


class MyStreamingDecoder(StreamingDecoder):
    """Mixes channels into colours; additional frames interpolate from the previous latent frame.

    Args:
        config: Configuration to instantiate the decoder.
    """

    # Enable type checking
    config: MyStreamingDecoderConfig

    def __init__(self, config: MyStreamingDecoderConfig) -> None:
        super().__init__(config)
        self.to_colours = nn.Linear(config.latent_channels, 3)
        nn.init.orthogonal_(self.to_colours.weight)

    def initialize_cache(self) -> MyDecoderCache:
        """Start a rollout."""
        return MyDecoderCache()

    def frame_count(self, latent_frames: int) -> int:
        """Pixel frames that the first ``latent_frames`` of a rollout decode to."""
        return latent_frames * self.config.temporal_factor

    def forward(
        self, latent: Tensor, autoregressive_index: int = 0, cache: MyDecoderCache | None = None
    ) -> Tensor:
        """Decode one chunk.

        Args:
            latent: ``[B, C, T, H, W]``.
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state; without it, the chunk has no predecessor.

        Returns:
            ``[B, T * temporal_factor, 3, H * spatial_factor, W * spatial_factor]`` in [-1, 1].
        """
        c = self.config
        latent = latent.to(self.dtype)
        previous = cache.previous if cache is not None else None
        first = latent[:, :, :1] if previous is None else previous
        before = torch.cat([first, latent[:, :, :-1]], dim=2)
        if cache is not None:
            cache.previous = latent[:, :, -1:].clone()
        weights = [step / c.temporal_factor for step in range(1, c.temporal_factor + 1)]
        frames = torch.stack([torch.lerp(before, latent, w) for w in weights], dim=3)
        frames = frames.flatten(2, 3).transpose(1, 2)
        pictures = F.interpolate(
            frames.flatten(0, 1), scale_factor=c.spatial_factor, mode="bicubic"
        )
        colours = self.to_colours(pictures.movedim(1, -1)).movedim(-1, 1).sin()
        return colours.unflatten(0, frames.shape[:2])
