"""The Wan 2.1 video autoencoder: streaming decoder and encoder."""

# Shapes: B batch, C latent channels, T latent frames, F pixel frames, H W latent rows and columns;
# height = 8 H, width = 8 W, F = 1 + 4 (T - 1) at the start of a rollout and 4 T later.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.component import ComponentConfig
from flashdreams.infra.decoder.base import StreamingDecoderConfig
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.carried_frames import CarriedFrames
from flashdreams.models.decoder_forms import DecoderForms, frames_at_once, takes_pairs
from flashdreams.models.video_decoder import VideoDecoder
from flashdreams.models.wan.keys import VAE_DIFFUSERS_KEYS
from flashdreams.models.wan.vae_blocks import (
    CausalConv3d,
    Downsample,
    Middle,
    ResidualBlock,
    RMSNorm,
    Upsample,
    name_slots,
    run_head,
)
from flashdreams.parallel.plan import ParallelPlan

# fmt: off
WAN21_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
"""Mean of the raw latents per channel. Source: Wan-Video/Wan2.1, wan/modules/vae.py."""
WAN21_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
"""Standard deviation of the raw latents per channel. Source: as above."""
# fmt: on


@dataclass(kw_only=True)
class WanVAEConfig(ComponentConfig):
    """Dimensions that the two halves of the autoencoder share."""

    dim: int = 96
    """Channels at full resolution."""

    z_dim: int = 16
    """Latent channels."""

    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each resolution, finest first, in multiples of ``dim``."""

    num_res_blocks: int = 2
    """Residual blocks per resolution in the encoder; the decoder has one more."""

    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which of the spatial halvings, finest first, halve the frame rate too."""

    latent_mean: tuple[float, ...] = WAN21_LATENT_MEAN
    """Per-channel mean that normalised latents lack."""

    latent_std: tuple[float, ...] = WAN21_LATENT_STD
    """Per-channel standard deviation by which normalised latents are divided."""

    def __post_init__(self) -> None:
        check_range(self, "dim", "z_dim", "num_res_blocks")
        levels = len(self.dim_mult)
        if not levels or len(self.temporal_downsample) != levels - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, but the "
                f"{levels} resolutions of dim_mult={self.dim_mult} have {levels - 1} steps between "
                "them: give one entry per step."
            )
        if min(self.dim_mult) < 1:
            raise ValueError(f"dim_mult={self.dim_mult}: each must be at least 1.")
        if not all(0 < deviation < math.inf for deviation in self.latent_std):
            raise ValueError(f"latent_std={self.latent_std}: each must be positive and finite.")
        if not all(map(math.isfinite, self.latent_mean)):
            raise ValueError(f"latent_mean={self.latent_mean}: each must be finite.")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for z_dim={self.z_dim} latent "
                    "channels: give one per channel."
                )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)


class WanVAEDecoderNetwork(nn.Module):
    """Causal convolutions from raw latents to frames; state is handed in."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        mults = (config.dim_mult[-1], *reversed(config.dim_mult))
        dims = [config.dim * mult for mult in mults]
        temporal = tuple(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.middle = Middle(dims[0])
        self.upsamples = nn.ModuleList()
        for level, (channels, out_channels) in enumerate(pairwise(dims)):
            if level > 0:
                channels //= 2  # the upsampling before has halved them
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, out_channels))
                channels = out_channels
            if level < len(temporal):
                half = channels // 2
                self.upsamples.append(Upsample(channels, half, temporal[level]))
        self.finest_channels = channels
        self.head = nn.ModuleDict(
            {"0": RMSNorm(channels, 3), "2": CausalConv3d(channels, 3, (3, 3, 3))}
        )

    def take_form(self, forms: DecoderForms) -> None:
        """Let the finest level work on pairs of frames, where its channels ask for it."""
        steps = [i for i, layer in enumerate(self.upsamples) if isinstance(layer, Upsample)]
        if not steps:
            return
        layers: Any = self.upsamples[steps[-1] :]
        upsample, *blocks = layers
        channels = self.finest_channels
        alike = all(block.shortcut is None for block in blocks)
        upsample.in_pairs = alike and takes_pairs(forms, channels)
        if upsample.in_pairs:
            for layer in (*blocks, self.head):
                for module in layer.modules():
                    if isinstance(module, CausalConv3d):
                        module.take_pairs()

    def forward(self, z: Tensor, carried: CarriedFrames) -> Tensor:
        """Decode ``[B, C, T, H, W]`` as the continuation of what ``carried`` has seen."""
        x = self.middle(self.conv1(z, carried), carried)
        for layer in self.upsamples:
            x = layer(x, carried)
        x = run_head(self.head, x, carried)
        carried.position += z.shape[2]
        return x


class WanVAEEncoderNetwork(nn.Module):
    """Causal convolutions from frames to latent moments; state is handed in."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], (3, 3, 3))
        self.downsamples = nn.ModuleList()
        for level, (channels, out_channels) in enumerate(pairwise(dims)):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, out_channels))
                channels = out_channels
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, config.temporal_downsample[level]))
        self.middle = Middle(channels)
        out = CausalConv3d(channels, 2 * config.z_dim, (3, 3, 3))
        self.head = nn.ModuleDict({"0": RMSNorm(channels, 3), "2": out})

    def forward(self, video: Tensor, carried: CarriedFrames) -> Tensor:
        """Encode ``[B, 3, F, height, width]`` to moments ``[B, 2 C, T, H, W]``.

        F is 1 + 4 n at the start of a rollout and 4 n later.
        """
        x = self.conv1(video, carried)
        for layer in self.downsamples:
            x = layer(x, carried)
        x = self.middle(x, carried)
        x = self.head["2"](F.silu(self.head["0"](x), inplace=True), carried)
        carried.position += x.shape[2]
        return x


@dataclass(kw_only=True)
class WanVAEDecoderConfig(WanVAEConfig, StreamingDecoderConfig):
    """Decoder of the Wan 2.1 autoencoder: ``decoder.*`` and ``conv2.*`` of the public file."""

    _target: type["WanVAEDecoder"] = field(default_factory=lambda: WanVAEDecoder)

    decode_frames_at_once: int | Literal["auto"] | None = "auto"
    """Latent frames per pass of the network. 1: the same bits however latents are cut into chunks;
    more means fewer calls, which is faster on a GPU, equal up to rounding, and needs memory in
    proportion. 0 or None: the whole chunk. ``auto``: 1 on a CPU, up to 4 on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_frames_at_once != "auto":
            check_range(self, "decode_frames_at_once", least=0)


class WanVAEDecoder(VideoDecoder):
    """Normalised latents to frames, chunk by chunk."""

    config: WanVAEDecoderConfig
    network_class: Callable[[Any], nn.Module] = WanVAEDecoderNetwork
    upsamples = "decoder.upsamples.*"
    checkpoint_key_maps = (VAE_DIFFUSERS_KEYS,)

    def __init__(self, config: WanVAEDecoderConfig) -> None:
        super().__init__(config)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = self.network_class(config)
        name_slots(self)
        self.to(self.dtype)

    def decode(self, latent: Tensor, carried: CarriedFrames) -> Tensor:
        """See `VideoDecoder.decode`.

        No CUDA graph is captured: it gains 2 % (117.7 to 115.2 ms on one H200), and its pool holds
        the activations of a chunk.
        """
        check_latent(latent, self.config.z_dim)
        z = denormalise(latent, self.config.latent_mean, self.config.latent_std)
        z = channels_innermost(z, self.device, self.dtype)
        video = self._new_video(z, carried)
        start = 0
        count = frames_at_once(self.config.decode_frames_at_once, self.device, z.shape[2])
        for part in z.split(count, dim=2):
            frames = self.decoder(self.conv2(part, carried), carried).transpose(1, 2)
            video[:, start : start + frames.shape[1]] = frames
            start += frames.shape[1]
        return video.clamp_(-1, 1)

    def parallel_plan(self) -> ParallelPlan:
        """Where frames may be split by width: at every convolution over columns."""
        return ParallelPlan(
            spatial={
                "decoder.conv1": "halo",
                "decoder.middle.*.residual.2": "halo",
                "decoder.middle.*.residual.6": "halo",
                "decoder.middle.1.core": "gather_width",
                f"{self.upsamples}.residual.2": "halo",
                f"{self.upsamples}.residual.6": "halo",
                f"{self.upsamples}.resample.1": "halo",
                "decoder.head.2": "halo",
                # No neighbours needed: conv2, shortcut, time_conv, to_qkv and proj are 1x1 in
                # space; shortcuts between levels and patches of pixels stay within a column.
            }
        )

    def _new_video(self, z: Tensor, carried: CarriedFrames) -> Tensor:
        batch, _, latent_frames, rows, columns = z.shape
        frames = latent_frames * self.config.time_factor
        if carried.position == 0:
            frames -= self.config.time_factor - 1
        scale = self.config.spatial_factor
        shape = (batch, frames, 3, rows * scale, columns * scale)
        return torch.empty(shape, dtype=torch.float32, device=z.device)


DECODER_IGNORES = (r"encoder\.", r"conv1\.")
"""``CheckpointConfig.ignore`` of a decoder that reads a file with both halves."""

ENCODER_IGNORES = (r"decoder\.", r"conv2\.")
"""``CheckpointConfig.ignore`` of an encoder that reads a file with both halves."""


@dataclass(kw_only=True)
class WanVAEImageEncoderConfig(WanVAEConfig, EncoderConfig):
    """Encoder of the Wan 2.1 autoencoder: ``encoder.*`` and ``conv1.*`` of the public file."""

    _target: type["WanVAEImageEncoder"] = field(default_factory=lambda: WanVAEImageEncoder)


class WanVAEImageEncoder(Encoder):
    """An image or a video to normalised latents (the mean of the posterior)."""

    config: WanVAEImageEncoderConfig
    network_class: Callable[[Any], nn.Module] = WanVAEEncoderNetwork
    checkpoint_key_maps = (VAE_DIFFUSERS_KEYS,)

    def __init__(self, config: WanVAEImageEncoderConfig) -> None:
        super().__init__(config)
        self.encoder = self.network_class(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        name_slots(self)
        self.to(self.dtype)

    def initialize_cache(self) -> CarriedFrames:
        """State of a new video for ``encode_chunk``."""
        return CarriedFrames()

    def forward(self, input: Tensor) -> Tensor:
        """Encode a whole image or video.

        Args:
            input: ``[B, 3, height, width]`` or ``[B, 3, F, height, width]``, floating, in [-1, 1].

        Returns:
            ``[B, C, T, H, W]``, float32, ``T = 1 + (F - 1) // 4``: frames that fill no latent frame
            at the end are left out, as the official encoder does.

        Raises:
            ValueError: wrong shape or size.
            TypeError: integer pixels, or not a tensor.
        """
        video = as_video(input)
        if video.dim() == 5:
            factor = self.config.time_factor
            video = video[:, :, : 1 + (video.shape[2] - 1) // factor * factor]
        return self.encode_chunk(video, self.initialize_cache())

    def example_input(self) -> Tensor:
        """A small grey image ``[1, 3, height, width]``."""
        side = 4 * self.config.spatial_factor
        return torch.zeros(1, 3, side, side, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def encode_chunk(self, video: Tensor, cache: CarriedFrames) -> Tensor:
        """Encode the next frames of a video that arrives in chunks.

        Args:
            video: ``[B, 3, F, height, width]`` in [-1, 1]; F is 1 + 4 n in the first chunk, 4 n
                later.
            cache: the video's state, updated in place.

        Returns:
            ``[B, C, T, H, W]``, float32, normalised; the same bits however the video is cut.

        Raises:
            ValueError: wrong shape, size or number of frames.
            TypeError: integer pixels.
        """
        check_video(video, self.config.spatial_factor)
        moments = []
        for part in self._latent_groups(video, cache):
            part = channels_innermost(part, self.device, self.dtype)
            moments.append(self.conv1(self.encoder(part, cache), cache))
        mean = torch.cat(moments, dim=2)[:, : self.config.z_dim]
        cache.chunks += 1
        return normalise(mean, self.config.latent_mean, self.config.latent_std)

    def _latent_groups(self, video: Tensor, cache: CarriedFrames) -> Sequence[Tensor]:
        """The frames of each latent frame, in order."""
        factor, frames = self.config.time_factor, video.shape[2]
        lead = 1 if cache.position == 0 else 0
        if frames < 1 or (frames - lead) % factor != 0:
            raise ValueError(
                f"{frames} frames cannot be encoded as the {'next' if cache.position else 'first'} "
                f"chunk of a video: the first chunk has 1, {1 + factor}, {1 + 2 * factor}, ... "
                f"frames, later ones {factor}, {2 * factor}, ..."
            )
        rest = video[:, :, lead:]
        groups = rest.split(factor, dim=2) if rest.shape[2] else ()
        return [video[:, :, :lead], *groups] if lead else list(groups)


def normalise(raw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Raw latents ``[B, C, T, H, W]`` to those the diffusion model sees, in float32."""
    return (raw.float() - _channels(mean, raw.device)) / _channels(std, raw.device)


def denormalise(latent: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of ``normalise``, in float32."""
    return latent.float() * _channels(std, latent.device) + _channels(mean, latent.device)


def channels_innermost(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``x`` on ``device`` as ``dtype`` in the memory layout that every layer keeps.

    With the channels innermost, folding frames into the batch costs no copy and convolutions in
    bfloat16 need no reordering.
    """
    return x.to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)


def check_latent(latent: Tensor, channels: int) -> None:
    """Refuse an invalid batch of latents.

    Raises:
        ValueError: not ``[B, channels, T, H, W]`` with at least one frame.
    """
    if latent.dim() != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise ValueError(
            f"latent has shape {list(latent.shape)}; expected [batch, {channels}, latent frames, "
            "latent height, latent width], none of them 0."
        )


def as_video(image: Tensor) -> Tensor:
    """An image ``[B, 3, height, width]`` as a video of one frame; a video as it is.

    Raises:
        TypeError: not a tensor.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"the image is a {type(image).__name__}; expected a tensor [batch, 3, height, width] "
            "in [-1, 1]: flashdreams.runtime.image_file.load_image makes one of a file."
        )
    return image.unsqueeze(2) if image.dim() == 4 else image


def check_video(video: Tensor, spatial_factor: int) -> None:
    """Refuse an invalid batch of frames: not in [-1, 1], or a size that the encoder cannot divide.

    Raises:
        ValueError: not ``[B, 3, F, height, width]``, or a height or width that is not divisible.
        TypeError: integer pixels.
    """
    if video.dim() != 5 or video.shape[1] != 3:
        raise ValueError(
            f"image or video has shape {list(video.shape)}; expected [batch, 3, height, width] or "
            "[batch, 3, frames, height, width]."
        )
    if not video.is_floating_point():
        raise TypeError(
            f"pixels are {video.dtype}; expected floating point in [-1, 1]: "
            "give pixels.float() / 127.5 - 1."
        )
    for name, size in (("height", video.shape[3]), ("width", video.shape[4])):
        if size % spatial_factor or size == 0:
            below = max(size // spatial_factor, 1) * spatial_factor
            raise ValueError(
                f"{name} {size} is not divisible by {spatial_factor}. Nearest sizes that are: "
                f"{below} and {below + spatial_factor}."
            )


@lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant per channel as float32 ``[C, 1, 1, 1]`` on ``device``."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
