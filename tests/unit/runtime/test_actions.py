"""Key presses and the camera paths they lead to."""

from __future__ import annotations

import math

import pytest
import torch

from flashdreams.runtime.actions import (
    MAX_FRAMES,
    KeyMotion,
    hold,
    integrate,
    key_directions,
    parse_actions,
)

MOTION = KeyMotion(move_per_frame=0.5, turn_per_frame_rad=math.radians(6.0))


def test_parse_actions_counts_frames() -> None:
    expected = [{"w"}] * 8 + [{"l"}] * 4 + [{"w", "l"}] * 2 + [{"d"}]
    assert parse_actions("w8 l4,  wl2 , d") == expected
    assert parse_actions("w8 l3,  wl2 , d") != expected


def test_parse_actions_ignores_case_and_empty_text() -> None:
    assert parse_actions("W2") == parse_actions("w w") == [{"w"}] * 2
    assert parse_actions(" ") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w8 x3", "unknown key 'x'"),
        ("w0", "from 1 to"),
        ("w-3", "not a whole number"),
        ("w1.5", "not a whole number"),
        ("w8l4", "not a whole number"),
        ("8w", "does not begin with a key"),
        (f"w{MAX_FRAMES + 1}", "from 1 to"),
        ("w" + "9" * 5000, "from 1 to"),
        (f"w{MAX_FRAMES} d", f"at most {MAX_FRAMES}"),
    ],
)
def test_parse_actions_refuses(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_actions(text)


def test_parse_actions_lists_keys_when_one_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"w \(forward\).*l \(turn right\)"):
        parse_actions("q")


def test_key_directions_cancel_opposites() -> None:
    assert key_directions(frozenset("wdl")) == (1, 1, 1)
    assert key_directions(frozenset("saj")) == (-1, -1, -1)
    assert key_directions(frozenset("wsadjl")) == (0, 0, 0)
    with pytest.raises(ValueError, match="unknown key 'q'"):
        key_directions(frozenset("wq"))


def test_integrate_begins_with_the_identity() -> None:
    poses = integrate([], MOTION)
    assert poses.dtype == torch.float64
    torch.testing.assert_close(poses, torch.eye(4, dtype=torch.float64)[None], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("key", "axis", "sign"), [("w", 2, 1), ("s", 2, -1), ("d", 0, 1), ("a", 0, -1)]
)
def test_integrate_moves_along_the_camera_axes(key: str, axis: int, sign: int) -> None:
    end = integrate(parse_actions(f"{key}4"), MOTION)[-1]
    expected = torch.eye(4, dtype=torch.float64)
    expected[axis, 3] = sign * 4 * MOTION.move_per_frame
    torch.testing.assert_close(end, expected, atol=1e-12, rtol=0)


def test_integrate_turns_right_for_l_and_walks_along_the_new_heading() -> None:
    end = integrate(parse_actions("l15 w2"), MOTION)[-1]
    forward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(end[:3, 2], forward, atol=1e-12, rtol=0)
    torch.testing.assert_close(end[:3, 3], forward, atol=1e-12, rtol=0)
    mirrored = integrate(parse_actions("j15 w2"), MOTION)[-1]
    torch.testing.assert_close(mirrored[:3, 3], -forward, atol=1e-12, rtol=0)


def test_integrate_full_circle_returns() -> None:
    start = integrate(parse_actions("w3 l7"), MOTION)[-1]
    circle = integrate(parse_actions("j60"), MOTION, start=start)
    torch.testing.assert_close(circle[-1], start, atol=1e-12, rtol=0)
    assert not torch.allclose(circle[-2], start, atol=1e-2)


def test_integrate_stays_a_rotation_over_many_frames() -> None:
    rotation = integrate(parse_actions("wl2000"), MOTION)[-1, :3, :3]
    unit = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, unit, atol=1e-11, rtol=0)


def test_integrate_diagonal_is_no_faster() -> None:
    straight, diagonal = (integrate(parse_actions(keys), MOTION)[-1, :3, 3] for keys in ("w", "wd"))
    torch.testing.assert_close(straight.norm(), diagonal.norm(), atol=1e-12, rtol=0)
    assert diagonal[0] > 0.3 and diagonal[2] > 0.3


def test_integrate_collides() -> None:
    def wall(position: torch.Tensor) -> torch.Tensor:
        return position.clamp_max(1.2)

    free = integrate(parse_actions("w6"), MOTION)[:, 2, 3]
    stopped = integrate(parse_actions("w6 s1"), MOTION, collide=wall)[:, 2, 3]
    assert free[-1] == 3.0
    assert stopped.max() == 1.2
    torch.testing.assert_close(stopped[-1].item(), 0.7, atol=1e-12, rtol=0)


def test_integrate_leaves_its_start_alone() -> None:
    start = torch.eye(4)
    poses = integrate(parse_actions("wl3"), MOTION, start=start)
    torch.testing.assert_close(start, torch.eye(4), atol=0, rtol=0)
    torch.testing.assert_close(poses[0], start.double(), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"\(3,\), expected \(4, 4\)"):
        integrate([], MOTION, start=torch.zeros(3))


def test_hold_repeats_the_last_pose_or_cuts() -> None:
    poses = integrate(parse_actions("w2"), MOTION)
    held = hold(poses, 5)
    assert held.shape == (5, 4, 4)
    torch.testing.assert_close(held[:3], poses, atol=0, rtol=0)
    torch.testing.assert_close(held[3:], poses[-1:].expand(2, 4, 4), atol=0, rtol=0)
    assert not torch.equal(held[1], held[2])
    torch.testing.assert_close(hold(poses, 2), poses[:2], atol=0, rtol=0)


def test_hold_refuses_nothing_to_hold() -> None:
    with pytest.raises(ValueError, match="empty"):
        hold(torch.zeros(0, 4, 4), 3)
    with pytest.raises(ValueError, match="num_frames=0"):
        hold(torch.zeros(1, 4, 4), 0)


@pytest.mark.parametrize("speed", [-0.1, math.nan, math.inf])
def test_key_motion_refuses_impossible_speeds(speed: float) -> None:
    with pytest.raises(ValueError, match="move_per_frame"):
        KeyMotion(move_per_frame=speed, turn_per_frame_rad=0.1)


def test_a_method_may_have_one_key() -> None:
    with pytest.raises(ValueError, match=r"Keys: x \(fire\); a number .* as in 'x8'\."):
        parse_actions("y", {"x": "fire"})
    assert parse_actions("x2", {"x": "fire"}) == [{"x"}, {"x"}]
