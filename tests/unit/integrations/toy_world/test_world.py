"""Walking through the courtyard."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashdreams.integrations.toy_world.world import (
    HALF_SIZE,
    KEY_MOTION,
    MARGIN,
    MOVE_PER_FRAME,
    PILLAR_OFFSET,
    PILLAR_RADIUS,
    START_POSE,
    TURN_PER_FRAME,
    camera_to_pose,
    collide,
    collide_camera,
    pose_to_camera,
)
from flashdreams.runtime.actions import integrate, key_directions, parse_actions
from training.toy_world.walks import (
    random_actions,
    random_pose,
    random_rollout,
    rollout,
    step,
)


def _walk(start: tuple[float, float, float], text: str) -> Tensor:
    actions = torch.tensor([[key_directions(keys) for keys in parse_actions(text)]]).float()
    return rollout(torch.tensor([start]), actions)[0]


def _is_free(position: Tensor, slack: float = 1e-5) -> Tensor:
    inside = position.abs().amax(dim=-1) <= HALF_SIZE - MARGIN + slack
    gap = (position.abs() - PILLAR_OFFSET).norm(dim=-1)
    return inside & (gap >= PILLAR_RADIUS + MARGIN - slack)


def test_step_agrees_with_integrate() -> None:
    text = "w8 l4 w12 wl10 wj20 a9 s5 wd8 j30 w30"
    start = torch.tensor(START_POSE)
    cameras = integrate(parse_actions(text), KEY_MOTION, pose_to_camera(start), collide_camera)
    walked, integrated = pose_to_camera(_walk(START_POSE, text)), cameras
    torch.testing.assert_close(walked, integrated, atol=1e-4, rtol=0)
    through_walls = integrate(parse_actions(text), KEY_MOTION, pose_to_camera(start))
    assert not torch.allclose(walked, through_walls, atol=1e-1)


def test_walls_stop_and_let_slide() -> None:
    head_on = _walk((0.0, 0.0, 0.0), "w60")[-1]
    torch.testing.assert_close(
        head_on[:2], torch.tensor([0.0, HALF_SIZE - MARGIN]), atol=1e-5, rtol=0
    )
    path = _walk((0.0, 3.4, math.radians(45)), "w10")
    assert path[-1, 1] == pytest.approx(HALF_SIZE - MARGIN)
    assert path[-1, 0] == pytest.approx(10 * MOVE_PER_FRAME * math.sin(math.radians(45)), abs=1e-5)


def test_pillars_stop_and_let_slide() -> None:
    reach = PILLAR_RADIUS + MARGIN
    head_on = _walk((PILLAR_OFFSET, 0.0, 0.0), "w20")[-1]
    assert head_on[1] == pytest.approx(PILLAR_OFFSET - reach, abs=1e-5)
    beside = _walk((PILLAR_OFFSET - 0.3, 0.0, 0.0), "w40")
    assert bool(_is_free(beside[:, :2]).all())
    assert beside[-1, 1] > PILLAR_OFFSET + 0.5
    assert beside[:, 0].min() < PILLAR_OFFSET - reach + 0.01


def test_collide_leaves_free_places_alone_and_moves_others_little() -> None:
    position = (torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 4.4
    settled = collide(position)
    free = _is_free(position, slack=0.0)
    assert 0.3 < free.float().mean() < 0.95
    assert torch.equal(settled[free], position[free])
    assert bool(_is_free(settled).all())
    centre = torch.tensor([[PILLAR_OFFSET, -PILLAR_OFFSET]], dtype=torch.float64)
    assert bool(_is_free(collide(centre)).all())
    assert collide(centre).dtype == torch.float64


def test_poses_and_cameras_convert_both_ways() -> None:
    pose = random_pose(50, torch.Generator().manual_seed(1))
    camera = pose_to_camera(pose)
    assert camera.dtype == torch.float64
    torch.testing.assert_close(camera_to_pose(camera), pose, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(camera), torch.ones(50).double(), atol=1e-9, rtol=0)
    east = pose_to_camera(torch.tensor([0.0, 0.0, math.pi / 2]))
    torch.testing.assert_close(east[:3, 2], torch.tensor([1.0, 0, 0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(east[:3, 0], torch.tensor([0, 0, -1.0]).double(), atol=1e-6, rtol=0)


def test_random_rollout_repeats_with_its_seed_and_stays_free() -> None:
    draws = [random_rollout(32, 100, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (32, 100, 3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert bool(_is_free(draws[0][..., :2]).all())


def test_random_rollout_moves_like_a_player() -> None:
    path = random_rollout(64, 200, torch.Generator().manual_seed(4))
    moved = path[:, 1:] - path[:, :-1]
    assert moved[..., :2].norm(dim=-1).max() <= MOVE_PER_FRAME * 1.01  # a pillar pushes a little
    turns = (moved[..., 2] / TURN_PER_FRAME).round().int()
    torch.testing.assert_close(turns * TURN_PER_FRAME, moved[..., 2], atol=1e-4, rtol=0)
    assert set(turns.unique().tolist()) == {-1, 0, 1}
    quarters = (path[:, -1, :2] > 0).int() @ torch.tensor([1, 2], dtype=torch.int32)
    assert len(quarters.unique()) == 4


def test_random_actions_hold_keys() -> None:
    actions = random_actions(64, 200, torch.Generator().manual_seed(5))
    assert actions.shape == (64, 200, 3)
    assert set(actions.unique().tolist()) == {-1.0, 0.0, 1.0}
    changes = (actions[:, 1:] != actions[:, :-1]).float().mean(dim=(0, 1))
    assert bool((changes > 0.01).all()) and bool((changes < 0.15).all())


def test_random_rollout_of_one_frame_is_a_pose() -> None:
    path = random_rollout(3, 1, torch.Generator().manual_seed(0))
    assert torch.equal(path[:, 0], random_pose(3, torch.Generator().manual_seed(0)))


def test_step_is_independent_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(7)
    pose, action = random_pose(9, generator), random_actions(9, 1, generator)[:, 0]
    together = step(pose, *action.unbind(-1))
    alone = torch.cat([step(pose[i : i + 1], *action[i : i + 1].unbind(-1)) for i in range(9)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
