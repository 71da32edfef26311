"""Latents to frames: three of the channels, upsampled."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from flashdreams.infra.decoder.base import Decoder, DecoderConfig


@dataclass(kw_only=True)
class PreviewDecoderConfig(DecoderConfig):
    """Config of the decoder."""

    _target: type["PreviewDecoder"] = field(default_factory=lambda: PreviewDecoder)

    scale: int = 16
    """Pixels per latent row and column."""


class PreviewDecoder(Decoder):
    """Shows the first three channels as colours; one frame per latent frame."""

    config: PreviewDecoderConfig

    def forward(self, latent: Tensor) -> Tensor:
        """Map ``[B, C, T, H, W]`` to ``[B, T, 3, height, width]`` in [-1, 1]."""
        frames = latent[:, :3].transpose(1, 2).mul(0.7).tanh()
        large = F.interpolate(frames.flatten(0, 1), scale_factor=self.config.scale, mode="bicubic")
        return large.clamp(-1, 1).unflatten(0, frames.shape[:2])
