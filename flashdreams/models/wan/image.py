"""The image condition of the Wan 2.1 image-to-video models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.infra.component import build_component
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.clip import CLIPImageEncoder, CLIPImageEncoderConfig
from flashdreams.models.wan.vae import WanVAEImageEncoder, WanVAEImageEncoderConfig, as_video
from flashdreams.runtime.image_file import load_image  # where it was in 0.1

__all__ = [
    "MASK_CHANNELS",
    "WanImageConditionEncoder",
    "WanImageConditionEncoderConfig",
    "load_image",
    "mark_first_frame",
]

MASK_CHANNELS = 4
"""Mask values per latent frame: one for each of its pixel frames."""


@dataclass(kw_only=True)
class WanImageConditionEncoderConfig(EncoderConfig):
    """Config of the image condition of the Wan 2.1 image-to-video models."""

    _target: type["WanImageConditionEncoder"] = field(
        default_factory=lambda: WanImageConditionEncoder
    )

    takes_whole_image: ClassVar[bool] = True
    """CLIP sees the image before it is resized to the video."""

    vae: WanVAEImageEncoderConfig = field(default_factory=WanVAEImageEncoderConfig)
    """Encodes the clip that starts with the image and is grey afterwards."""

    clip: CLIPImageEncoderConfig = field(default_factory=CLIPImageEncoderConfig)
    """Encodes the image to tokens for cross-attention."""

    latent_frames: int = 21
    """Latent frames of the clip to be generated."""

    def __post_init__(self) -> None:
        check_range(self, "latent_frames")


class WanImageConditionEncoder(Encoder):
    """Encodes an image to the context ``image_tokens`` and ``condition`` of a Wan transformer.

    The two networks read their weights from separate files.
    """

    config: WanImageConditionEncoderConfig

    def __init__(self, config: WanImageConditionEncoderConfig) -> None:
        super().__init__(config)
        self.vae: WanVAEImageEncoder = build_component(config.vae)
        self.clip: CLIPImageEncoder = build_component(config.clip)

    def example_input(self) -> Tensor:
        """A small grey image."""
        return self.vae.example_input()

    @torch.no_grad()
    def forward(self, input: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode the first frame of a clip.

        Args:
            input: ``[B, 3, height, width]``, RGB in [-1, 1]; or ``frame``, this image, and
                ``whole``, the image before it was resized, which CLIP sees in the official code.

        Returns:
            ``image_tokens`` ``[B, S, C]``, and ``condition`` ``[B, 4 + 16, T, H, W]`` float32: the
            mask, 1 on the first latent frame, then the latents of the image and grey frames.

        Raises:
            ValueError: wrong shape or size.
            TypeError: integer pixels, or not a tensor.

        Source: Wan-Video/Wan2.1, wan/image2video.py.
        """
        frames = 1 + (self.config.latent_frames - 1) * self.vae.config.time_factor
        frame, whole = (
            (input["frame"], input["whole"]) if isinstance(input, Mapping) else (input, input)
        )
        clip = as_video(frame)
        if clip.ndim == 5 and clip.shape[2] == 1:
            clip = F.pad(clip, (0, 0, 0, 0, 0, frames - 1))
        latent = self.vae(clip)
        return {"image_tokens": self.clip(whole), "condition": mark_first_frame(latent)}


def mark_first_frame(latent: Tensor) -> Tensor:
    """Put a mask before latents ``[B, C, T, H, W]`` that marks the given frames.

    Returns:
        ``[B, 4 + C, T, H, W]``: 1 on the first latent frame, 0 on all others, then the latents.
    """
    mask = torch.zeros_like(latent[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], dim=1)
