"""Pictures of the courtyard with materials, and what tokens are told of them."""

import math

import pytest
import torch
from torch import Tensor

from flashdreams.integrations.toy_world.camera import CameraEncoderConfig
from flashdreams.integrations.toy_world.hits import HIT_FEATURES, RAYS_PER_TOKEN, hit_features
from flashdreams.integrations.toy_world.scene import (
    DEFAULT_SCENE,
    HIDDEN,
    NUM_OPTIONS,
    SLOTS,
    random_scene,
)
from flashdreams.integrations.toy_world.shading import shade
from flashdreams.integrations.toy_world.world import (
    HALF_SIZE,
    PILLAR_OFFSET,
    PILLAR_RADIUS,
    pose_to_camera,
)
from training.toy_world.walks import random_pose

SCENE = torch.tensor([DEFAULT_SCENE])
PER_RAY = 19


def _footprint(slot: int, pose: tuple[float, float, float]) -> Tensor:
    """Pixels [64, 80] that change with the colour of a slot."""
    other = SCENE.clone()
    other[:, slot] = (other[:, slot] + 3) % NUM_OPTIONS
    frames = shade(torch.cat([SCENE, other]), torch.tensor([pose, pose]), (64, 80))
    return (frames[0] - frames[1]).abs().amax(dim=0) > 0.02


def test_frames_are_in_range_and_do_not_depend_on_the_batch() -> None:
    """To 1e-5 (sums over batches of another size); another pose moves them by far more."""
    generator = torch.Generator().manual_seed(1)
    scene, pose = random_scene(5, generator), random_pose(5, generator)
    together = shade(scene, pose, (32, 40))
    assert together.shape == (5, 3, 32, 40) and together.dtype == torch.float32
    assert together.min() >= -1 and together.max() <= 1 and together.std() > 0.2
    alone = torch.cat([shade(scene[i : i + 1], pose[i : i + 1], (32, 40)) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together - shade(scene, pose + 0.01, (32, 40))).abs().max() > 1e-2


@pytest.mark.parametrize(("heading_deg", "slot"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_each_heading_faces_its_wall(heading_deg: int, slot: int) -> None:
    pose = (0.0, 0.0, math.radians(heading_deg))
    seen = [bool(_footprint(wall, pose)[31, 40]) for wall in range(4)]
    assert seen == [wall == slot for wall in range(4)]


def test_floor_below_and_sky_above() -> None:
    pose = (0.0, 0.0, 0.3)
    floor, sky = _footprint(SLOTS.index("floor"), pose), _footprint(SLOTS.index("sky"), pose)
    assert floor[-1].all() and not floor[:32].any()
    assert sky[0].all()


def test_hidden_slots_and_wrong_shapes_are_refused() -> None:
    hidden = SCENE.clone()
    hidden[0, 0] = HIDDEN
    with pytest.raises(ValueError, match="hides a slot"):
        shade(hidden, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"expected \(1, 3\)"):
        shade(SCENE, torch.zeros(2, 3))


def test_hits_know_the_distance_of_wall_and_pillar() -> None:
    """Looking north from the middle: the wall at 4 units; from the west, a pillar on the way."""
    ahead = hit_features(torch.tensor([0.0, 1.0, 0.0]), 8, 10, (128, 160))[4]
    rays = ahead[: RAYS_PER_TOKEN * PER_RAY].unflatten(0, (RAYS_PER_TOKEN, PER_RAY))
    torch.testing.assert_close(rays[-1, 0], torch.tensor(1 / (HALF_SIZE - 1)), atol=1e-4, rtol=0)
    assert rays[-1, 9:13].tolist() == [1, 0, 0, 0]  # the north wall
    assert not rays[-1, 13:].any()  # and no pillar before it
    pose = torch.tensor([-PILLAR_OFFSET, -PILLAR_OFFSET - 2.0, 0.0])
    ahead = hit_features(pose, 8, 10, (128, 160))[4]
    rays = ahead[: RAYS_PER_TOKEN * PER_RAY].unflatten(0, (RAYS_PER_TOKEN, PER_RAY))
    expected = torch.tensor(1 / (2 - PILLAR_RADIUS))
    torch.testing.assert_close(rays[-1, 13], expected, atol=5e-3, rtol=0)
    assert rays[-1, 15:].tolist() == [0, 0, 1, 0]  # the southwest pillar


def test_the_floor_is_told_below_the_horizon_alone() -> None:
    features = hit_features(torch.zeros(3), 8, 10, (128, 160)).unflatten(0, (8, 10))
    floor = features[..., RAYS_PER_TOKEN * PER_RAY :]
    assert not floor[:4].any()
    assert floor[-1].any(dim=-1).all()


def test_camera_encoder_with_materials_adds_them() -> None:
    config = CameraEncoderConfig(
        token_rows=8, token_columns=10, height=128, width=160, materials=True
    )
    poses = pose_to_camera(torch.tensor([[0.1, -1.0, 0.4]])).float()
    told = config.setup()(poses)
    assert told.shape == (1, 80, config.control_dim)
    expected = hit_features(torch.tensor([0.1, -1.0, 0.4]), 8, 10, (128, 160))
    torch.testing.assert_close(told[0, :, -HIT_FEATURES:], expected, atol=1e-4, rtol=0)
