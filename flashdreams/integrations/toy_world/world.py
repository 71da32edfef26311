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
