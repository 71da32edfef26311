"""Ray-cast pictures of the courtyard.

The camera never pitches or rolls, so a column of the picture meets one wall and at most one
visible pillar: hits are computed once per sub-column, edges along a column are box-filtered
analytically. Each pixel is then a weighted sum of a few colours, and one batched matmul
``[3, K] @ [K, H]`` per column draws the picture.

Shape letters: B frames, H W rows and columns, S sub-columns per column, K colours per column.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
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
)
from .scene import FLOOR_RGB, FLOOR_SLOT, PILLAR_RGB, SKY_RGB, SKY_SLOT, WALL_RGB, check_scene
from .world import (
    EYE_HEIGHT,
    HALF_SIZE,
    PILLAR_HEIGHT,
    PILLAR_OFFSET,
    PILLAR_RADIUS,
    WALL_HEIGHT,
)

SUBCOLUMNS = 3
"""Sub-columns per pixel column."""
FOG_DISTANCE = 13.0
"""Distance at which 63 % of a surface's light is replaced by the colour of the horizon."""

_WALL_LIGHT = torch.tensor([0.90, 1.02, 1.06, 0.94], dtype=torch.float32, device="cpu")
_FRAMES_PER_PASS = {"cpu": 8, "cuda": 512}


@torch.no_grad()
def render(scene: Tensor, pose: Tensor, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Draw what a camera sees.

    Args:
        scene: ``[B, 10]`` int64, no hidden slots.
        pose: ``[B, 3]`` (x, y, heading), on the device of the scene.
        size: (height, width) in pixels, both multiples of 8.

    Returns:
        ``[B, 3, height, width]`` float32 in [-1, 1], on the device of the pose.

    Raises:
        ValueError: mismatched shapes, a hidden slot, or a size that is not a multiple of 8.
    """
    check_views(scene, pose)
    height, width = size
    if height < 8 or width < 8 or height % 8 or width % 8:
        raise ValueError(f"size={height}x{width} is not made of positive multiples of 8, try 64x64")
    frames = torch.empty(len(pose), 3, height, width, device=pose.device, dtype=torch.float32)
    stride = _FRAMES_PER_PASS.get(pose.device.type, 8)
    for first in range(0, len(pose), stride):
        part = slice(first, first + stride)
        frames[part] = _render_pass(scene[part], pose[part].float(), height, width)
    return frames


def check_views(scene: Tensor, pose: Tensor) -> None:
    """Refuse scenes ``[B, 10]`` and poses ``[B, 3]`` that cannot be drawn.

    Raises:
        ValueError: shapes that do not fit, or a hidden slot.
    """
    check_scene(scene)
    if pose.shape != (len(scene), 3):
        raise ValueError(f"pose has shape {tuple(pose.shape)}, expected ({len(scene)}, 3)")


@lru_cache(maxsize=16)
def _rays(height: int, width: int, device: torch.device) -> tuple[float, Tensor, Tensor, Tensor]:
    """Focal length in pixels, slopes of sub-columns [WS] and columns [W], rows [H] (down > 0)."""
    focal = focal_length(height)
    fine = (torch.arange(width * SUBCOLUMNS, device=device, dtype=torch.float32) + 0.5) / SUBCOLUMNS
    columns = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    rows = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    return focal, (fine - width / 2) / focal, (columns - width / 2) / focal, rows - height / 2


@lru_cache(maxsize=4)
def _palette(device: torch.device) -> tuple[Tensor, ...]:
    """The colour tables on one device."""
    tables = (WALL_RGB, PILLAR_RGB, FLOOR_RGB, SKY_RGB, _WALL_LIGHT)
    return tuple(table.to(device) for table in tables)


def _render_pass(scene: Tensor, pose: Tensor, height: int, width: int) -> Tensor:
    """Draw a batch small enough for the cache, [B, 3, H, W] in [-1, 1]."""
    focal, fine, columns, rows = _rays(height, width, pose.device)
    frames = len(pose)
    position = pose[:, :2]
    ray, view = directions(pose[:, 2:], fine), directions(pose[:, 2:], columns)
    wall_depth, wall_colour, wall_panel = _hit_walls(scene, position, ray)
    pillar_depth, pillar_colour = _hit_pillars(scene, position, ray)

    scale = focal / wall_depth[..., None]
    above = (-(WALL_HEIGHT - EYE_HEIGHT) * scale - (rows - 0.5)).clamp_(0, 1)
    below = ((rows + 0.5) - EYE_HEIGHT * scale).clamp_(0, 1)
    pillar_scale = focal / pillar_depth[..., None]
    pillar = ((rows + 0.5) + (PILLAR_HEIGHT - EYE_HEIGHT) * pillar_scale).clamp_(0, 1)
    pillar.sub_(((rows + 0.5) - EYE_HEIGHT * pillar_scale).clamp_(0, 1))
    free = 1 - pillar
    wall = (1 - above).sub_(below).mul_(free)
    above.mul_(free)
    below.mul_(free)

    stretch = (1 + fine * fine).sqrt()
    wall_keep = _keep(wall_depth * stretch)[..., None]
    pillar_keep = _keep(pillar_depth * stretch)[..., None]
    fog = wall * (1 - wall_keep) + pillar * (1 - pillar_keep)
    wall.mul_(wall_keep).mul_(_wall_shade(scale, wall_panel, rows))
    pillar.mul_(pillar_keep).mul_(_pillar_shade(pillar_scale, rows))

    def per_column(weight: Tensor) -> Tensor:
        return weight.view(frames, width, SUBCOLUMNS, height).mean(dim=2)

    zenith, glow = _sky(view, columns, rows, focal)
    floor, floor_keep = _floor(position, view, columns, rows, focal)
    above, below, half = per_column(above), per_column(below), height // 2
    weights = torch.zeros(
        frames, width, 4 + 2 * SUBCOLUMNS, height, device=pose.device, dtype=torch.float32
    )
    torch.mul(above[..., :half], zenith, out=weights[:, :, 0, :half])
    torch.mul(above[..., :half], glow, out=weights[:, :, 1, :half])
    fog = per_column(fog).add_(above).sub_(weights[:, :, 0])
    fog[..., half:].add_(below[..., half:] * (1 - floor_keep))
    weights[:, :, 2] = fog
    torch.mul(below[..., half:], floor * floor_keep, out=weights[:, :, 3, half:])
    weights[:, :, 4 : 4 + SUBCOLUMNS] = wall.view(frames, width, SUBCOLUMNS, height)
    weights[:, :, 4 + SUBCOLUMNS :] = pillar.view(frames, width, SUBCOLUMNS, height)

    _, _, floors, skies, _ = _palette(pose.device)
    sky = skies[scene[:, SKY_SLOT]]
    tint = sky[:, 3, None, :] / SUBCOLUMNS
    colours = torch.empty(
        frames, width, 4 + 2 * SUBCOLUMNS, 3, device=pose.device, dtype=torch.float32
    )
    colours[:, :, 0] = sky[:, None, 0]
    colours[:, :, 1] = sky[:, None, 2]
    colours[:, :, 2] = sky[:, None, 1]
    colours[:, :, 3] = (floors[scene[:, FLOOR_SLOT]] * sky[:, 3])[:, None]
    colours[:, :, 4 : 4 + SUBCOLUMNS] = (wall_colour * tint).view(frames, width, SUBCOLUMNS, 3)
    colours[:, :, 4 + SUBCOLUMNS :] = (pillar_colour * tint).view(frames, width, SUBCOLUMNS, 3)
    pixels = colours.transpose(2, 3).reshape(frames * width, 3, -1) @ weights.view(
        frames * width, -1, height
    )
    pixels = pixels.clamp_(0, 1).mul_(2).sub_(1)
    return pixels.view(frames, width, 3, height).permute(0, 2, 3, 1)


def _keep(distance: Tensor) -> Tensor:
    """Share of a surface's light that the fog leaves."""
    return torch.exp(-((distance / FOG_DISTANCE) ** 2))


def _hit_walls(scene: Tensor, position: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth [B, WS], lit colour [B, WS, 3] and panel strength [B, WS] of the wall each ray hits."""
    walls, _, _, _, light = _palette(ray.device)
    depth, index, along = meet_walls(position[..., None], ray)
    corner = 1 - 0.22 * torch.exp(-(HALF_SIZE - along.abs()).clamp_min(0) / 0.55)
    strength = light[index] * corner
    colour = walls[scene[:, :4].gather(1, index)] * strength[..., None]
    panel = (0.25 - 1.5 * torch.cos(math.pi * along)).clamp_(-1, 1)
    return depth, colour, panel * torch.exp(-((depth / 7.0) ** 2))


def _hit_pillars(scene: Tensor, position: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Depth [B, WS] (huge where no pillar is) and lit colour [B, WS, 3] of the nearest pillar."""
    _, pillars, _, _, _ = _palette(ray.device)
    hits = meet_pillars(position[..., None], ray)
    depth, index = hits.depth, hits.which
    east, north = pillar_normals(position[..., None], ray, hits)
    square = (ray * ray).sum(dim=1)
    toward_sun = (east * SUN_EAST + north * SUN_NORTH).clamp_(-1, 1)
    facing = (-(east * ray[:, 0] + north * ray[:, 1]) * square.rsqrt()).clamp_(0, 1)
    strength = 0.50 + 0.15 * toward_sun + 0.44 * facing * facing
    colour = pillars[scene[:, 4:8].gather(1, index)] * strength[..., None]
    return depth, colour


def _ramp(edge: float, width: float, scale: Tensor, rows: Tensor) -> Tensor:
    """Soft step over height: 0 below ``edge``, 1 above; at least one pixel wide, [B, WS, H]."""
    slope = (width * scale).clamp_min(1.0).reciprocal_()
    centre = 0.5 - (edge - EYE_HEIGHT) * scale * slope
    return torch.addcmul(centre, slope, rows, value=-1.0).clamp_(0, 1)


def _wall_shade(scale: Tensor, panel: Tensor, rows: Tensor) -> Tensor:
    """Brightness over the height of a wall: skirting, panels and coping, [B, WS, H]."""
    shade = _ramp(0.50, 0.16, scale, rows).sub_(_ramp(1.30, 0.16, scale, rows))
    shade.mul_(0.085 * panel[..., None])
    shade.add_(_ramp(0.26, 0.22, scale, rows), alpha=0.30)
    shade.add_(_ramp(WALL_HEIGHT - 0.17, 0.10, scale, rows), alpha=0.12)
    return shade.add_(0.70)


def _pillar_shade(scale: Tensor, rows: Tensor) -> Tensor:
    """Brightness over the height of a pillar: a darker foot and a lighter head, [B, WS, H]."""
    shade = _ramp(0.16, 0.34, scale, rows).mul_(0.34)
    shade.add_(_ramp(PILLAR_HEIGHT - 0.26, 0.10, scale, rows), alpha=0.10)
    return shade.add_(0.66)


def _sky(view: Tensor, columns: Tensor, rows: Tensor, focal: float) -> tuple[Tensor, Tensor]:
    """Weights above the horizon: the zenith's colour [W, H/2], the sun's glow [B, W, H/2]."""
    rise = -rows[: len(rows) // 2] / focal
    length = (1 + columns[:, None] ** 2 + rise**2).rsqrt()
    zenith = 1 - torch.exp(-((2.3 * rise * length) ** 1.3))
    toward_sun = SUN_EAST * view[:, 0] + SUN_NORTH * view[:, 1]
    aligned = toward_sun[..., None] * math.cos(SUN_ELEVATION) + rise * math.sin(SUN_ELEVATION)
    return zenith, torch.exp((aligned * length - 1).mul_(7.0))


def _floor(
    position: Tensor, view: Tensor, columns: Tensor, rows: Tensor, focal: float
) -> tuple[Tensor, Tensor]:
    """Brightness [B, W, H/2] below the horizon, and what the fog leaves of it [W, H/2]."""
    depth = (EYE_HEIGHT * focal / rows[len(rows) // 2 :]).clamp_max(14.0)
    x = position[:, 0, None, None] + view[:, 0, :, None] * depth
    y = position[:, 1, None, None] + view[:, 1, :, None] * depth
    distance = depth * (1 + columns[:, None] ** 2).sqrt()
    tile = torch.sin(x * (math.pi / 2)).mul_(2.2).clamp_(-1, 1)
    tile.mul_(torch.sin(y * (math.pi / 2)).mul_(2.2).clamp_(-1, 1))
    shade = tile.mul_(0.06 * torch.exp(-((distance / 5.5) ** 2))).add_(1)
    edge = (HALF_SIZE - torch.maximum(x.abs(), y.abs())).clamp_min_(0)
    shade.mul_(1 - 0.28 * torch.exp(edge.mul_(-1 / 0.45)))
    # The pillars stand in the four quadrants, so the one of a point's own quadrant is the nearest.
    x_off = x - x.sign() * PILLAR_OFFSET
    y_off = y - y.sign() * PILLAR_OFFSET
    near = (x_off * x_off).addcmul_(y_off, y_off).sub_(PILLAR_RADIUS**2).clamp_min_(0)
    away = -(x_off * SUN_EAST + y_off * SUN_NORTH)
    across = x_off * SUN_NORTH - y_off * SUN_EAST
    reach = (away * 2.0).clamp_(0, 1).mul_((1.5 - away).clamp_(0, 1))
    shadow = torch.exp(across.square_().mul_(-5.5)).mul_(reach).mul_(0.26)
    shade.mul_(1 - shadow).mul_(1 - 0.34 * torch.exp(near.mul_(-3.5)))
    return shade, _keep(distance)
