"""The denoising network: tiny, untrained, and painting moving patterns."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.diffusion.scheduler.base import NUM_TRAIN_TIMESTEPS
from flashdreams.infra.diffusion.transformer import Transformer, TransformerConfig

from .encoder import TEXT_DIM

POSITION_DIM = 8
"""Channels of the encoding of a pixel's position and time."""


@dataclass(kw_only=True)
class MyTransformerConfig(TransformerConfig):
    """Config of the network; sizes are those of the latent."""

    # Point to the class that will be instantiated by this config
    _target: type["MyTransformer"] = field(default_factory=lambda: MyTransformer)

    in_channels: int = 4
    """Channels of the latent."""
    len_t: int = 2
    """Latent frames of one chunk."""
    latent_height: int = 32
    """Latent rows."""
    latent_width: int = 48
    """Latent columns."""

    # Expose your configurable parameters
    dim: int = 24
    """Width of the hidden layers."""
    num_layers: int = 4
    """Hidden layers; more of them give finer patterns."""
    contrast: float = 2.0
    """Scale of the random weights; higher values give more contrast."""
    period: int = 48
    """Latent frames after which the movement repeats."""
    noise_weight: float = 1.5
    """Influence of a chunk's noise on the pattern; with 0 all seeds give the same video."""


@dataclass
class MyTransformerCache:
    """All state of one rollout: the prompt, the position, and the last frame."""

    text: Tensor
    """``[B, 1, 1, 1, TEXT_DIM]``, the mean of the prompt's words."""
    first_frame: int = 0
    """Number of the chunk's first latent frame in the rollout."""
    last: Tensor | None = None
    """``[B, C, 1, H, W]``, the last clean latent frame; None before the first chunk is done."""


class MyTransformer(Transformer):
    """Computes each pixel from its position, the time, the prompt and the blurred noise.

    Every chunk blends from the last frame of the previous chunk into the new pattern. The clean
    pass stores that frame in the cache as context.

    Args:
        config: Configuration to instantiate the network.

    Source: Stanley, "Compositional pattern producing networks", 2007 (painting by coordinates).
    """

    # Enable type checking
    config: MyTransformerConfig

    def __init__(self, config: MyTransformerConfig) -> None:
        super().__init__(config)
        widths = [POSITION_DIM + TEXT_DIM + config.in_channels, *[config.dim] * config.num_layers]
        self.layers = nn.ModuleList(
            nn.Linear(width, config.dim) for width in widths[: config.num_layers]
        )
        self.head = nn.Linear(config.dim, config.in_channels)
        for layer in (*self.layers, self.head):
            nn.init.normal_(layer.weight, std=config.contrast / math.sqrt(layer.in_features))

    def initialize_cache(self, text: Tensor) -> MyTransformerCache:
        """Start a rollout.

        Args:
            text: ``[B, S, TEXT_DIM]``, zero rows beyond the words of each prompt.
        """
        words = text.any(dim=2).sum(dim=1).clamp_min(1)
        mean = text.sum(dim=1) / words[:, None]
        return MyTransformerCache(text=mean[:, None, None, None].to(self.device))

    def begin_step(
        self, autoregressive_index: int, cache: MyTransformerCache, control: None = None
    ) -> None:
        """Set the position to the chunk's first frame."""
        cache.first_frame = autoregressive_index * self.config.len_t

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: MyTransformerCache) -> Tensor:
        """Predict the flow ``[B, C, T, H, W]`` from the noisy ``latent`` to the pattern."""
        x0 = self._paint(latent, cache)
        if cache.last is not None:
            steps = range(1, self.config.len_t + 1)
            weights = x0.new_tensor([step / self.config.len_t for step in steps])
            x0 = torch.lerp(cache.last, x0, weights[:, None, None])
        return (latent - x0) / (timestep / NUM_TRAIN_TIMESTEPS)

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: MyTransformerCache) -> None:
        """Keep the last frame of the clean ``latent`` as the context of the next chunk."""
        cache.last = latent[:, :, -1:].clone()

    def _paint(self, latent: Tensor, cache: MyTransformerCache) -> Tensor:
        """The clean latent ``[B, C, T, H, W]``."""
        batch, _, _, height, width = latent.shape
        blur = F.adaptive_avg_pool3d(latent, (1, 4, 6))
        blur = F.interpolate(blur, (self.config.len_t, height, width), mode="trilinear")
        blur = blur.movedim(1, -1) * self.config.noise_weight
        position = self._positions(cache.first_frame, latent.device)[None]
        shape = (batch, *position.shape[1:-1], -1)
        parts = (position.expand(shape), cache.text.expand(shape), blur)
        hidden = torch.cat(parts, dim=-1).to(self.dtype)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.head(hidden).movedim(-1, 1).float()

    def _positions(self, first_frame: int, device: torch.device) -> Tensor:
        """``[T, H, W, POSITION_DIM]``: position of each pixel, and the time as an angle."""
        c = self.config
        kind = {"device": device, "dtype": torch.float32}
        frames = torch.arange(first_frame, first_frame + c.len_t, **kind)
        rows = torch.linspace(-1, 1, c.latent_height, **kind)
        columns = torch.linspace(-1, 1, c.latent_width, **kind)
        t, y, x = torch.meshgrid(frames * (2 * math.pi / c.period), rows, columns, indexing="ij")
        radius = (x.square() + y.square()).sqrt()
        parts = [x, y, radius, t.cos(), t.sin()]
        parts += [(4 * x + t).sin(), (4 * y - t).sin(), (6 * radius - 2 * t).sin()]
        return torch.stack(parts, dim=-1)
