"""Pictures of the courtyard."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flashdreams.integrations.toy_world.rays import VERTICAL_FOV
from flashdreams.integrations.toy_world.render import render
from flashdreams.integrations.toy_world.scene import (
    DEFAULT_SCENE,
    HIDDEN,
    NUM_OPTIONS,
    NUM_SLOTS,
    SKY_SLOT,
    SLOTS,
    random_scene,
)
from flashdreams.integrations.toy_world.world import (
    EYE_HEIGHT,
    PILLAR_OFFSET,
    START_POSE,
    WALL_HEIGHT,
)
from training.toy_world.walks import random_pose

FOCAL = 32 / math.tan(VERTICAL_FOV / 2)
SCENE = torch.tensor([DEFAULT_SCENE])
NORTHEAST = SLOTS.index("northeast pillar")


def _footprint(slot: int, pose: tuple[float, float, float]) -> Tensor:
    """Pixels [64, 64] that change with the colour of a slot."""
    other = SCENE.clone()
    other[:, slot] = (other[:, slot] + 3) % NUM_OPTIONS
    frames = render(torch.cat([SCENE, other]), torch.tensor([pose, pose]))
    return (frames[0] - frames[1]).abs().amax(dim=0) > 0.02


def _column(mask: Tensor) -> float:
    """Centre of a footprint, in columns."""
    return float(mask.float().mean(dim=0) @ (torch.arange(64) + 0.5) / mask.float().mean(0).sum())


def test_render_gives_frames_in_range() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = render(random_scene(20, generator), random_pose(20, generator), size=(16, 24))
    assert frames.shape == (20, 3, 16, 24)
    assert frames.dtype == torch.float32
    assert bool(frames.isfinite().all())
    assert frames.min() >= -1 and frames.max() <= 1
    assert frames.std() > 0.2


def test_render_is_deterministic_and_independent_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    scene, pose = random_scene(11, generator), random_pose(11, generator)
    together = render(scene, pose)
    assert torch.equal(together, render(scene, pose))
    alone = torch.cat([render(scene[i : i + 1], pose[i : i + 1]) for i in range(11)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    shifted = torch.cat([render(scene[i : i + 1], pose[i : i + 1] + 0.01) for i in range(11)])
    assert (together - shifted).abs().max() > 1e-3


def test_render_of_no_frames_is_empty() -> None:
    assert render(SCENE[:0], torch.zeros(0, 3)).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(("heading_deg", "slot"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_each_heading_faces_its_wall(heading_deg: int, slot: int) -> None:
    pose = (0.0, 0.0, math.radians(heading_deg))
    seen = [bool(_footprint(wall, pose)[32, 32]) for wall in range(4)]
    assert seen == [wall == slot for wall in range(4)]


def test_wall_covers_the_projected_rows() -> None:
    rows = _footprint(0, (0.0, 0.0, 0.0))[:, 32].nonzero().flatten()
    top = 32 - (WALL_HEIGHT - EYE_HEIGHT) * FOCAL / 4
    bottom = 32 + EYE_HEIGHT * FOCAL / 4
    assert abs(int(rows[0]) - top) < 1
    assert abs(int(rows[-1]) + 1 - bottom) < 1


@pytest.mark.parametrize("heading", [0.0, 0.3, 0.8])
def test_pillar_stands_in_the_projected_column(heading: float) -> None:
    bearing = math.atan2(PILLAR_OFFSET, PILLAR_OFFSET + 2.0)
    expected = 32 + FOCAL * math.tan(bearing - heading)
    assert _column(_footprint(NORTHEAST, (0.0, -2.0, heading))) == pytest.approx(expected, abs=0.6)


def test_walking_forward_approaches() -> None:
    areas = [int(_footprint(NORTHEAST, (1.2, y, 0.2)).sum()) for y in (-3.0, -2.0, -1.0, 0.0)]
    assert areas == sorted(areas) and areas[-1] > 4 * areas[0]
    away = [int(_footprint(NORTHEAST, (1.2, y, math.pi)).sum()) for y in (-3.0, 0.0)]
    assert away == [0, 0]


def test_edges_are_smooth() -> None:
    generator = torch.Generator().manual_seed(2)
    scene, pose = random_scene(6, generator), random_pose(6, generator)
    reference = avg_pool2d(render(scene, pose, size=(256, 256)), 4)
    frames = render(scene, pose)
    assert (frames - reference).abs().mean() < 5e-3
    assert (frames.roll(1, dims=-1) - reference).abs().mean() > 1e-2


def test_every_slot_shows_somewhere() -> None:
    poses = random_pose(24, torch.Generator().manual_seed(3))
    base = render(SCENE.expand(24, -1), poses)
    for slot in range(NUM_SLOTS):
        changed = SCENE.clone()
        changed[:, slot] = (changed[:, slot] + 1) % NUM_OPTIONS
        assert (render(changed.expand(24, -1), poses) - base).abs().max() > 0.1
    assert torch.equal(render(SCENE.expand(24, -1), poses), base)


def test_camera_on_an_axis_is_finite() -> None:
    pose = torch.tensor([[0.0, 0.0, k * math.pi / 2] for k in range(-4, 5)])
    assert bool(render(SCENE.expand(9, -1), pose).isfinite().all())


def test_render_refuses_what_it_cannot_draw() -> None:
    pose = torch.tensor([START_POSE])
    hidden = SCENE.clone()
    hidden[0, SKY_SLOT] = HIDDEN
    with pytest.raises(ValueError, match="cannot be drawn"):
        render(hidden, pose)
    with pytest.raises(ValueError, match="60x64 is not made of"):
        render(SCENE, pose, size=(60, 64))
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(1, 3\)"):
        render(SCENE, pose.repeat(2, 1))
    with pytest.raises(ValueError, match="expected \\[B, 10\\]"):
        render(SCENE[0], pose)
