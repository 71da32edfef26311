"""Key presses as text, and the resulting camera poses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdreams.infra.config import quoted

KEYS = {
    "w": "forward",
    "s": "back",
    "a": "left",
    "d": "right",
    "j": "turn left",
    "l": "turn right",
}
"""Keys and what they do."""
MAX_FRAMES = 100_000
"""Most pixel frames that one text may describe."""
MAX_CHARACTERS = 4 * MAX_FRAMES
"""Longest text that is read."""


@dataclass(frozen=True, kw_only=True)
class KeyMotion:
    """Motion of the camera per pixel frame while a key is held."""

    move_per_frame: float
    """Distance per pixel frame, in world units; diagonal movement is no faster."""
    turn_per_frame_rad: float
    """Turn per pixel frame, in radians."""

    def __post_init__(self) -> None:
        """Refuse speeds that are negative or not finite."""
        for name in ("move_per_frame", "turn_per_frame_rad"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value} is not a speed; give a finite number >= 0")


def parse_actions(text: str, keys: Mapping[str, str] = KEYS) -> list[frozenset[str]]:
    """Read key presses such as ``"w8 l4 wl6 d"``.

    Each word, separated by spaces or commas, is one or more keys held together and a number of
    pixel frames (1 if omitted): ``w8`` walks forward for 8 frames, ``wl6`` walks forward for 6
    while turning right.

    Args:
        text: the key presses; an empty text gives no frames.
        keys: the known keys, and what they do.

    Returns:
        One set of held keys per pixel frame.

    Raises:
        ValueError: an unknown key, a count that is not a whole number >= 1, or more than
            ``MAX_FRAMES`` frames in all.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"actions of {len(text)} characters; at most {MAX_CHARACTERS} are allowed")
    frames: list[frozenset[str]] = []
    for word in re.split(r"[\s,]+", text.strip()):
        if not word:
            continue
        match = re.fullmatch(r"([a-z]+)(.*)", word.lower())
        if match is None:
            raise ValueError(f"{quoted(word)} does not begin with a key. {_usage(keys)}")
        held, count = match.groups()
        for key in held:
            if key not in keys:
                raise ValueError(f"unknown key {key!r} in {quoted(word)}. {_usage(keys)}")
        number = _frame_count(word, count, keys)
        if len(frames) + number > MAX_FRAMES:
            raise ValueError(
                f"{quoted(word)} brings the actions to {len(frames) + number} frames, "
                f"at most {MAX_FRAMES} are allowed"
            )
        frames += [frozenset(held)] * number
    return frames


def integrate(
    actions: Iterable[frozenset[str]],
    motion: KeyMotion,
    start: Tensor | None = None,
    collide: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate key presses to poses of an upright camera.

    In every pixel frame the camera first turns, then moves along its new axes; opposite keys
    cancel.

    Args:
        actions: held keys of each of N pixel frames, as from ``parse_actions``.
        motion: speeds.
        start: ``[4, 4]`` camera-to-world pose of frame 0; None is the identity.
        collide: maps a requested position ``[3]`` float64 to the nearest allowed one; None: all.

    Returns:
        ``[N + 1, 4, 4]`` float64 camera-to-world poses, camera axes x right, y down, z forward: the
        start pose, then the pose after each frame's keys.

    Raises:
        ValueError: ``start`` is not ``[4, 4]``, or an action holds an unknown key.
    """
    if start is not None and start.shape != (4, 4):
        raise ValueError(f"start has shape {tuple(start.shape)}, expected (4, 4)")
    pose = (
        torch.eye(4, dtype=torch.float64, device="cpu")
        if start is None
        else start.detach().double().cpu()
    )
    poses = [pose]
    for keys in actions:
        poses.append(move(poses[-1], keys, motion, collide))
    return torch.stack(poses)


def move(
    pose: Tensor,
    keys: frozenset[str],
    motion: KeyMotion,
    collide: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The pose after one pixel frame of held keys; arguments as for `integrate`.

    Args:
        pose: ``[4, 4]`` float64 camera-to-world.
        keys: held keys.
        motion: speeds.
        collide: maps a position ``[3]`` float64 to the nearest allowed one; None allows all.

    Returns:
        ``[4, 4]`` float64.

    Raises:
        ValueError: an unknown key.
    """
    forward, right, turn = key_directions(keys)
    pose = pose.clone()
    pose[:3, :3] = pose[:3, :3] @ _yaw(turn * motion.turn_per_frame_rad)
    distance = motion.move_per_frame / max(1.0, math.hypot(forward, right))
    position = pose[:3, 3] + distance * (right * pose[:3, 0] + forward * pose[:3, 2])
    pose[:3, 3] = position if collide is None else collide(position)
    return pose


def hold(poses: Tensor, num_frames: int) -> Tensor:
    """Extend a camera path to a given length with its last pose, or cut it.

    Args:
        poses: ``[F, 4, 4]`` with F >= 1 (any trailing shape).
        num_frames: wanted pixel frames, at least 1.

    Returns:
        ``[num_frames, 4, 4]``, same dtype.

    Raises:
        ValueError: no pose, or ``num_frames`` below 1.
    """
    if len(poses) < 1:
        raise ValueError("there is no pose to hold: poses is empty, at least 1 is needed")
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    index = torch.arange(num_frames, device=poses.device, dtype=torch.int64).clamp_max(
        len(poses) - 1
    )
    return poses[index]


def key_directions(keys: frozenset[str]) -> tuple[int, int, int]:
    """Sum up held keys.

    Args:
        keys: held keys.

    Returns:
        (forward, right, turn right), each -1, 0 or 1; opposite keys cancel.

    Raises:
        ValueError: an unknown key.
    """
    check_keys(keys)
    return (
        ("w" in keys) - ("s" in keys),
        ("d" in keys) - ("a" in keys),
        ("l" in keys) - ("j" in keys),
    )


def check_keys(keys: Set[str], known: Mapping[str, str] = KEYS) -> None:
    """Refuse unknown keys.

    Raises:
        ValueError: names one, and lists the keys.
    """
    unknown = sorted(keys - known.keys())
    if unknown:
        raise ValueError(f"unknown key {quoted(unknown[0])}. {_listed(known)}.")


def _yaw(angle_rad: float) -> Tensor:
    """Rotation [3, 3] float64 that turns a camera (x right, y down, z forward) to the right."""
    sine, cosine = math.sin(angle_rad), math.cos(angle_rad)
    return torch.tensor(
        [[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]],
        dtype=torch.float64,
        device="cpu",
    )


def _frame_count(word: str, count: str, keys: Mapping[str, str]) -> int:
    """Number of frames after the keys of a word."""
    if not count:
        return 1
    if not re.fullmatch(r"[0-9]+", count):
        raise ValueError(
            f"{quoted(count)} in {quoted(word)} is not a whole number of frames >= 1. "
            f"{_usage(keys)}"
        )
    # Longer than any allowed count: refused before int() has to read it.
    number = int(count) if len(count) <= 9 else 10**9
    if not 1 <= number <= MAX_FRAMES:
        raise ValueError(
            f"{quoted(count)} in {quoted(word)}: the frames of a key go from 1 to {MAX_FRAMES}"
        )
    return number


def _usage(keys: Mapping[str, str]) -> str:
    """One line that says how keys are written as text."""
    one, *rest = keys
    example = f"{one}8 {rest[-1]}4 {one}{rest[-1]}6" if rest else f"{one}8"
    return f"{_listed(keys)}; a number after them is the frames to hold, as in '{example}'."


def _listed(keys: Mapping[str, str]) -> str:
    return "Keys: " + ", ".join(f"{key} ({what})" for key, what in keys.items())
