"""What moves a camera beside keys: pointer, velocity, target; poses float64, 1e-9."""

import math

import pytest
import torch

from flashdreams.infra.controller import Event, KeyCamera, KeyController
from flashdreams.runtime.actions import KeyMotion

MOTION = KeyMotion(move_per_frame=0.5, turn_per_frame_rad=math.radians(10))


def follow(*told, frames=4, chunks=1, max_pitch=60.0, **options):
    """Poses ``[chunks * frames, 4, 4]`` after frame 0, of events in the first chunk."""
    camera = KeyCamera(MOTION, lambda poses, held: poses, max_pitch=max_pitch, **options)
    state = camera.new_state()
    for event in told:
        camera.check(event.values)
    found = [
        camera.advance(state, told if i == 0 else (), range(1 + i * frames, 1 + (i + 1) * frames))
        for i in range(chunks)
    ]
    return torch.cat(found)


def angles(pose):
    """Degrees to the right and up."""
    right = math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
    return right, math.degrees(math.asin(-pose[1, 2]))


def camera(mode, translation=(0, 0, 0), rotation=(0, 0, 0, 1), **more):
    values = {"mode": mode, "translation": list(translation), "rotation": list(rotation), **more}
    return Event(0, {"camera": values})


def test_pointer_turns_the_camera_by_its_degrees_over_the_chunk():
    poses = follow(Event(0, {"look": [20, 8]}))
    assert [angles(pose) for pose in poses] == [
        pytest.approx((5 * i, 2 * i), abs=1e-9) for i in (1, 2, 3, 4)
    ]
    late = follow(Event(2, {"look": [20, 8]}))
    assert angles(late[1]) == (0, 0) and angles(late[3]) == pytest.approx((20, 8), abs=1e-9)
    assert torch.linalg.det(poses[-1, :3, :3]) == pytest.approx(1, abs=1e-9)


def test_pointer_adds_up_and_is_bounded():
    two = follow(Event(0, {"look": [8, 0]}), Event(0, {"look": [8, 0]}))
    assert angles(two[-1])[0] == pytest.approx(16, abs=1e-9)
    fast = follow(Event(0, {"look": [360, 360]}))
    assert angles(fast[0]) == pytest.approx((40, 40), abs=1e-9)
    assert angles(fast[-1]) == pytest.approx((160, 60), abs=1e-9)


def test_pointer_motion_before_the_only_frame_of_a_chunk_is_seen_in_the_next():
    """Methods of one latent frame per chunk begin with a chunk of frame 0, the start pose."""
    camera = KeyCamera(MOTION, lambda poses, held: poses, max_pitch=60.0)
    state = camera.new_state()
    first = camera.advance(state, [Event(0, {"look": [20, 8]})], range(0, 1))
    assert angles(first[0]) == (0, 0)
    rest = camera.advance(state, (), range(1, 5))
    assert [angles(pose) for pose in rest] == [pytest.approx((20, 8), abs=1e-9)] * 4
    whole = camera.new_state()  # as fast as in a chunk that frame 0 is a part of
    poses = camera.advance(whole, [Event(0, {"look": [360, 0]})], range(0, 1))
    poses = camera.advance(whole, (), range(1, 2))
    assert angles(poses[0])[0] == pytest.approx(40, abs=1e-9)


def test_world_without_pitch_turns_alone():
    assert angles(follow(Event(0, {"look": [20, 20]}), max_pitch=0.0)[-1]) == pytest.approx((20, 0))


def test_keys_walk_where_the_pointer_has_turned_and_stay_level():
    poses = follow(Event(0, {"look": [90, 30], "keys": ""}), chunks=2)
    assert angles(poses[-1]) == pytest.approx((90, 30), abs=1e-9)
    walked = follow(Event(0, {"look": [90, 30]}), Event(3, {"keys": "w"}), chunks=2)
    assert walked[-1, 0, 3] - walked[3, 0, 3] == pytest.approx(4 * 0.5, abs=1e-9)
    assert walked[-1, 1, 3] == 0


def test_keys_alone_give_the_same_bits_as_before():
    from flashdreams.runtime.actions import integrate, parse_actions

    poses = follow(Event(0, {"keys": "wl"}), frames=4)
    assert torch.equal(poses, integrate(parse_actions("wl4"), MOTION)[1:])


def test_velocity_holds_until_it_is_replaced():
    poses = follow(camera("velocity", (0, 0.1, 0.2)), chunks=3)
    assert torch.allclose(poses[-1, :3, 3], torch.tensor([0, -1.2, 2.4], dtype=torch.float64))
    half = math.radians(5) / 2
    turning = follow(camera("velocity", rotation=(0, math.sin(half), 0, math.cos(half))))
    assert angles(turning[-1]) == pytest.approx((20, 0), abs=1e-9)
    fast = follow(camera("velocity", (0, 0, 100)))
    assert fast[0, 2, 3] == pytest.approx(2.0)


def test_target_is_reached_over_its_chunks_and_held():
    quarter = math.sqrt(0.5)
    told = camera("target", (2, 1, 3), (0, quarter, 0, quarter), transition_chunks=2)
    poses = follow(told, chunks=3)
    there = torch.tensor([2, -1, 3], dtype=torch.float64)
    assert torch.allclose(poses[3, :3, 3], there / 2)
    for pose in poses[7:]:
        assert torch.allclose(pose[:3, 3], there)
        assert angles(pose) == pytest.approx((90, 0), abs=1e-9)


def test_target_is_in_the_axes_of_the_first_frame():
    start = torch.eye(4, dtype=torch.float64)
    start[0, 3] = 5
    start[:3, :3] = torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # looks to the right
    poses = follow(camera("target", (0, 0, 2)), start=start)
    assert torch.allclose(poses[-1, :3, 3], torch.tensor([7, 0, 0], dtype=torch.float64))


def test_collisions_hold_for_all_that_moves():
    poses = follow(camera("velocity", (0, 0, 1)), collide=lambda p: p.clamp(-1.5, 1.5))
    assert poses[-1, 2, 3] == 1.5


@pytest.mark.parametrize(
    "values",
    [
        {"look": [1]},
        {"look": [1, float("nan")]},
        {"look": [1, True]},
        {"look": [400, 0]},
        {"camera": {}},
        {"camera": {"mode": "fly"}},
        {"camera": {"mode": "target", "rotation": [0, 0, 0, 0]}},
        {"camera": {"mode": "target", "translation": [0, 0]}},
        {"camera": {"mode": "target", "transition_chunks": 1.5}},
        {"camera": {"mode": "target", "speed": 3}},
        {"keys": "q"},
        {"keys": None},
        {"zoom": 1},
        {},
    ],
)
def test_events_that_are_none_are_refused(values):
    with pytest.raises(ValueError):
        KeyCamera(MOTION, lambda poses, held: poses).check(values)


def test_keys_need_no_camera():
    held = KeyController(list, {"w": "jump", "z": "turn"})
    state, at = held.new_state(), [Event(1, {"keys": "wz"}), Event(2, {"keys": "z"})]
    assert held.advance(state, at, range(0, 3)) == [set(), {"w", "z"}, {"z"}]
    assert held.advance(state, [], range(3, 5)) == [{"z"}, {"z"}]
    assert held.advance(held.new_state(), [], range(3, 4)) == [set()]  # negative control
    assert held.accepts()["properties"]["keys"]["x-keys"] == {"w": "jump", "z": "turn"}


@pytest.mark.parametrize("values", [{}, {"keys": 1}, {"keys": "a"}, {"keys": "w", "look": [0, 0]}])
def test_keys_without_a_camera_refuse_other_values(values):
    controller = KeyController(list, {"w": "jump", "z": "turn"})
    controller.check({"keys": "wz"})
    with pytest.raises(ValueError, match=r'takes \{"keys": "w"\}|unknown key .a.\. Keys: w \(jump'):
        controller.check(values)
