"""The camera's horizontal rays, and where they meet the walls and pillars of the courtyard.

A ray ``[..., 2]`` is as long as one unit along the camera's axis, so a factor on it is a depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .world import HALF_SIZE, PILLAR_OFFSET, PILLAR_RADIUS

VERTICAL_FOV = math.radians(75.0)
"""Vertical field of view; pixels are square, so the width follows from the aspect."""
SUN_AZIMUTH, SUN_ELEVATION = math.radians(-35.0), math.radians(24.0)
SUN_EAST, SUN_NORTH = math.sin(SUN_AZIMUTH), math.cos(SUN_AZIMUTH)
FAR = 1e6
"""Depth of a pillar that a ray does not meet."""


class WallHits(NamedTuple):
    """The wall that each of W rays meets."""

    depth: Tensor
    """``[..., W]``, in lengths of the ray."""
    which: Tensor
    """``[..., W]`` int64: north, east, south, west."""
    along: Tensor
    """``[..., W]``, the place along the wall, from -`HALF_SIZE` to `HALF_SIZE`."""


class PillarHits(NamedTuple):
    """The nearest pillar that each of W rays meets."""

    depth: Tensor
    """``[..., W]``; `FAR` where there is none."""
    which: Tensor
    """``[..., W]`` int64: northeast, southeast, southwest, northwest."""
    root: Tensor
    """``[..., W]``: the square of half the chord, times that of the ray's length; 0 or less where
    none is met."""


def focal_length(height: int) -> float:
    """Focal length in pixels of a picture of so many rows."""
    return 0.5 * height / math.tan(0.5 * VERTICAL_FOV)


def slopes(count: int, width: int, focal: float, device: torch.device) -> Tensor:
    """``[count]`` float32: how far rays spread over the columns lean to the right of the axis."""
    centres = torch.arange(count, dtype=torch.float32, device=device) + 0.5
    return (centres * (width / count) - 0.5 * width) / focal


def directions(heading: Tensor, slope: Tensor) -> Tensor:
    """Rays ``[..., 2, W]`` (east, north) of a camera.

    Args:
        heading: ``[..., 1]``.
        slope: ``[W]``, from `slopes`.
    """
    sine, cosine = heading.sin(), heading.cos()
    return torch.stack([sine + cosine * slope, cosine - sine * slope], dim=-2)


def waves(phase: Tensor, harmonics: Sequence[float]) -> Tensor:
    """Sines, then cosines, of multiples of a phase: ``[...]`` to ``[..., 2 * harmonics]``."""
    phases = phase[..., None] * phase.new_tensor(harmonics)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def meet_walls(position: Tensor, ray: Tensor) -> WallHits:
    """Follow rays to the walls.

    Args:
        position: ``[..., 2, 1]`` (x, y), inside the courtyard.
        ray: ``[..., 2, W]``.
    """
    steep = torch.where(ray.abs() < 1e-6, torch.full_like(ray, 1e-6), ray)
    depths = (HALF_SIZE * steep.sign() - position) / steep
    depth = depths.amin(dim=-2)
    sideways = depths[..., 0, :] < depths[..., 1, :]
    east, north = ray[..., 0, :], ray[..., 1, :]
    index = torch.where(sideways, torch.where(east > 0, 1, 3), torch.where(north > 0, 0, 2))
    x, y = position[..., 0, :], position[..., 1, :]
    return WallHits(depth, index, torch.where(sideways, y + depth * north, x + depth * east))


@lru_cache(maxsize=8)
def pillar_places(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The middles of the pillars, ``[4, 2]``."""
    places = [[1, 1], [1, -1], [-1, -1], [-1, 1]]
    return torch.tensor(places, dtype=dtype, device=device) * PILLAR_OFFSET


def meet_pillars(position: Tensor, ray: Tensor) -> PillarHits:
    """Follow rays to the nearest pillar; arguments as for `meet_walls`."""
    offset = position.transpose(-1, -2) - pillar_places(ray.dtype, ray.device)  # [..., 4, 2]
    square = (ray * ray).sum(dim=-2, keepdim=True)
    half_b = offset @ ray
    excess = (offset * offset).sum(dim=-1, keepdim=True) - PILLAR_RADIUS**2
    root = half_b * half_b - square * excess
    depths = (-half_b - root.clamp_min(0).sqrt()) / square
    depths = torch.where((root > 0) & (depths > 0), depths, FAR)
    depth, index = depths.min(dim=-2)
    return PillarHits(depth, index, root.gather(-2, index[..., None, :])[..., 0, :])


def pillar_normals(position: Tensor, ray: Tensor, hits: PillarHits) -> tuple[Tensor, Tensor]:
    """East and north parts ``[..., W]`` of the outward normals where rays meet pillars."""
    place = pillar_places(ray.dtype, ray.device)[hits.which]
    met = position + hits.depth[..., None, :] * ray
    east = (met[..., 0, :] - place[..., 0]) / PILLAR_RADIUS
    return east, (met[..., 1, :] - place[..., 1]) / PILLAR_RADIUS
