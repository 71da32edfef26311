"""Small Wan autoencoders, and what their tests decode and encode."""

from typing import Any

import torch
from torch import Tensor


def drawn(config: type, *, seed: int, **overrides: Any) -> Any:
    """An encoder or decoder of width 4 with weights of a seed.

    Args:
        config: class of its config.
        seed: of the weights.
        overrides: other fields of the config.
    """
    torch.manual_seed(seed)
    return config(dim=4, **overrides).setup()


def draw_latents(
    channels: int, frames: int, size: tuple[int, int] = (3, 2), batch: int = 1
) -> Tensor:
    """Normal latents ``[batch, channels, frames, *size]``, always the same."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(batch, channels, frames, *size, generator=generator)


def draw_pixels(size: tuple[int, int], frames: int) -> Tensor:
    """A video ``[1, 3, frames, *size]`` in [-1, 1], always the same."""
    generator = torch.Generator().manual_seed(10)
    return torch.rand(1, 3, frames, *size, generator=generator) * 2 - 1


def decode(decoder: Any, z: Tensor, split: list[int]) -> list[Tensor]:
    """Decode latents in chunks of these many frames."""
    cache = decoder.initialize_cache()
    return [decoder(chunk, i, cache) for i, chunk in enumerate(z.split(split, dim=2))]
