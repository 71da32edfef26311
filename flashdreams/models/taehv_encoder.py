"""TAEHV, a tiny video autoencoder: the encoder."""

# Shapes and source as in `flashdreams.models.taehv`.

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.models.carried_frames import CarriedFrames
from flashdreams.models.taehv import (
    BLOCKS_PER_LEVEL,
    MemoryBlock,
    TAEHVConfig,
    name_memory_slots,
    new_frames,
)
from flashdreams.models.wan.vae import as_video, check_video, normalise
from flashdreams.models.wan.vae_blocks import fold_frames

ENCODER_IGNORES = (r"decoder\.",)
"""``CheckpointConfig.ignore`` of an encoder that reads a file with both halves."""


class TemporalPool(nn.Module):
    """``stride`` frames to one by a 1x1 convolution over their stacked channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """``[B n * stride, C, ...]`` to ``[B n, C, ...]``."""
        if self.stride == 1:
            return self.conv(frames)
        count, channels, *size = frames.shape
        stacked = new_frames((count // self.stride, channels * self.stride, *size), frames)
        groups = frames.unflatten(0, (-1, self.stride))
        stacked.unflatten(1, (self.stride, channels)).copy_(groups)
        return self.conv(stacked)


class TAEHVEncoderNetwork(nn.ModuleDict):
    """Layers from frames to latents, named as in the public files; state is handed in."""

    def __init__(self, config: "TAEHVEncoderConfig") -> None:
        super().__init__()
        width = config.channels
        self.levels: list[tuple[str, str, list[str]]] = []
        self["0"] = nn.Conv2d(3 * config.patch_size**2, width, 3, padding=1)
        index = 2
        for downsample in config.temporal_downsample:
            pool, conv = str(index), str(index + 1)
            blocks = [str(index + 2 + i) for i in range(BLOCKS_PER_LEVEL)]
            self[pool] = TemporalPool(width, 2 if downsample else 1)
            self[conv] = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            for name in blocks:
                self[name] = MemoryBlock(width)
            self.levels.append((pool, conv, blocks))
            index += BLOCKS_PER_LEVEL + 2
        self.last = str(index)
        self[self.last] = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, frames: Tensor, batch: int, carried: CarriedFrames) -> Tensor:
        """Encode ``[B F, 3 * patch_size^2, rows, columns]`` to ``[B, C, T, H, W]``."""
        x = F.relu(self["0"](frames), inplace=True)
        for pool, conv, blocks in self.levels:
            x = self[conv](self[pool](x))
            for name in blocks:
                x = self[name](x, batch, carried)
        latent = self[self.last](x).unflatten(0, (batch, -1)).transpose(1, 2)
        carried.position += latent.shape[2]
        return latent


@dataclass(kw_only=True)
class TAEHVEncoderConfig(TAEHVConfig, EncoderConfig):
    """Tiny encoder: ``encoder.*`` of the public files."""

    _target: type["TAEHVEncoder"] = field(default_factory=lambda: TAEHVEncoder)

    channels: int = 64
    """Channels of every layer."""

    temporal_downsample: tuple[bool, ...] = (True, True, False)
    """Which of the resolutions, finest first, halve the frame rate."""

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return self.patch_size * 2 ** len(self.temporal_downsample)


class TAEHVEncoder(Encoder):
    """An image or a video to normalised latents.

    Latent frame i stands for the pixel frames 4 i .. 4 i + 3, so it sees up to three frames beyond
    the end of the Wan autoencoder's latent i.
    """

    config: TAEHVEncoderConfig

    def __init__(self, config: TAEHVEncoderConfig) -> None:
        super().__init__(config)
        self.encoder = TAEHVEncoderNetwork(config)
        name_memory_slots(self)
        self.to(self.dtype)

    def initialize_cache(self) -> CarriedFrames:
        """State of a new video for ``encode_chunk``."""
        return CarriedFrames()

    def forward(self, input: Tensor) -> Tensor:
        """Encode a whole image or video.

        Args:
            input: ``[B, 3, height, width]`` or ``[B, 3, F, height, width]``, floating, in [-1, 1].
                The last frame is repeated until the frames fill whole latent frames.

        Returns:
            ``[B, C, T, H, W]``, float32, normalised, ``T = ceil(F / 4)``.

        Raises:
            ValueError: wrong shape or size.
            TypeError: integer pixels, or not a tensor.
        """
        video = as_video(input)
        if video.dim() == 5 and (lacking := -video.shape[2] % self.config.time_factor):
            tail = video[:, :, -1:].expand(-1, -1, lacking, -1, -1)
            video = torch.cat((video, tail), dim=2)
        return self.encode_chunk(video, self.initialize_cache())

    @torch.no_grad()
    def encode_chunk(self, video: Tensor, cache: CarriedFrames) -> Tensor:
        """Encode the next frames of a video that arrives in chunks.

        Args:
            video: ``[B, 3, F, height, width]`` in [-1, 1]; F a multiple of 4.
            cache: the video's state, updated in place.

        Returns:
            ``[B, C, F / 4, H, W]``, float32, normalised.

        Raises:
            ValueError: wrong shape, size or number of frames.
            TypeError: integer pixels.
        """
        config = self.config
        check_video(video, config.spatial_factor)
        batch, _, count, _, _ = video.shape
        if count == 0 or count % config.time_factor:
            raise ValueError(
                f"{count} frames do not fill whole latent frames: give a multiple of "
                f"{config.time_factor}, or the whole video to forward()."
            )
        frames = (fold_frames(video).to(self.device).float() + 1) / 2
        frames = F.pixel_unshuffle(frames, config.patch_size).to(
            dtype=self.dtype, memory_format=torch.channels_last
        )
        latent = self.encoder(frames, batch, cache).float()
        cache.chunks += 1
        if config.latents == "raw":
            return normalise(latent, config.latent_mean, config.latent_std)
        return latent.contiguous()
