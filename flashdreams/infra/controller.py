"""Controllers, which turn user events into control input."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.camera_events import (
    CAMERA_SCHEMA,
    FASTER,
    LOOK_SCHEMA,
    bounded,
    check_camera,
    check_look,
    pitched,
    turn_of,
    turned,
)
from flashdreams.parallel.plan import state
from flashdreams.runtime.actions import KEYS, KeyMotion, check_keys, move


@dataclass(frozen=True)
class Event:
    """A user event."""

    frame: int
    """Pixel frame within the chunk from which it applies; 0 for events before the chunk."""
    values: Mapping[str, Any]
    """Values that the controller accepts, by name; JSON."""


class Controller(ABC):
    """Turns events into the control input of one AR step.

    A controller holds no state of a rollout: its state is plain data that
    ``new_state`` makes and ``advance`` changes. It is kept in ``cache.controller`` and saved with
    the rest of the rollout.
    """

    @abstractmethod
    def accepts(self) -> dict[str, Any]:
        """JSON Schema of the values of events; the live page draws its controls from it."""

    @abstractmethod
    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse invalid values of an event.

        Raises:
            ValueError: states what is wrong and what is allowed.
        """

    @abstractmethod
    def new_state(self) -> Any:
        """State at the beginning of a rollout: a dataclass whose fields declare their styles."""

    @abstractmethod
    def advance(self, state: Any, events: Sequence[Event], frames: range) -> Any:
        """The control input of the next AR step.

        Args:
            state: from ``new_state``; changed in place.
            events: in the order of their frames.
            frames: the pixel frames of the chunk, counted from the beginning of the rollout.

        Returns:
            ``input`` of `StreamInferencePipeline.generate`.
        """


@dataclass
class KeyState:
    """Held keys at the end of a chunk."""

    keys: str = state("host", default="")
    """One letter each."""


class KeyController(Controller):
    """Held keys, one pixel frame at a time, for a network that reads keys instead of poses.

    An event ``{"keys": "wa"}`` sets the keys that are held from its frame on.
    """

    def __init__(
        self,
        to_input: Callable[[Sequence[frozenset[str]]], Any],
        keys: Mapping[str, str] = KEYS,
    ) -> None:
        """Prepare.

        Args:
            to_input: the held keys of F pixel frames to the control input.
            keys: the known keys, one letter each, and what they do.
        """
        self.to_input = to_input
        self.keys = keys

    def accepts(self) -> dict[str, Any]:
        """See the contract."""
        return event_schema({"keys": keys_schema(self.keys)})

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        if values.keys() != {"keys"} or not isinstance(values["keys"], str):
            raise ValueError(
                f'This world takes {{"keys": "{"".join(self.keys)[:1]}"}}, the held keys; '
                f"got {dict(values)!r}."
            )
        check_keys(set(values["keys"]), self.keys)

    def new_state(self) -> KeyState:
        """No key is held."""
        return KeyState()

    def advance(self, state: KeyState, events: Sequence[Event], frames: range) -> Any:
        """Apply the events over the frames of a chunk; see the contract."""
        held, waiting = [], list(events)
        for offset in range(len(frames)):
            while waiting and waiting[0].frame <= offset:
                state.keys = waiting.pop(0).values["keys"]
            held.append(frozenset(state.keys))
        return self.to_input(held)


def keys_schema(keys: Mapping[str, str]) -> dict[str, Any]:
    """JSON Schema of held keys.

    Args:
        keys: the known keys, one letter each, and what they do.
    """
    return {
        "title": "Keys",
        "type": "string",
        "pattern": f"^[{''.join(keys)}]*$",
        "description": ", ".join(f"{key}: {what}" for key, what in keys.items()),
        "x-keys": dict(keys),
    }


def event_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of an event that has at least one of these values."""
    return {
        "type": "object",
        "properties": dict(properties),
        "minProperties": 1,
        "additionalProperties": False,
    }


@dataclass
class CameraState:
    """Pose of a camera, and what moves it."""

    pose: Tensor = state("whole")
    """``[4, 4]`` float64 on the CPU, camera-to-world, of the last pixel frame; upright."""
    held: str = state("host", default="")
    """The held keys, one letter each."""
    pitch: float = state("host", default=0.0)
    """Upward pitch in radians."""
    velocity: list[float] = state("host", default_factory=list)
    """x, y, z, yaw and pitch per pixel frame, in the camera's upright axes; empty: none."""
    target: list[float] = state("host", default_factory=list)
    """x, y, z, yaw and pitch in the axes of the start pose; empty: none."""
    frames_left: int = state("host", default=0)
    """Pixel frames until the target is reached."""


class KeyCamera(Controller):
    """A camera that held keys move and turn, one pixel frame at a time.

    Frame 0 shows the start pose; every later frame follows one frame of held keys. An event
    ``{"keys": "wl"}`` sets the keys that are held from its frame on. ``{"look": [yaw, pitch]}``, in
    degrees to the right and up, is the pointer motion since the last event, spread over the
    rest of the chunk. ``{"camera": {"mode": ..., ...}}`` gives it a velocity or a target, as
    `flashdreams.infra.camera_events` describes. An event may have several of these. The camera
    does not roll, and pointer and camera events move it at most
    `flashdreams.infra.camera_events.FASTER` times as fast as keys.
    """

    def __init__(
        self,
        motion: KeyMotion,
        to_input: Callable[[Tensor, Sequence[frozenset[str]]], Any],
        start: Tensor | None = None,
        collide: Callable[[Tensor], Tensor] | None = None,
        max_pitch: float = 0.0,
    ) -> None:
        """Prepare.

        Args:
            motion: speeds.
            to_input: poses ``[F, 4, 4]`` float64 and the held keys of F frames to the control
                input.
            start: ``[4, 4]`` pose of frame 0; None is the identity.
            collide: maps a position ``[3]`` float64 to the nearest allowed one; None allows all.
            max_pitch: largest pitch in degrees; 0: none.
        """
        self.motion = motion
        self.to_input = to_input
        self.start = (
            torch.eye(4, dtype=torch.float64, device="cpu")
            if start is None
            else start.double().cpu()
        )
        self.collide = collide
        self.max_pitch = math.radians(max_pitch)

    def accepts(self) -> dict[str, Any]:
        """See the contract."""
        return event_schema(
            {"keys": keys_schema(KEYS), "look": LOOK_SCHEMA, "camera": CAMERA_SCHEMA}
        )

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        keys = values.get("keys", "")
        if not values or not {"keys", "look", "camera"} >= values.keys():
            raise ValueError(
                f'A camera takes {{"keys": "wl"}}, the held keys, "look" and "camera"; '
                f"got {values!r}."
            )
        if not isinstance(keys, str):
            raise ValueError(f'keys: must be the held keys, such as "wl"; got {keys!r}.')
        check_keys(set(keys))
        if "look" in values:
            check_look(values["look"])
        if "camera" in values:
            check_camera(values["camera"])

    def new_state(self) -> CameraState:
        """The start pose, no key held."""
        return CameraState(self.start.clone())

    def advance(self, state: CameraState, events: Sequence[Event], frames: range) -> Any:
        """Apply the events over the frames of a chunk; see the contract."""
        poses, held, waiting = [], [], list(events)
        yaw, pitch = 0.0, 0.0
        for offset, frame in enumerate(frames):
            while waiting and waiting[0].frame <= offset:
                look = self._take(state, waiting.pop(0).values, len(frames))
                yaw, pitch = yaw + look[0], pitch + look[1]
            keys = frozenset(state.held) if frame > 0 else frozenset()
            if keys:
                state.pose = move(state.pose, keys, self.motion, self.collide)
            if frame > 0:
                left = len(frames) - offset
                self._turn(state, yaw / left, pitch / left)
                yaw, pitch = yaw - yaw / left, pitch - pitch / left
                self._follow(state)
            poses.append(pitched(state.pose, state.pitch))
            held.append(keys)
        self._turn(state, yaw, pitch)  # left over if frame 0 is the whole chunk
        return self.to_input(torch.stack(poses), held)

    def _take(
        self, state: CameraState, values: Mapping[str, Any], frames: int
    ) -> tuple[float, float]:
        """Apply an event; returns the yaw and pitch of its pointer."""
        state.held = values.get("keys", state.held)
        if "camera" in values:
            event = check_camera(values["camera"])
            told = [*event.translation, event.yaw, event.pitch]
            state.velocity, state.target = ([], told) if event.is_target else (told, [])
            state.frames_left = max(1, event.chunks * frames)
        return check_look(values["look"]) if "look" in values else (0.0, 0.0)

    def _turn(self, state: CameraState, yaw: float, pitch: float) -> None:
        most = FASTER * self.motion.turn_per_frame_rad
        if yaw:
            state.pose = turned(state.pose, bounded(yaw, most))
        if pitch:
            state.pitch = bounded(state.pitch + bounded(pitch, most), self.max_pitch)

    def _follow(self, state: CameraState) -> None:
        """One frame of the camera's velocity, or towards its target."""
        if state.velocity:
            step = torch.tensor(state.velocity[:3], dtype=torch.float64, device="cpu")
            self._shift(state, state.pose[:3, :3] @ step)
            self._turn(state, *state.velocity[3:])
        if not state.target:
            return
        place = torch.tensor([*state.target[:3], 1.0], dtype=torch.float64, device="cpu")
        self._shift(state, ((self.start @ place)[:3] - state.pose[:3, 3]) / state.frames_left)
        yaw = turn_of(self.start) + state.target[3] - turn_of(state.pose)
        yaw = (yaw + math.pi) % (2 * math.pi) - math.pi  # the shorter way
        pitch = state.target[4] - state.pitch
        self._turn(state, yaw / state.frames_left, pitch / state.frames_left)
        state.frames_left -= 1
        if state.frames_left == 0:
            state.target = []

    def _shift(self, state: CameraState, step: Tensor) -> None:
        most, length = FASTER * self.motion.move_per_frame, float(step.norm())
        if length == 0.0:
            return
        position = state.pose[:3, 3] + step * min(1.0, most / length)
        state.pose = state.pose.clone()
        state.pose[:3, 3] = position if self.collide is None else self.collide(position)
