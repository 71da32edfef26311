"""A plug-in: the toy world with a controller of its own, which the page has never heard of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import radians
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.controller import Controller, Event
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.runner import ToyWorldRunner, ToyWorldRunnerConfig
from flashdreams.integrations.toy_world.world import (
    KEY_MOTION,
    START_POSE,
    collide_camera,
    pose_to_camera,
)
from flashdreams.parallel.plan import state
from flashdreams.runtime.actions import KeyMotion, move

KEYS = {"w": "forward", "s": "back", "z": "roll over"}
PACES = {"walk": 1.0, "run": 3.0}


@dataclass
class SteeredState:
    """Where the camera is, and what was set."""

    pose: Tensor = state("whole")
    held: str = state("host", default="")
    speed: float = state("host", default=1.0)
    pace: str = state("host", default="walk")
    frozen: bool = state("host", default=False)
    sign: str = state("host", default="")


class SteeredCamera(Controller):
    """Keys, look, and one property of each kind that the page can draw."""

    def accepts(self) -> dict[str, Any]:
        """See the contract."""
        look = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        return {
            "type": "object",
            "properties": {
                "keys": {"type": "string", "pattern": "^[wsz]*$", "x-keys": KEYS},
                "look": look,
                "speed": {
                    "type": "number", "minimum": 0, "maximum": 4, "default": 1,
                    "title": "Walking speed",
                },
                "frozen": {"type": "boolean", "description": "No key moves the camera."},
                "pace": {"enum": list(PACES)},
                "sign": {"type": "string", "maxLength": 12, "title": "Sign"},
            },
            "additionalProperties": False,
        }  # fmt: skip

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        unknown = set(values) - set(self.accepts()["properties"])
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        if values.get("sign") == "wrong":
            raise ValueError("sign: 'wrong' is no inn; try another name.")

    def new_state(self) -> SteeredState:
        """The start pose."""
        start = pose_to_camera(torch.tensor(START_POSE, dtype=torch.float32, device="cpu"))
        return SteeredState(start.double())

    def advance(self, state: SteeredState, events: Sequence[Event], frames: range) -> Tensor:
        """See the contract; events act from the first frame of the chunk on."""
        for event in events:
            values = event.values
            state.held = values.get("keys", state.held)
            for name in ("speed", "pace", "frozen", "sign"):
                setattr(state, name, values.get(name, getattr(state, name)))
            yaw, _ = values.get("look", (0.0, 0.0))
            turn = KeyMotion(move_per_frame=0.0, turn_per_frame_rad=abs(radians(yaw)))
            state.pose = move(state.pose, frozenset("l" if yaw > 0 else "j"), turn)
        distance = KEY_MOTION.move_per_frame * state.speed * PACES[state.pace]
        motion = KeyMotion(move_per_frame=distance, turn_per_frame_rad=0.0)
        held = frozenset(state.held) & {"w", "s"}
        poses = []
        for frame in frames:
            if frame > 0 and held and not state.frozen:
                state.pose = move(state.pose, held, motion, collide_camera)
            poses.append(state.pose)
        return torch.stack(poses)


@dataclass(kw_only=True)
class SteeredRunnerConfig(ToyWorldRunnerConfig):
    """The toy world, steered otherwise."""

    _target: type["SteeredRunner"] = field(default_factory=lambda: SteeredRunner)


class SteeredRunner(ToyWorldRunner):
    """The toy world with the controller above."""

    def controller(self) -> SteeredCamera:  # type: ignore[override]
        """See the contract."""
        return SteeredCamera()


STEERED_WORLD = SteeredRunnerConfig(
    runner_name="steered-world",
    description="The toy world with a controller of its own.",
    pipeline=TOY_WORLD_RUNNER.pipeline,
)
RUNNER_CONFIGS = {STEERED_WORLD.runner_name: STEERED_WORLD}
