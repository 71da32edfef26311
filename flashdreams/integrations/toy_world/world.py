"""Geometry and kinematics of the walled courtyard.

Plane coordinates: x points east, y north, the origin is the middle of the courtyard. A pose is
``(x, y, heading)`` with the heading in radians clockwise from north, as on a compass: the camera
looks along ``(sin h, cos h)``, its right hand points along ``(cos h, -sin h)``, and a positive turn
is a turn to the right. As a camera-to-world matrix (x right, y down, z forward) the world's X axis
is east, its Z axis north, and Y points into the ground with 0 at eye height.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashdreams.runtime.actions import KeyMotion

HALF_SIZE = 4.0
"""Distance of each wall from the middle, in world units."""
PILLAR_OFFSET = 1.7
"""Pillars stand at (+-PILLAR_OFFSET, +-PILLAR_OFFSET)."""
PILLAR_RADIUS = 0.36
"""Radius of a pillar, in world units."""
WALL_HEIGHT = 1.7
"""Height of the walls above the floor."""
PILLAR_HEIGHT = 2.05
"""Height of the pillars above the floor; above eye height, so a near one hides all of a far one."""
EYE_HEIGHT = 0.8
"""Height of the camera above the floor."""
MARGIN = 0.45
"""Least distance between the camera and a wall or the face of a pillar."""

MOVE_PER_FRAME = 0.16
"""World units per pixel frame while a movement key is held."""
TURN_PER_FRAME = math.radians(6.0)
"""Radians per pixel frame while a turning key is held."""
KEY_MOTION = KeyMotion(move_per_frame=MOVE_PER_FRAME, turn_per_frame_rad=TURN_PER_FRAME)
"""The same two figures for ``flashdreams.runtime.actions.integrate``."""

START_POSE = (0.0, -3.2, 0.0)
"""Where a rollout starts unless told otherwise: near the south wall, looking north."""

_CANDIDATES = 12
_LOOK_AHEAD = 1.1
_MOTIONS = torch.tensor(
    [[1, 0], [1, -1], [1, 1], [0, 0], [-1, 0], [0, -1], [0, 1]], dtype=torch.float32
)
_MOTION_WEIGHTS = torch.tensor([0.46, 0.08, 0.08, 0.14, 0.10, 0.07, 0.07])
_TURNS = torch.tensor([[0.0], [-1.0], [1.0]])
_TURN_WEIGHTS = torch.tensor([0.46, 0.27, 0.27])


def collide(position: Tensor) -> Tensor:
    """Move positions that are too near to a wall or a pillar to the nearest allowed place.

    Applied after each small move this lets the camera slide along whatever it touches.

    Args:
        position: ``[..., 2]`` floating point, (x, y).

    Returns:
        ``[..., 2]``, same dtype: at least ``MARGIN`` away from walls and pillars.
    """
    limit = HALF_SIZE - MARGIN
    position = position.clamp(-limit, limit)
    centre = torch.where(position < 0, -PILLAR_OFFSET, PILLAR_OFFSET).to(position.dtype)
    offset = position - centre
    distance = offset.norm(dim=-1, keepdim=True)
    reach = PILLAR_RADIUS + MARGIN
    fallback = -centre / (PILLAR_OFFSET * math.sqrt(2.0))
    outward = torch.where(distance > 1e-6, offset / distance.clamp_min(1e-6), fallback)
    return torch.where(distance < reach, centre + outward * reach, position)


def collide_camera(position: Tensor) -> Tensor:
    """Apply ``collide`` to a camera position in space; the ``collide`` of ``integrate``.

    Args:
        position: ``[3]`` world position (X east, Y down, Z north).

    Returns:
        ``[3]``, same dtype, Y untouched.
    """
    plane = collide(position[[0, 2]])
    return torch.stack([plane[0], position[1], plane[1]])


def step(pose: Tensor, move_forward: Tensor, strafe: Tensor, turn: Tensor) -> Tensor:
    """Advance poses by one pixel frame: turn, then move along the new heading, then slide.

    Args:
        pose: ``[B, 3]`` floating point, (x, y, heading).
        move_forward: ``[B]`` in [-1, 1], positive forward.
        strafe: ``[B]`` in [-1, 1], positive to the right.
        turn: ``[B]`` in [-1, 1], positive to the right.

    Returns:
        ``[B, 3]``, same dtype. Moving forward and sideways at once is no faster than either alone.
    """
    heading = pose[:, 2] + turn * TURN_PER_FRAME
    speed = MOVE_PER_FRAME / torch.hypot(move_forward, strafe).clamp_min(1.0)
    sine, cosine = heading.sin(), heading.cos()
    shift = torch.stack(
        [move_forward * sine + strafe * cosine, move_forward * cosine - strafe * sine], dim=-1
    )
    position = collide(pose[:, :2] + shift * speed[:, None])
    return torch.cat([position, heading[:, None]], dim=-1)


def random_pose(batch: int, generator: torch.Generator) -> Tensor:
    """Draw poses uniformly from the free part of the courtyard.

    Args:
        batch: number of poses B.
        generator: source of randomness; its device is the device of the result.

    Returns:
        ``[B, 3]`` float32, (x, y, heading), heading in [-pi, pi).
    """
    device = generator.device
    limit = HALF_SIZE - MARGIN
    draw = torch.rand(batch, _CANDIDATES, 2, generator=generator, device=device)
    candidates = (draw * 2 - 1) * limit
    free = ((candidates.abs() - PILLAR_OFFSET).norm(dim=-1) >= PILLAR_RADIUS + MARGIN).int()
    chosen = free.argmax(dim=1)
    position = collide(candidates[torch.arange(batch, device=device), chosen])
    turn = torch.rand(batch, 1, generator=generator, device=device)
    return torch.cat([position, (turn * 2 - 1) * math.pi], dim=-1)


def _held_keys(
    batch: int,
    frames: int,
    choices: Tensor,
    weights: Tensor,
    duration: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Fill frames with randomly chosen rows of ``choices``, each held for a random duration."""
    device = generator.device
    low, high = duration
    segments = frames // low + 1
    lengths = torch.randint(low, high + 1, (batch, segments), generator=generator, device=device)
    ends = lengths.cumsum(dim=1)
    index = torch.arange(frames, device=device).expand(batch, frames).contiguous()
    segment = torch.searchsorted(ends, index, right=True)
    picks = torch.multinomial(
        weights.to(device), batch * segments, replacement=True, generator=generator
    )
    return choices.to(device)[picks.view(batch, segments).gather(1, segment)]


def random_actions(batch: int, frames: int, generator: torch.Generator) -> Tensor:
    """Draw plausible key presses: keys held for random durations, combinations and pauses.

    Args:
        batch: number of sequences B.
        frames: pixel frames F.
        generator: source of randomness; its device is the device of the result.

    Returns:
        ``[B, F, 3]`` float32 with values -1, 0, 1: forward, strafe, turn; right is positive.
    """
    motion = _held_keys(batch, frames, _MOTIONS, _MOTION_WEIGHTS, (4, 20), generator)
    turn = _held_keys(batch, frames, _TURNS, _TURN_WEIGHTS, (3, 16), generator)
    return torch.cat([motion, turn], dim=-1)


def rollout(start: Tensor, actions: Tensor) -> Tensor:
    """Follow actions from a start pose.

    Args:
        start: ``[B, 3]`` poses of frame 0.
        actions: ``[B, F - 1, 3]`` as from ``random_actions``; action i leads to frame i + 1.

    Returns:
        ``[B, F, 3]``, the dtype of ``start``.
    """
    poses = [start]
    for action in actions.unbind(dim=1):
        poses.append(step(poses[-1], *action.unbind(dim=-1)))
    return torch.stack(poses, dim=1)


def random_rollout(batch: int, frames: int, generator: torch.Generator) -> Tensor:
    """Draw camera paths: a random free start pose, random key presses, and a glance at the way.

    Before a wall the forward key is let go and the camera turns to the middle, as a player would
    do; undisturbed random keys would spend nearly half of the time with the nose against a wall.

    Args:
        batch: number of paths B.
        frames: pixel frames F, at least 1.
        generator: source of randomness; its device is the device of the result.

    Returns:
        ``[B, F, 3]`` float32 poses (x, y, heading); the heading is not wrapped.
    """
    poses = [random_pose(batch, generator)]
    actions = random_actions(batch, frames, generator)
    for action in actions[:, 1:].unbind(dim=1):
        poses.append(step(poses[-1], *_look_out(poses[-1], action).unbind(dim=-1)))
    return torch.stack(poses, dim=1)


def _look_out(pose: Tensor, action: Tensor) -> Tensor:
    """Keys [B, 3] of a player who does not walk on into a wall."""
    position, heading = pose[:, :2], pose[:, 2]
    ahead = torch.stack([heading.sin(), heading.cos()], dim=-1)
    blocked = ((position + ahead * _LOOK_AHEAD).abs().amax(dim=-1) > HALF_SIZE) & (
        action[:, 0] >= 0
    )
    outward = position[:, 0] * ahead[:, 1] - position[:, 1] * ahead[:, 0]
    toward_middle = torch.where(outward > 0, -1.0, 1.0)
    turn = torch.where(action[:, 2] == 0, toward_middle, action[:, 2])
    evasive = torch.stack([torch.zeros_like(turn), action[:, 1], turn], dim=-1)
    return torch.where(blocked[:, None], evasive, action)


def pose_to_camera(pose: Tensor) -> Tensor:
    """Turn plane poses into camera-to-world matrices.

    Args:
        pose: ``[..., 3]`` (x, y, heading).

    Returns:
        ``[..., 4, 4]`` float64, camera axes x right, y down, z forward.
    """
    x, y, heading = pose.double().unbind(dim=-1)
    sine, cosine = heading.sin(), heading.cos()
    camera = torch.zeros(*pose.shape[:-1], 4, 4, dtype=torch.float64, device=pose.device)
    camera[..., 0, 0] = cosine
    camera[..., 0, 2] = sine
    camera[..., 2, 0] = -sine
    camera[..., 2, 2] = cosine
    camera[..., 1, 1] = 1.0
    camera[..., 3, 3] = 1.0
    camera[..., 0, 3] = x
    camera[..., 2, 3] = y
    return camera


def camera_to_pose(camera: Tensor) -> Tensor:
    """Turn camera-to-world matrices of an upright camera into plane poses.

    Args:
        camera: ``[..., 4, 4]``, camera axes x right, y down, z forward; no pitch, no roll.

    Returns:
        ``[..., 3]`` float32 (x, y, heading), heading in (-pi, pi].
    """
    heading = torch.atan2(camera[..., 0, 2], camera[..., 2, 2])
    return torch.stack([camera[..., 0, 3], camera[..., 2, 3], heading], dim=-1).float()
