"""The Wan 2.2 video autoencoder: 48 channels, 16 pixels per latent row and column."""

# Shapes: B batch, C channels, T frames at the layer's own rate, F pixel frames, H W rows and
# columns. What streams, what is carried and how frames are counted is as in Wan 2.1.
# Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py.

from dataclasses import dataclass, field
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.models.carried_frames import CarriedFrames, memory_format
from flashdreams.models.wan.keys import VAE22_DIFFUSERS_KEYS
from flashdreams.models.wan.vae import (
    WanVAEConfig,
    WanVAEDecoder,
    WanVAEDecoderConfig,
    WanVAEDecoderNetwork,
    WanVAEEncoderNetwork,
    WanVAEImageEncoder,
    WanVAEImageEncoderConfig,
)
from flashdreams.models.wan.vae_blocks import (
    CausalConv3d,
    Downsample,
    Middle,
    ResidualBlock,
    RMSNorm,
    Upsample,
)

# fmt: off
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
)
"""Mean of the raw latents per channel. Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py."""
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
"""Standard deviation of the raw latents per channel. Source: as above."""
# fmt: on

PATCH_SIZE = 2
"""Pixels per side that the outermost convolutions hold in their channels."""


@dataclass(kw_only=True)
class WanVAE22Config(WanVAEConfig):
    """Dimensions that the two halves of the autoencoder share."""

    z_dim: int = 48
    """Latent channels."""

    latent_mean: tuple[float, ...] = WAN22_LATENT_MEAN
    """Per-channel mean that normalised latents lack."""

    latent_std: tuple[float, ...] = WAN22_LATENT_STD
    """Per-channel standard deviation that normalised latents are divided by."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return PATCH_SIZE * 2 ** (len(self.dim_mult) - 1)


def _residual_blocks(channels: int, out_channels: int, count: int) -> nn.ModuleList:
    """Residual blocks, the first of which changes the number of channels."""
    widths = [channels, *[out_channels] * (count - 1)]
    return nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)


class UpLevel(nn.Module):
    """Residual blocks and an upsampling, beside a shortcut without parameters."""

    def __init__(self, channels: int, out_channels: int, blocks: int, scale_t: int | None) -> None:
        """``scale_t``: frames that one frame becomes, 1 or 2; None at the last resolution."""
        super().__init__()
        self.scale_t, self.out_channels = scale_t, out_channels
        self.upsamples = _residual_blocks(channels, out_channels, blocks)
        if scale_t is not None:
            self.upsamples.append(Upsample(out_channels, out_channels, scale_t > 1))

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T', 2 H, 2 W]``; the last level keeps the size."""
        y = x
        for layer in self.upsamples:
            y = layer(y, carried)
        if self.scale_t is None:
            return y
        shortcut = spread_channels(x, self.out_channels, self.scale_t)
        if carried.position == 0:  # the first latent frame is one frame at every rate
            shortcut = shortcut[:, :, self.scale_t - 1 :]
        return y.add_(shortcut)


class DownLevel(nn.Module):
    """Residual blocks and a downsampling, beside a shortcut without parameters."""

    def __init__(self, channels: int, out_channels: int, blocks: int, scale_t: int | None) -> None:
        """``scale_t``: frames that become one frame, 1 or 2; None at the last resolution."""
        super().__init__()
        self.scale_t, self.out_channels = scale_t, out_channels
        self.downsamples = _residual_blocks(channels, out_channels, blocks)
        if scale_t is not None:
            self.downsamples.append(Downsample(out_channels, scale_t > 1))

    def forward(self, x: Tensor, carried: CarriedFrames) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T', H / 2, W / 2]``; the last level keeps the size."""
        y = x
        for layer in self.downsamples:
            y = layer(y, carried)
        scale_t, scale = (1, 1) if self.scale_t is None else (self.scale_t, 2)
        return y.add_(gather_channels(x, self.out_channels, scale_t, scale))


def spread_channels(x: Tensor, out_channels: int, scale_t: int) -> Tensor:
    """Repeat channels, then read them as ``scale_t`` x 2 x 2 cells of fewer channels.

    Args:
        x: ``[B, C, T, H, W]``.
        out_channels: a divisor of ``C * scale_t * 4``, a multiple of ``C / (scale_t * 4)``.
        scale_t: frames of a cell.

    Returns:
        ``[B, out_channels, scale_t T, 2 H, 2 W]`` in the memory layout of ``x``.
    """
    batch, channels, frames, rows, columns = x.shape
    repeated = x.repeat_interleave(out_channels * scale_t * 4 // channels, dim=1)
    cells = repeated.unflatten(1, (out_channels, scale_t, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    size = (batch, out_channels, scale_t * frames, 2 * rows, 2 * columns)
    return _written(cells, size, x)


def gather_channels(x: Tensor, out_channels: int, scale_t: int, scale: int) -> Tensor:
    """Stack cells of pixels over channels, then average runs of these.

    Args:
        x: ``[B, C, T, H, W]``; a frame of zeros is put before T frames that fill no whole cells.
        out_channels: a divisor of ``C * scale_t * scale ** 2``.
        scale_t: frames of a cell.
        scale: rows and columns of a cell.

    Returns:
        ``[B, out_channels, T / scale_t, H / scale, W / scale]``.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % scale_t, 0))
    cells = x.unflatten(4, (-1, scale)).unflatten(3, (-1, scale)).unflatten(2, (-1, scale_t))
    stacked = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return stacked.unflatten(1, (out_channels, -1)).mean(dim=2)


def patch_pixels(video: Tensor) -> Tensor:
    """``[B, 3, F, height, width]`` to ``[B, 12, F, height / 2, width / 2]``.

    Channels run colour by colour, in it column by column of the patch.
    """
    batch, colours, frames, height, width = video.shape
    cells = video.unflatten(4, (-1, PATCH_SIZE)).unflatten(3, (-1, PATCH_SIZE))
    size = (batch, colours * PATCH_SIZE**2, frames, height // PATCH_SIZE, width // PATCH_SIZE)
    return _written(cells.permute(0, 1, 6, 4, 2, 3, 5), size, video)


def unpatch_pixels(x: Tensor) -> Tensor:
    """The inverse of ``patch_pixels``: ``[B, 12, F, H, W]`` to ``[B, 3, F, 2 H, 2 W]``."""
    cells = x.unflatten(1, (-1, PATCH_SIZE, PATCH_SIZE)).permute(0, 1, 4, 5, 3, 6, 2)
    return cells.flatten(5, 6).flatten(3, 4)


def _written(cells: Tensor, size: tuple[int, ...], like: Tensor) -> Tensor:
    """A permuted view as a tensor of ``size`` in the memory layout of ``like``."""
    return cells.reshape(size).contiguous(memory_format=memory_format(like))


class WanVAE22DecoderNetwork(WanVAEDecoderNetwork):
    """The same with levels that have shortcuts, and patches of pixels."""

    def __init__(self, config: WanVAE22Config) -> None:
        nn.Module.__init__(self)
        dims = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        scales = [1 + temporal for temporal in reversed(config.temporal_downsample)]
        blocks = config.num_res_blocks + 1
        self.conv1 = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.middle = Middle(dims[0])
        self.upsamples = nn.ModuleList(
            UpLevel(channels, out_channels, blocks, scale_t)
            for (channels, out_channels), scale_t in zip(
                pairwise(dims), (*scales, None), strict=True
            )
        )
        out = CausalConv3d(dims[-1], 3 * PATCH_SIZE**2, (3, 3, 3))
        self.head = nn.ModuleDict({"0": RMSNorm(dims[-1], 3), "2": out})

    def forward(self, z: Tensor, carried: CarriedFrames) -> Tensor:
        """Decode ``[B, C, T, H, W]`` as the continuation of what ``carried`` has seen."""
        return unpatch_pixels(super().forward(z, carried))


class WanVAE22EncoderNetwork(WanVAEEncoderNetwork):
    """The same with levels that have shortcuts, and patches of pixels."""

    def __init__(self, config: WanVAE22Config) -> None:
        nn.Module.__init__(self)
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        scales = [1 + temporal for temporal in config.temporal_downsample]
        self.conv1 = CausalConv3d(3 * PATCH_SIZE**2, dims[0], (3, 3, 3))
        self.downsamples = nn.ModuleList(
            DownLevel(channels, out_channels, config.num_res_blocks, scale_t)
            for (channels, out_channels), scale_t in zip(
                pairwise(dims), (*scales, None), strict=True
            )
        )
        self.middle = Middle(dims[-1])
        out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3))
        self.head = nn.ModuleDict({"0": RMSNorm(dims[-1], 3), "2": out})

    def forward(self, video: Tensor, carried: CarriedFrames) -> Tensor:
        """Encode ``[B, 3, F, height, width]`` to moments ``[B, 2 C, T, H, W]``.

        F is 1 + 4 n at the start of a rollout and 4 n later.
        """
        return super().forward(patch_pixels(video), carried)


@dataclass(kw_only=True)
class WanVAE22DecoderConfig(WanVAE22Config, WanVAEDecoderConfig):
    """Decoder of the Wan 2.2 autoencoder: ``decoder.*`` and ``conv2.*`` of the public file."""

    _target: type["WanVAE22Decoder"] = field(default_factory=lambda: WanVAE22Decoder)

    dim: int = 256
    """Channels at full resolution."""


class WanVAE22Decoder(WanVAEDecoder):
    """Normalised latents to frames, chunk by chunk; 16 pixels per latent row and column."""

    config: WanVAE22DecoderConfig
    network_class = WanVAE22DecoderNetwork
    upsamples = "decoder.upsamples.*.upsamples.*"
    checkpoint_key_maps = (VAE22_DIFFUSERS_KEYS,)


@dataclass(kw_only=True)
class WanVAE22ImageEncoderConfig(WanVAE22Config, WanVAEImageEncoderConfig):
    """Encoder of the Wan 2.2 autoencoder: ``encoder.*`` and ``conv1.*`` of the public file."""

    _target: type["WanVAE22ImageEncoder"] = field(default_factory=lambda: WanVAE22ImageEncoder)

    dim: int = 160
    """Channels at full resolution."""


class WanVAE22ImageEncoder(WanVAEImageEncoder):
    """An image or a video to normalised latents (the mean of the posterior)."""

    config: WanVAE22ImageEncoderConfig
    network_class = WanVAE22EncoderNetwork
    checkpoint_key_maps = (VAE22_DIFFUSERS_KEYS,)
