"""Camera paths and rays against hand-computed cases and an independent formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from flashdreams.integrations.lingbot_world.camera import (
    camera_rays,
    check_intrinsics,
    check_poses,
    chunk_poses,
    clip_poses,
    invert_poses,
    pick_frames,
    pixel_frames,
    relative_poses,
    resample_intrinsics,
    resample_poses,
    scale_intrinsics,
    to_tokens,
    whole_chunks,
)

ATOL_FLOAT64 = 1e-12
ATOL_FLOAT32 = 1e-6


def rotation(axis: tuple[float, float, float], angle: float) -> torch.Tensor:
    """Rodrigues' formula, float64."""
    x, y, z = (value / math.hypot(*axis) for value in axis)
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    return eye + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def pose(turn: torch.Tensor | None = None, position=(0.0, 0.0, 0.0)) -> torch.Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    if turn is not None:
        matrix[:3, :3] = turn
    matrix[:3, 3] = torch.tensor(position, dtype=torch.float64)
    return matrix


def winding_path(frames: int, seed: int = 0) -> torch.Tensor:
    """A smooth path that turns about all axes and moves in all directions."""
    draw = torch.Generator().manual_seed(seed)
    step = torch.randn(6, generator=draw, dtype=torch.float64) * 0.1
    poses = [pose(rotation((1, 2, 3), 0.7), (3.0, -1.0, 2.0))]
    for t in range(frames - 1):
        wobble = step * (1 + 0.5 * math.sin(t))
        turn = rotation(tuple(wobble[:3].tolist()), float(wobble[:3].norm()))
        poses.append(poses[-1] @ pose(turn, wobble[3:].tolist()))
    return torch.stack(poses)


def close(a, b, atol=ATOL_FLOAT64):
    torch.testing.assert_close(a, b.to(a), rtol=0, atol=atol)


def test_a_camera_that_rests_makes_no_motion():
    still = winding_path(1).repeat(9, 1, 1)
    for steps in (relative_poses(still), clip_poses(still, 3), chunk_poses(still[:3], None, 2.0)):
        close(steps, torch.eye(4).expand_as(steps), ATOL_FLOAT32)


def test_a_pure_turn_is_the_same_turn_every_frame():
    poses = torch.stack([pose(rotation((0, 1, 0), 0.1 * t)) for t in range(9)])
    steps = clip_poses(poses, 3)
    close(steps[0], torch.eye(4))
    for step in steps[1:]:
        close(step, pose(rotation((0, 1, 0), 0.4)), ATOL_FLOAT32)


def test_a_pure_walk_is_seen_in_the_cameras_own_axes():
    """Walking along world x while looking along it is walking forward: camera z."""
    looking_right = rotation((0, 1, 0), math.pi / 2)
    poses = torch.stack([pose(looking_right, (0.5 * t, 0, 0)) for t in range(9)])
    close(relative_poses(poses)[1:], pose(position=(0, 0, 0.5)).expand(8, 4, 4))
    close(clip_poses(poses, 3)[1:], pose(position=(0, 0, 1)).expand(2, 4, 4), ATOL_FLOAT32)
    streamed = chunk_poses(poses[::4], None, world_scale=0.25)
    close(streamed[1:], pose(position=(0, 0, 0.5)).expand(2, 4, 4), ATOL_FLOAT32)


def test_a_full_circle_returns():
    step = pose(rotation((0, 1, 0), 2 * math.pi / 24), (0, 0, 0.3))
    circle = [winding_path(1)[0]]
    for _ in range(24):
        circle.append(circle[-1] @ step)
    close(circle[-1], circle[0])
    product = torch.eye(4, dtype=torch.float64)
    for motion in relative_poses(torch.stack(circle)):
        product = product @ motion
    close(product, torch.eye(4))


def test_relative_poses_equal_a_solved_linear_system():
    poses = winding_path(7)
    expected = torch.linalg.solve(poses[:-1], poses[1:])
    close(relative_poses(poses)[1:], expected)
    close(invert_poses(poses), torch.linalg.inv(poses))
    transposed = poses[:-1].mT @ poses[1:]  # negative control: no inverse
    assert (relative_poses(poses)[1:] - transposed).abs().max() > 0.1


def test_resampling_keeps_what_it_hits():
    poses = winding_path(9)
    close(resample_poses(poses, 9), poses)
    close(resample_poses(poses, 3), poses[::4])
    close(resample_poses(poses, 1), poses[:1])


def test_resampling_between_frames_turns_and_moves_evenly():
    poses = torch.stack(
        [pose(rotation((1, 1, 0), a), (a, 0, -a)) for a in (0.0, 0.4, 0.8, 1.2, 1.6)]
    )
    quarters = [pose(rotation((1, 1, 0), a), (a, 0, -a)) for a in (0.0, 1.6 / 3, 3.2 / 3, 1.6)]
    close(resample_poses(poses, 4), torch.stack(quarters))


def test_resampling_takes_the_shorter_arc_and_survives_half_turns():
    turns = [rotation((0, 1, 0), a) for a in (3.0, 3.2, 3.4)]  # through pi, where signs flip
    middle = resample_poses(torch.stack([pose(turn) for turn in turns]), 5)
    close(middle[1], pose(rotation((0, 1, 0), 3.1)))
    close(middle[3], pose(rotation((0, 1, 0), 3.3)))
    about_x = torch.stack([pose(rotation((1, 0, 0), a)) for a in (math.pi, math.pi)])
    close(resample_poses(about_x, 3)[1], about_x[0])


def test_25_poses_become_6_latent_frames_over_the_whole_clip():
    assert whole_chunks(25, 3) == 2
    poses = torch.stack([pose(position=(0.0, 0.0, float(t))) for t in range(25)])
    close(resample_poses(poses, 6)[:, 2, 3], torch.arange(6).double() * 4.8)


@pytest.mark.parametrize(
    ("poses", "chunks"), [(0, 0), (1, 0), (8, 0), (9, 1), (20, 1), (21, 2), (33, 3), (561, 47)]
)
def test_chunks_that_a_path_suffices_for(poses, chunks):
    assert whole_chunks(poses, 3) == chunks
    assert chunks == 0 or pixel_frames(3 * chunks) <= poses < pixel_frames(3 * chunks + 3)


def test_the_longest_step_of_a_clip_is_one():
    steps = clip_poses(winding_path(45), 12)
    assert steps.dtype == torch.float32
    close(steps[:, :3, 3].norm(dim=1).max(), torch.tensor(1.0), ATOL_FLOAT32)


def test_picked_frames_are_every_fourth_of_the_rollout():
    frames, start = [], 0
    for i in range(4):
        end = pixel_frames(3 * (i + 1))
        frames += list(range(start, end))[pick_frames(i)]
        start = end
    assert frames == list(range(0, 48, 4))


def test_streamed_chunks_equal_the_whole_clip():
    poses = winding_path(pixel_frames(12))
    whole = clip_poses(poses, 12)
    motions = relative_poses(poses[::4])
    scale = float(1 / motions[:, :3, 3].norm(dim=1).max())
    chunks, start, anchor = [], 0, None
    for i in range(4):
        step = poses[start : pixel_frames(3 * (i + 1))]
        chunks.append(chunk_poses(step[pick_frames(i)], anchor, scale))
        start, anchor = start + len(step), step[-1]
    close(torch.cat(chunks), whole, ATOL_FLOAT32)
    forgotten = chunk_poses(poses[12:24][pick_frames(1)], None, scale)  # negative control
    assert (forgotten - whole[3:6]).abs().max() > 1e-2


def reference_rays(poses, intrinsics, height, width):
    """Origins and directions pixel by pixel, through the inverted camera matrix, float64."""
    rays = torch.zeros(len(poses), 6, height, width, dtype=torch.float64)
    for t, (matrix, (fx, fy, cx, cy)) in enumerate(zip(poses, intrinsics.tolist(), strict=True)):
        camera = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                pixel = torch.tensor([column + 0.5, row + 0.5, 1], dtype=torch.float64)
                target = matrix @ torch.cat([torch.linalg.solve(camera, pixel), torch.ones(1)])
                direction = target[:3] - matrix[:3, 3]
                rays[t, :3, row, column] = matrix[:3, 3]
                rays[t, 3:, row, column] = direction / direction.norm()
    return rays


def test_rays_equal_the_inverted_camera_matrix():
    poses = winding_path(2)
    intrinsics = torch.tensor([[5.0, 6.0, 3.2, 1.7], [7.0, 4.0, 2.9, 2.2]], dtype=torch.float64)
    expected = reference_rays(poses, intrinsics, 4, 6)
    close(camera_rays(poses, intrinsics, 4, 6), expected)
    close(camera_rays(poses, intrinsics, 4, 6, with_origins=False), expected[:, 3:])
    close(camera_rays(poses.float(), intrinsics, 4, 6), expected, ATOL_FLOAT32)
    shifted = intrinsics + torch.tensor([0, 0, 0.5, 0.5])  # negative control: pixel corners
    assert (camera_rays(poses, shifted, 4, 6) - expected).abs().max() > 0.05


def test_the_ray_through_the_principal_point_is_the_view():
    rays = camera_rays(torch.eye(4)[None], torch.tensor([[2.0, 2.0, 1.5, 0.5]]), 1, 3)
    close(rays[0, :, 0, 1], torch.tensor([0, 0, 0, 0, 0, 1.0]))


def test_intrinsics_are_resampled_linearly():
    rows = torch.tensor([[100.0, 200.0, 50.0, 40.0], [130.0, 210.0, 56.0, 40.0]])
    found = resample_intrinsics(rows, 4)
    close(found, torch.lerp(rows[:1], rows[1:], torch.arange(4)[:, None] / 3), ATOL_FLOAT32 * 1e2)
    assert found.dtype == torch.float32 and torch.equal(found[[0, 3]], rows)
    assert torch.equal(resample_intrinsics(rows[:1], 3), rows[:1].expand(3, 4))
    assert not torch.equal(found[1], rows[0])  # negative control: no nearest row


def test_intrinsics_follow_the_picture_size():
    scaled = scale_intrinsics(torch.tensor([[480.0, 480.0, 416.0, 240.0]]), 240, 1664)
    close(scaled, torch.tensor([[960.0, 240.0, 832.0, 120.0]]))


def test_tokens_go_channel_then_pixel_then_patch():
    frames, channels, height, width = 2, 3, 16, 32
    pixels = torch.arange(frames * channels * height * width).view(frames, channels, height, width)
    tokens = to_tokens(pixels.float()).view(frames, 1, 2, channels, 8, 8, 2, 2)
    for t, token, c, i, j, a, b in [
        (0, 0, 0, 0, 0, 0, 0),
        (1, 1, 2, 3, 5, 1, 0),
        (0, 1, 1, 7, 2, 0, 1),
    ]:
        row, column = 8 * a + i, 16 * token + 8 * b + j
        assert tokens[t, 0, token, c, i, j, a, b] == pixels[t, c, row, column]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0], r"must be \[frames, 4, 4\]; got \[4, 4\]"),
        (lambda p: p[:, :3], r"got \[5, 3, 4\]"),
        (lambda p: p[:0], r"got \[0, 4, 4\]"),
        (lambda p: p.long(), "must be floating point"),
        (lambda p: p.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(math.nan).double()),
         "pose of frame 3 is not finite"),
        (lambda p: torch.cat([p[:2], 2 * p[2:]]), "last row of frame 2 is 0, 0, 0, 2"),
        (lambda p: torch.cat([p[:4], p[4:] * torch.tensor([[2.0], [1], [1], [1]])]),
         "frame 4 is not a rotation: R R.T is off 1 by"),
        (lambda p: torch.cat([p[:1], p[1:] * torch.tensor([[-1.0], [1], [1], [1]])]),
         "frame 1 is not a rotation.*determinant is -1"),
        (lambda p: torch.cat([p[:3], p[3:] + F.pad(torch.full((1, 3, 1), 1e19), (3, 0, 0, 1))]),
         r"position of frame 3 has a coordinate of 1e\+19; at most 1e\+12"),
    ],
)  # fmt: skip
def test_no_camera_path_is_refused(change, message):
    poses = winding_path(5)
    check_poses(poses)
    with pytest.raises(ValueError, match=message):
        check_poses(change(poses))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k[:4], "4 rows of intrinsics for 5 poses"),
        (lambda k: k[:, :3], r"floating point \[frames, 4\]"),
        (lambda k: k.index_fill(0, torch.tensor(2), math.inf), "frame 2 are not finite"),
        (lambda k: k.index_fill(0, torch.tensor(1), 0.0), "frame 1 are 0 and 0; they must be pos"),
        (lambda k: k.index_fill(1, torch.tensor(2), -1e30), "frame 0 have 1e.30 pixels; at most"),
    ],
)
def test_no_intrinsics_are_refused(change, message):
    intrinsics = torch.tensor([[477.0, 477.0, 416.0, 240.0]]).repeat(5, 1)
    check_intrinsics(intrinsics, 5)
    with pytest.raises(ValueError, match=message):
        check_intrinsics(change(intrinsics), 5)
