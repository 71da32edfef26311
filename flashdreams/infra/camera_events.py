"""Camera events of clients: pointer motion, velocities and targets, and how a camera follows them.

Cameras of events have +x to the right, +y up and +z forward; poses of the engine have y down.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_LOOK = 360.0
"""Most degrees that a pointer may turn the camera in one event."""
MAX_DISTANCE = 1e4
"""Largest coordinate in an event, in world units."""
MAX_TRANSITION = 64
"""Most chunks over which a target may be reached."""
MAX_NUMBER = 1e300
"""Larger integers do not fit a float; all allowed values are far smaller."""
FASTER = 4.0
"""Pointer and velocity move the camera at most this many times as fast as a key."""

LOOK_SCHEMA: dict[str, Any] = {
    "title": "Look",
    "type": "array",
    "items": {"type": "number", "minimum": -MAX_LOOK, "maximum": MAX_LOOK},
    "minItems": 2,
    "maxItems": 2,
    "description": "degrees to the right and up since the last event",
}
CAMERA_SCHEMA: dict[str, Any] = {
    "title": "Camera",
    "type": "object",
    "properties": {
        "mode": {"enum": ["velocity", "target"]},
        "translation": {
            "type": "array",
            "items": {"type": "number", "minimum": -MAX_DISTANCE, "maximum": MAX_DISTANCE},
            "minItems": 3,
            "maxItems": 3,
        },
        "rotation": {
            "type": "array",
            "items": {"type": "number", "minimum": -1.1, "maximum": 1.1},
            "minItems": 4,
            "maxItems": 4,
        },
        "transition_chunks": {"type": "integer", "minimum": 0, "maximum": MAX_TRANSITION},
    },
    "required": ["mode"],
    "additionalProperties": False,
    "description": (
        "velocity: a motion per frame in the camera's axes, held until replaced; target: a pose in "
        "the axes of the first frame, reached over some chunks; +x right, +y up, +z forward, "
        "rotation as a quaternion x, y, z, w; roll is ignored"
    ),
}


@dataclass(frozen=True)
class CameraEvent:
    """A motion or a pose, in the engine's axes."""

    is_target: bool
    translation: tuple[float, float, float]
    """x right, y down, z forward, in world units."""
    yaw: float
    """To the right, in radians."""
    pitch: float
    """Up, in radians."""
    chunks: int
    """Over which a target is reached."""


def check_look(look: Any) -> tuple[float, float]:
    """Yaw to the right and pitch up, in radians, of ``[yaw, pitch]`` in degrees.

    Raises:
        ValueError: it is invalid.
    """
    pair = isinstance(look, list | tuple) and len(look) == 2
    if not pair or not all(_is_number(x) and abs(x) <= MAX_LOOK for x in look):
        raise ValueError(
            f"look: must be [degrees to the right, degrees up], both from -{MAX_LOOK:g} to "
            f"{MAX_LOOK:g}; got {look!r}."
        )
    return math.radians(look[0]), math.radians(look[1])


def check_camera(camera: Any) -> CameraEvent:
    """A camera event of JSON values.

    Raises:
        ValueError: it is invalid.
    """
    known = CAMERA_SCHEMA["properties"].keys()
    if not isinstance(camera, Mapping) or not known >= camera.keys():
        raise ValueError(f"camera: takes {', '.join(known)}; got {camera!r}.")
    mode = camera.get("mode")
    translation = camera.get("translation", (0.0, 0.0, 0.0))
    rotation = camera.get("rotation", (0.0, 0.0, 0.0, 1.0))
    chunks = camera.get("transition_chunks", 1)
    if mode not in ("velocity", "target"):
        raise ValueError(f'camera: mode must be "velocity" or "target"; got {mode!r}.')
    if not _are_numbers(translation, 3) or max(map(abs, translation)) > MAX_DISTANCE:
        raise ValueError(
            f"camera: translation must be [x, y, z] within {MAX_DISTANCE:g}; got {translation!r}."
        )
    if not _are_numbers(rotation, 4) or not 0.9 <= math.hypot(*rotation) <= 1.1:
        raise ValueError(
            f"camera: rotation must be a unit quaternion [x, y, z, w]; got {rotation!r}."
        )
    whole = isinstance(chunks, int) and not isinstance(chunks, bool)
    if not whole or not 0 <= chunks <= MAX_TRANSITION:
        raise ValueError(
            f"camera: transition_chunks must be from 0 to {MAX_TRANSITION}; got {chunks!r}."
        )
    x, y, z = translation
    yaw, pitch = _angles(rotation)
    return CameraEvent(mode == "target", (x, -y, z), yaw, pitch, chunks)


def turn_of(pose: Tensor) -> float:
    """Radians to the right that an upright pose ``[4, 4]`` is turned."""
    return math.atan2(float(pose[0, 2]), float(pose[2, 2]))


def turned(pose: Tensor, yaw: float) -> Tensor:
    """An upright pose ``[4, 4]`` turned to the right by some radians."""
    found = pose.clone()
    found[:3, :3] = pose[:3, :3] @ _rotation(yaw, 0.0)
    return found


def pitched(pose: Tensor, pitch: float) -> Tensor:
    """An upright pose ``[4, 4]`` that looks up by some radians; itself where it looks ahead."""
    if pitch == 0.0:
        return pose
    found = pose.clone()
    found[:3, :3] = pose[:3, :3] @ _rotation(0.0, pitch)
    return found


def bounded(value: float, most: float) -> float:
    """The nearest value from ``-most`` to ``most``."""
    return max(-most, min(most, value))


def _rotation(yaw: float, pitch: float) -> Tensor:
    """Camera axes x right, y down, z forward."""
    c, s = math.cos(yaw), math.sin(yaw)
    turn = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64, device="cpu")
    c, s = math.cos(pitch), math.sin(pitch)
    tilt = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64, device="cpu")
    return turn @ tilt


def _angles(rotation: Any) -> tuple[float, float]:
    """Yaw to the right and pitch up of a quaternion in axes with y up: where +z is turned to."""
    length = math.hypot(*rotation)
    x, y, z, w = (part / length for part in rotation)
    forward = (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y))
    return math.atan2(forward[0], forward[2]), math.asin(bounded(forward[1], 1.0))


def _are_numbers(values: Any, count: int) -> bool:
    sequence = isinstance(values, list | tuple) and len(values) == count
    return sequence and all(_is_number(x) for x in values)


def _is_number(x: Any) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and abs(x) < MAX_NUMBER
