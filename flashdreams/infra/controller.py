"""Controllers: what steers a rollout, and the control input that it leads to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams.parallel.plan import state
from flashdreams.runtime.actions import KEYS, KeyMotion, check_keys, move


@dataclass(frozen=True)
class Event:
    """Something that a user did."""

    frame: int
    """Pixel frame within the chunk from which it holds; 0 for what happened before the chunk."""
    values: Mapping[str, Any]
    """What the controller accepts, by name; JSON values."""


class Controller(ABC):
    """Turns events into the control input of one AR step.

    A controller holds no state of a rollout: what it has to remember is plain data that
    ``new_state`` makes and ``advance`` changes. It is kept in ``cache.controller`` and saved with
    the rest of the rollout.
    """

    @abstractmethod
    def accepts(self) -> dict[str, Any]:
        """What events may hold, as a JSON Schema of their values; pages are drawn from it."""

    @abstractmethod
    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse the values of an event.

        Raises:
            ValueError: says what is wrong, and what is allowed.
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
class CameraState:
    """Where a camera is that keys steer, and which keys are held."""

    pose: Tensor = state("whole")
    """``[4, 4]`` float64 on the CPU, camera-to-world, of the last pixel frame."""
    held: str = state("host", default="")
    """The held keys, one letter each."""


class KeyCamera(Controller):
    """A camera that held keys move and turn, one pixel frame at a time.

    Frame 0 shows the start pose; every later frame follows one frame of held keys. An event
    ``{"keys": "wl"}`` says which keys are held from its frame on.
    """

    def __init__(
        self,
        motion: KeyMotion,
        to_input: Callable[[Tensor, Sequence[frozenset[str]]], Any],
        start: Tensor | None = None,
        collide: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Prepare.

        Args:
            motion: speeds.
            to_input: poses ``[F, 4, 4]`` float64 and the held keys of F frames to the control
                input.
            start: ``[4, 4]`` pose of frame 0; None is the identity.
            collide: maps a position ``[3]`` float64 to the nearest allowed one; None allows all.
        """
        self.motion = motion
        self.to_input = to_input
        self.start = (
            torch.eye(4, dtype=torch.float64, device="cpu")
            if start is None
            else start.double().cpu()
        )
        self.collide = collide

    def accepts(self) -> dict[str, Any]:
        """See the contract."""
        return {
            "type": "object",
            "properties": {
                "keys": {
                    "type": "string",
                    "pattern": f"^[{''.join(KEYS)}]*$",
                    "description": ", ".join(f"{key}: {what}" for key, what in KEYS.items()),
                }
            },
            "required": ["keys"],
            "additionalProperties": False,
        }

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        keys = values.get("keys")
        if set(values) != {"keys"} or not isinstance(keys, str):
            raise ValueError(f'A camera takes {{"keys": "wl"}}, the held keys; got {values!r}.')
        check_keys(frozenset(keys))

    def new_state(self) -> CameraState:
        """The start pose, no key held."""
        return CameraState(self.start.clone())

    def advance(self, state: CameraState, events: Sequence[Event], frames: range) -> Any:
        """Follow the held keys over the frames of a chunk; see the contract."""
        changes = {max(event.frame, 0): event.values["keys"] for event in events}
        poses, held = [], []
        for offset, frame in enumerate(frames):
            state.held = changes.get(offset, state.held)
            keys = frozenset(state.held) if frame > 0 else frozenset()
            if keys:
                state.pose = move(state.pose, keys, self.motion, self.collide)
            poses.append(state.pose)
            held.append(keys)
        return self.to_input(torch.stack(poses), held)
