"""Random walks through the courtyard, to train and to evaluate on."""

import math

import torch
from torch import Tensor

from flashdreams.integrations.toy_world.world import (
    HALF_SIZE,
    MARGIN,
    MOVE_PER_FRAME,
    PILLAR_OFFSET,
    PILLAR_RADIUS,
    TURN_PER_FRAME,
    collide,
)

_CANDIDATES = 12
_LOOK_AHEAD = 1.1
_MOTIONS = torch.tensor(
    [[1, 0], [1, -1], [1, 1], [0, 0], [-1, 0], [0, -1], [0, 1]], dtype=torch.float32
)
_MOTION_WEIGHTS = torch.tensor([0.46, 0.08, 0.08, 0.14, 0.10, 0.07, 0.07])
_TURNS = torch.tensor([[0.0], [-1.0], [1.0]])
_TURN_WEIGHTS = torch.tensor([0.46, 0.27, 0.27])


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
    """Draw camera paths: a random free start pose, random key presses, and avoidance of walls.

    In front of a wall the forward key is released and the camera turns to the middle, as a player
    would do; purely random keys would face a wall nearly half of the time.

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
    """Keys [B, 3] of a player who avoids walking into walls."""
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
