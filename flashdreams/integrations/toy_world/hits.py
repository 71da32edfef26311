"""What the rays of each token meet: walls, pillars and the floor, in Fourier form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rays import FAR, directions, focal_length, meet_pillars, meet_walls, slopes, waves
from .world import EYE_HEIGHT, HALF_SIZE, PILLAR_RADIUS

RAYS_PER_TOKEN = 8
"""Rays spread over a token's columns that are followed to a wall and to a pillar."""
POINTS_PER_SIDE = 2
"""Points of the floor along each side of a token."""
_FEATURES_PER_RAY = 1 + 8 + 4 + 2 + 4
_FEATURES_PER_POINT = 2 * 6 + 1
_HARMONICS = (1.0, 2.0, 4.0, 8.0)
_FLOOR_HARMONICS = (2.0, 4.0, 8.0)
_FLOOR_FADES_AT = 6.0


def hit_features(pose: Tensor, rows: int, columns: int, pixel_size: tuple[int, int]) -> Tensor:
    """Where the lines of sight of every token end.

    For each of eight rays of a token: nearness of the wall, how far along it the ray meets it,
    which of the four it is; nearness of the nearest pillar and which it is. For four points of a
    token below the horizon: the place on the floor, faded with its distance.

    Args:
        pose: ``[..., 3]`` (x, y, heading).
        rows: token rows of a frame.
        columns: token columns of a frame.
        pixel_size: height and width of a frame in pixels.

    Returns:
        ``[..., rows * columns, HIT_FEATURES]`` float32.
    """
    height, width = pixel_size
    focal = focal_length(height)
    place = pose.float()[..., :2, None]
    heading = pose.float()[..., 2, None]

    across = slopes(columns * RAYS_PER_TOKEN, width, focal, pose.device)
    ray = directions(heading, across)
    upright = torch.cat([_walls(place, ray), _pillars(place, ray)], dim=-1)
    upright = upright.unflatten(-2, (columns, RAYS_PER_TOKEN)).flatten(-2)[..., None, :, :]

    floor = _floor(place, heading, rows, columns, pixel_size, focal)
    shape = (*pose.shape[:-1], rows, columns, -1)
    return torch.cat([upright.expand(shape), floor.expand(shape)], dim=-1).flatten(-3, -2)


HIT_FEATURES = RAYS_PER_TOKEN * _FEATURES_PER_RAY + POINTS_PER_SIDE**2 * _FEATURES_PER_POINT
"""Number of features that `hit_features` gives each token."""


def _walls(place: Tensor, ray: Tensor) -> Tensor:
    """Nearness, place along the wall and which wall, ``[..., count, 13]``."""
    depth, index, along = meet_walls(place, ray)
    which = _one_of_four(index)
    places = waves(along * (math.pi / HALF_SIZE), _HARMONICS)
    return torch.cat([1 / depth.clamp_min(0.2)[..., None], places, which], dim=-1)


def _pillars(place: Tensor, ray: Tensor) -> Tensor:
    """Nearness of the nearest pillar, how squarely it is met, and which, ``[..., count, 6]``."""
    depth, index, root = meet_pillars(place, ray)
    nearest = torch.where(depth < FAR, 1 / depth.clamp_min(0.1), 0)
    squareness = (root / (ray * ray).sum(dim=-2)).clamp_min(0)
    seen = (nearest > 0).float()
    which = _one_of_four(index) * seen[..., None]
    squareness = squareness.sqrt() / PILLAR_RADIUS * seen
    return torch.cat([nearest[..., None], squareness[..., None], which], dim=-1)


def _floor(
    place: Tensor,
    heading: Tensor,
    rows: int,
    columns: int,
    pixel_size: tuple[int, int],
    focal: float,
) -> Tensor:
    """Places on the floor, ``[..., rows, columns, points * features]``."""
    height, width = pixel_size
    ray = directions(heading, slopes(columns * POINTS_PER_SIDE, width, focal, place.device))
    down = slopes(rows * POINTS_PER_SIDE, height, focal, place.device)[:, None]
    depth = EYE_HEIGHT / down.clamp_min(0.02)
    fade = torch.exp(-((depth / _FLOOR_FADES_AT) ** 2)) * (down > 0)  # [count, 1]
    points = place[..., None] + ray[..., None, :] * depth  # [..., 2, count, across]
    places = waves(points * (math.pi / HALF_SIZE), _FLOOR_HARMONICS).movedim(-4, -2).flatten(-2)
    fade = fade[..., None].expand(*places.shape[:-1], 1)
    found = torch.cat([places * fade, fade], dim=-1)
    found = found.unflatten(-2, (columns, POINTS_PER_SIDE)).unflatten(-4, (rows, POINTS_PER_SIDE))
    return found.transpose(-4, -3).flatten(-3)


def _one_of_four(index: Tensor) -> Tensor:
    return (index[..., None] == torch.arange(4, dtype=torch.int64, device=index.device)).float()
