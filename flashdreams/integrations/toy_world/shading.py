"""Pictures of the courtyard with materials: arches, tiles, hills, clouds and a sun.

Every pixel is shaded on its own at twice the resolution in both directions, then averaged. Shape
letters: B frames, H W rows and columns of the finer picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rays import (
    SUN_EAST,
    SUN_ELEVATION,
    SUN_NORTH,
    directions,
    focal_length,
    meet_pillars,
    meet_walls,
    pillar_normals,
    slopes,
)
from .render import check_views
from .scene import FLOOR_RGB, FLOOR_SLOT, PILLAR_RGB, SKY_RGB, SKY_SLOT, WALL_RGB
from .world import (
    EYE_HEIGHT,
    HALF_SIZE,
    PILLAR_HEIGHT,
    PILLAR_OFFSET,
    PILLAR_RADIUS,
    WALL_HEIGHT,
)

SAMPLES = 2
"""Samples along each side of a pixel."""
FOG_DISTANCE = 16.0
"""Distance at which 63 % of a surface's light is replaced by the colour of the horizon."""

_FRAMES_PER_PASS = {"cpu": 1, "cuda": 128}


@torch.no_grad()
def shade(scene: Tensor, pose: Tensor, size: tuple[int, int] = (128, 128)) -> Tensor:
    """Draw what a camera sees.

    Args:
        scene: ``[B, 10]`` int64, no hidden slots.
        pose: ``[B, 3]`` (x, y, heading), on the device of the scene.
        size: (height, width) in pixels.

    Returns:
        ``[B, 3, height, width]`` float32 in [-1, 1], on the device of the pose.

    Raises:
        ValueError: shapes that do not fit, or a hidden slot.
    """
    check_views(scene, pose)
    count = _FRAMES_PER_PASS.get(pose.device.type, 1)
    parts = zip(scene.split(count), pose.float().split(count), strict=True)
    return torch.cat([_shade(*part, size) for part in parts])


def _shade(scene: Tensor, pose: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = (SAMPLES * side for side in size)
    focal = focal_length(height)
    rise = -slopes(height, height, focal, pose.device)[:, None]
    side = slopes(width, width, focal, pose.device)
    position = pose[:, :2, None]
    ray = directions(pose[:, 2:], side)  # [B, 2, W]

    sky = SKY_RGB.to(pose.device)[scene[:, SKY_SLOT]]
    picture = _sky(sky, ray, side, rise)
    stretch = (1 + side**2).sqrt()
    wall_depth, wall = _wall(scene, position, ray, rise)
    height_on_wall = EYE_HEIGHT + wall_depth[:, None] * rise
    is_wall = (height_on_wall > 0) & (height_on_wall < WALL_HEIGHT)
    picture = torch.where(
        is_wall[:, None], _lit(wall, (wall_depth * stretch)[:, None, None], sky), picture
    )

    floor_depth = (EYE_HEIGHT / (-rise).clamp_min(1e-4)).expand(-1, width)
    floor = _floor(scene, position, ray, floor_depth)
    is_floor = (rise < 0) & (height_on_wall <= 0)
    picture = torch.where(is_floor[:, None], _lit(floor, floor_depth * stretch, sky), picture)

    pillar_depth, pillar = _pillar(scene, position, ray, rise)
    height_on_pillar = EYE_HEIGHT + pillar_depth[:, None] * rise
    is_pillar = (height_on_pillar > 0) & (height_on_pillar < PILLAR_HEIGHT)
    is_pillar &= (pillar_depth < wall_depth)[:, None]
    picture = torch.where(
        is_pillar[:, None], _lit(pillar, (pillar_depth * stretch)[:, None, None], sky), picture
    )
    return F.avg_pool2d(picture.clamp(0, 1), SAMPLES).mul_(2).sub_(1)


def _step(value: Tensor, edge: float | Tensor, width: float | Tensor) -> Tensor:
    """0 below the edge, 1 above, with a ramp of some width."""
    return ((value - edge) / width + 0.5).clamp(0, 1)


def _lit(colour: Tensor, distance: Tensor, sky: Tensor) -> Tensor:
    """A surface ``[B, 3, H, W]`` under the light of the sky and behind the fog.

    ``distance`` broadcasts to it.
    """
    keep = torch.exp(-((distance / FOG_DISTANCE) ** 2))
    light = sky[:, 3, :, None, None] * colour
    return sky[:, 1, :, None, None].lerp(light, keep)


def _sky(sky: Tensor, ray: Tensor, side: Tensor, rise: Tensor) -> Tensor:
    """Gradient, sun, clouds and hills ``[B, 3, H, W]``."""
    zenith, horizon, glow, _ = (sky[:, i, :, None, None] for i in range(4))
    length = (1 + side**2 + rise**2).rsqrt()
    elevation = (rise * length).clamp_min(0)
    azimuth = torch.atan2(ray[:, 0], ray[:, 1])[:, None]
    colour = zenith.lerp(horizon, torch.exp(-((2.3 * elevation) ** 1.3)))
    toward = SUN_EAST * ray[:, 0] + SUN_NORTH * ray[:, 1]
    aligned = toward[:, None] * math.cos(SUN_ELEVATION) + rise * math.sin(SUN_ELEVATION)
    aligned = (aligned * length)[:, None]
    colour = colour + glow * (torch.exp((aligned - 1) * 7) + 1.6 * _step(aligned, 0.9978, 0.0012))
    wave = torch.sin(3 * azimuth + 9 * elevation) + torch.sin(5 * azimuth - 14 * elevation + 1)
    wave = wave + 0.6 * torch.sin(8 * azimuth + 22 * elevation + 2)
    cloud = _step(wave, 1.1, 1.5) * _step(elevation, 0.2, 0.16) * 0.5
    colour = colour.lerp(horizon.lerp(torch.ones_like(horizon), 0.35), cloud[:, None])
    ridge = 0.23 + 0.055 * torch.sin(3 * azimuth + 0.5) + 0.03 * torch.sin(7 * azimuth + 2)
    far = 0.17 + 0.05 * torch.sin(4 * azimuth + 3) + 0.02 * torch.sin(9 * azimuth)
    for crest, share in ((ridge, 0.28), (far, 0.46)):
        hill = zenith.lerp(horizon, 0.45) * (1 - share)
        below = 1 - _step(rise / (1 + side**2).sqrt(), crest, 0.012)
        colour = colour.lerp(hill, below[:, None])
    return colour


def _wall(scene: Tensor, position: Tensor, ray: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
    """Depth ``[B, W]`` and colour ``[B, 3, H, W]`` of the wall behind each column."""
    depth, index, along = meet_walls(position, ray)
    colour = WALL_RGB.to(ray.device)[scene[:, :4].gather(1, index)].movedim(-1, 1)[:, :, None]
    light = ray.new_tensor([0.92, 1.03, 1.08, 0.96])[index]
    corner = 1 - 0.3 * torch.exp(-(HALF_SIZE - along.abs()).clamp_min(0) / 0.5)
    up = EYE_HEIGHT + depth[:, None] * rise  # [B, H, W]
    soft = (0.012 * depth)[:, None]
    across = ((along + 1) % 2 - 1)[:, None].abs()  # 0 in the middle of an arch, 1 on a pilaster
    top = 0.92 + (0.62**2 - across.clamp_max(0.62) ** 2).clamp_min(0).sqrt() * 0.62
    arch = _step(0.62 - across, 0.0, soft + 0.02) * _step(top - up, 0.0, soft + 0.02)
    rim = _step(0.74 - across, 0.0, soft + 0.02) * _step(top + 0.13 - up, 0.0, soft + 0.02)
    shade = 0.80 + 0.16 * rim * (1 - arch) - arch * (0.30 - 0.16 * (up / WALL_HEIGHT))
    shade = shade * (1 - 0.10 * _line(up, 0.425, soft + 0.03) * (1 - arch))
    shade = shade + 0.14 * _step(up, WALL_HEIGHT - 0.14, soft + 0.02)
    shade = shade * (0.72 + 0.28 * _step(up, 0.16, 0.3 + soft))
    return depth, colour * (shade * (light * corner)[:, None])[:, None]


def _line(value: Tensor, period: float, width: Tensor) -> Tensor:
    """1 on joints that repeat, 0 between them; fades where they are thinner than a pixel."""
    off = (value / period - (value / period).round()).abs() * period
    return (1 - off / width).clamp(0, 1) * (0.05 / width).clamp_max(1)


def _pillar(scene: Tensor, position: Tensor, ray: Tensor, rise: Tensor) -> tuple[Tensor, Tensor]:
    """Depth ``[B, W]``, huge where there is none, and colour of the nearest pillar."""
    hits = meet_pillars(position, ray)
    depth, index = hits.depth, hits.which
    east, north = pillar_normals(position, ray, hits)
    square = (ray * ray).sum(dim=1)
    to_sun = (east * SUN_EAST + north * SUN_NORTH).clamp(-1, 1)
    facing = (-(east * ray[:, 0] + north * ray[:, 1]) * square.rsqrt()).clamp(0, 1)
    light = 0.48 + 0.2 * to_sun + 0.42 * facing
    up = EYE_HEIGHT + depth.clamp_max(20.0)[:, None] * rise
    soft = (0.012 * depth.clamp_max(20.0))[:, None]
    band = 1 - _step(up, 0.22, soft + 0.02) + _step(up, PILLAR_HEIGHT - 0.24, soft + 0.02)
    ring = _line(up - 0.22, 0.81, soft + 0.035)
    shade = (0.86 + 0.18 * band - 0.25 * ring) * (0.78 + 0.22 * _step(up, 0.2, 0.4))
    colour = PILLAR_RGB.to(ray.device)[scene[:, 4:8].gather(1, index)].movedim(-1, 1)[:, :, None]
    return depth, colour * (shade * light[:, None])[:, None]


def _floor(scene: Tensor, position: Tensor, ray: Tensor, depth: Tensor) -> Tensor:
    """Colour ``[B, 3, H, W]`` of the tiles, with the shadows of walls and pillars."""
    depth = depth.clamp_max(16.0)
    x = position[:, 0, None] + ray[:, 0, None] * depth
    y = position[:, 1, None] + ray[:, 1, None] * depth
    soft = 0.02 + 0.012 * depth * depth
    tile = _square(x, soft) * _square(y, soft)
    shade = 0.92 + 0.13 * tile * (0.25 / soft).clamp_max(1)
    shade = shade * (
        1 - 0.22 * torch.maximum(_line(x, 1.0, soft + 0.03), _line(y, 1.0, soft + 0.03))
    )
    edge = (HALF_SIZE - torch.maximum(x.abs(), y.abs())).clamp_min(0)
    shade = shade * (1 - 0.34 * torch.exp(edge * (-1 / 0.45)))
    x_off, y_off = x - x.sign() * PILLAR_OFFSET, y - y.sign() * PILLAR_OFFSET
    near = (x_off * x_off + y_off * y_off - PILLAR_RADIUS**2).clamp_min(0)
    away = -(x_off * SUN_EAST + y_off * SUN_NORTH)
    across = x_off * SUN_NORTH - y_off * SUN_EAST
    reach = (away * 2.0).clamp(0, 1) * ((2.1 - away) / 0.8).clamp(0, 1)
    shadow = 0.36 * _step(0.38 - across.abs(), 0.0, 0.12) * reach
    shade = shade * (1 - shadow) * (1 - 0.34 * torch.exp(near * -3.5))
    colour = FLOOR_RGB.to(ray.device)[scene[:, FLOOR_SLOT]]
    return colour[:, :, None, None] * shade[:, None]


def _square(value: Tensor, soft: Tensor) -> Tensor:
    """+1 and -1 in turns, one unit each."""
    return (torch.sin(value * math.pi) / (math.pi * soft)).clamp(-1, 1)
