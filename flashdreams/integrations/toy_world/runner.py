"""The toy world on the command line."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.controller import KeyCamera
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.prompt import read_prompt
from flashdreams.infra.ranges import check_range
from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.infra.session import Command, key_commands
from flashdreams.runtime.actions import hold, integrate, parse_actions

from .metrics import psnr_db
from .render import render
from .scene import check_scene, scene_from_text
from .shading import shade
from .world import KEY_MOTION, START_POSE, camera_to_pose, collide_camera, pose_to_camera

STROLL = "w20 al10 wj12 l14 al12 j10 d10 l8 dj14 wj12 d14 j12 d6 wj10"


@dataclass(kw_only=True)
class ToyWorldRunnerConfig(RunnerConfig):
    """A walk through a courtyard, described by the prompt and steered by keys."""

    _target: type["ToyWorldRunner"] = field(default_factory=lambda: ToyWorldRunner)

    prompt: str = "dawn sky, gold floor, blue north wall, teal east wall, white pillars"
    """The scene: colours of the floor, sky, walls and pillars, separated by commas. What is
    not named keeps its default; "unknown floor" leaves the choice to the model."""
    prompt_path: Path | None = None
    """A text file to read the prompt from."""
    actions: str = STROLL
    """Keys and the number of frames each is held: w a s d move, j l turn, "wl6" holds two keys
    at once. After the last one the camera stands still."""
    total_blocks: int = 160
    """AR steps; each is one frame."""
    start_from_truth: bool = False
    """Start from the rendered first frame instead of generating it."""
    compare_to_truth: bool = False
    """Show the rendered ground truth to the left of the generated frames, and record the PSNR."""
    threads: int | None = 1
    """CPU threads; at this size, one is faster than two."""
    scale: int = 6
    """Integer factor by which the video is enlarged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_actions(self.actions)
        check_range(self, "scale", most=64, as_flags=True)


class ToyWorldRunner(Runner[ToyWorldRunnerConfig, StreamInferencePipeline]):
    """Generates a frame for every pose of a walk and, optionally, compares it with the truth."""

    def __init__(self, config: ToyWorldRunnerConfig) -> None:
        self.prompt = read_prompt(config.prompt, config.prompt_path)
        self.scene = scene_from_text(self.prompt)[None]
        if config.compare_to_truth or config.start_from_truth:
            check_scene(self.scene)
        super().__init__(config)

    def run(self) -> None:
        """Stream the walk into the video."""
        cfg = self.config
        video = self.open_video(scale=cfg.scale) if self.is_rank_zero else nullcontext()
        with video as writer:
            for step in self.stream(cfg.total_blocks):
                chunk = step.chunk
                if chunk is None:  # another rank decodes
                    continue
                if cfg.compare_to_truth:
                    truth = self.truth(step.control[0])[:, None]
                    step.cache.timer.note(psnr_db=float(psnr_db(chunk, truth).mean()))
                    chunk = torch.cat([truth, chunk], dim=-1)
                if writer is not None:
                    writer.write(chunk)

    def conditions(self) -> dict[str, Any]:
        """The scene as text and, on request, the rendered first frame."""
        conditions: dict[str, Any] = {"text": [self.prompt]}
        if self.config.start_from_truth:
            conditions["image"] = self.truth(self.controller().start)
        return conditions

    def controller(self) -> KeyCamera:
        """The camera of the courtyard, at the start of every walk; it slides along walls.

        Its control input are the poses of a chunk, ``[T, 4, 4]``.
        """
        return KeyCamera(
            KEY_MOTION,
            to_input=lambda poses, held: poses,
            start=pose_to_camera(torch.tensor(START_POSE, dtype=torch.float32, device="cpu")),
            collide=collide_camera,
        )

    def commands(self) -> list[Command]:
        """The key presses of ``--actions``."""
        return key_commands(self.config.actions)

    def truth(self, pose: Tensor) -> Tensor:
        """The rendered frame ``[1, 3, height, width]`` for a camera-to-world matrix ``[4, 4]``."""
        camera: Any = self.config.pipeline.encoder
        draw = shade if camera.materials else render
        size = (camera.height, camera.width)
        return draw(self.scene, camera_to_pose(pose)[None].float(), size).to(self.device)


def walk(actions: str, frames: int) -> Tensor:
    """Camera-to-world matrices of a walk from the start pose of this world.

    Args:
        actions: keys and the frames that they are held for, such as ``"w8 l4 wl6"``.
        frames: number of poses; a longer walk is cut, a shorter one is extended by its last pose.

    Returns:
        ``[frames, 4, 4]``, in world units.

    Raises:
        ValueError: an unknown key, an invalid count, or ``frames`` below 1.
    """
    start = pose_to_camera(torch.tensor(START_POSE, dtype=torch.float32, device="cpu"))
    path = integrate(parse_actions(actions), KEY_MOTION, start=start, collide=collide_camera)
    return hold(path, frames)
