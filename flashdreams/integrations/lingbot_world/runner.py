"""LingBot-World on the command line."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import Controller, Event, KeyCamera
from flashdreams.infra.session import Command, key_commands
from flashdreams.infra.video_runner import (
    ImageToVideoRunner,
    ImageToVideoRunnerConfig,
    take_length,
)
from flashdreams.runtime.actions import KeyMotion, integrate, parse_actions
from flashdreams.runtime.array_file import load_array
from flashdreams.runtime.text import reason_of, tell

from .camera import check_intrinsics, check_poses, pixel_frames, whole_chunks
from .encoder import CameraEncoderConfig, CameraPath, PoseMode
from .inset import draw_inset

KEY_ORDER = ("w", "a", "s", "d")
"""Order of the key channels: forward, left, back, right.
Source: Robbyant/lingbot-world, wan/utils/vis_utils.py, extract_translation_wasd."""
MAX_PITCH = 60.0
"""Degrees that a pointer may tilt the camera up and down."""


@dataclass(kw_only=True)
class CameraToVideoRunnerConfig(ImageToVideoRunnerConfig):
    """An image, a prompt and a camera path to video."""

    _target: type["CameraToVideoRunner"] = field(default_factory=lambda: CameraToVideoRunner)

    pose_path: Path | None = None
    """A .npy file of camera-to-world poses [frames, 4, 4], one per pixel frame; camera axes x
    right, y down, z forward."""
    intrinsic_path: Path | None = None
    """A .npy file of intrinsics [frames, 4], or [1, 4] for all: fx, fy, cx, cy in pixels of a
    480x832 picture."""
    key_path: Path | None = None
    """A .npy file [frames, 4] of the held keys w, a, s, d, to go with --pose-path, for models that
    are controlled by keys; others refuse it."""
    actions: str | None = None
    """Keys and the number of frames they are held, if there is no --pose-path: w a s d move, j l
    turn, "wl6" holds two together."""
    intrinsics: tuple[float, float, float, float] = (477.0, 477.0, 416.0, 240.0)
    """fx, fy, cx, cy in pixels of a 480x832 image, if there is no --intrinsic-path."""
    move_per_frame: float = 0.25
    """Distance per pixel frame while a movement key is held."""
    turn_per_frame: float = 1.5
    """Degrees per pixel frame while a turning key is held."""
    pose_mode: PoseMode = "offline"
    """"offline" takes the whole path in advance and normalises it, as the official code does;
    "streaming" takes poses as they come."""
    world_scale: float = 1.0
    """Factor on distances in streaming mode; a move of 1 per latent frame is the largest that the
    model has seen."""
    show_path: bool = False
    """Draw the camera's path, seen from above, into a corner of the video."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actions is not None:
            parse_actions(self.actions)
        self.motion()
        if self.has_camera:
            derive_config(self.camera_encoder, world_scale=self.world_scale)

    @property
    def has_camera(self) -> bool:
        """Whether a path is followed; the clip variant does not require one."""
        return True

    def for_serving(self) -> "CameraToVideoRunnerConfig":
        """The config in streaming mode, controlled by keys; see `RunnerConfig.for_serving`.

        Raises:
            ValueError: a path from a file, which cannot be steered.
        """
        for name in ("pose_path", "intrinsic_path", "key_path"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: a live session is steered by its client; "
                    "omit it. --intrinsics sets the lens."
                )
        actions = self.actions or f"w{pixel_frames(self.transformer.len_t)}"
        return replace(super().for_serving(), pose_mode="streaming", actions=actions)

    @property
    def camera_encoder(self) -> CameraEncoderConfig:
        """Config of the camera encoder."""
        found = self.pipeline.encoder
        if not isinstance(found, CameraEncoderConfig):
            raise TypeError(
                f"{self.runner_name} needs a camera encoder, got {type(found).__name__}."
            )
        return found

    def motion(self) -> KeyMotion:
        """Motion of the camera per key."""
        return KeyMotion(
            move_per_frame=self.move_per_frame,
            turn_per_frame_rad=float(np.radians(self.turn_per_frame)),
        )


class CameraToVideoRunner(ImageToVideoRunner):
    """Streams a walk through a world into a file; stops at the end of the poses."""

    config: CameraToVideoRunnerConfig

    def __init__(self, config: CameraToVideoRunnerConfig) -> None:
        """Read and check path and image, then build and load the pipeline.

        Raises:
            ValueError: input that cannot be used; no weights have been read.
        """
        self.path: CameraPath | None = None
        config = take_length(config)
        if not config.has_camera:
            self.blocks = config.total_blocks
            pipeline = replace(config.pipeline, encoder=None)
            super().__init__(replace(config, pipeline=pipeline))
            return
        path = read_path(config)
        config = self.fitted(config, len(path))
        transformer = config.transformer
        blocks = whole_chunks(len(path), transformer.len_t)
        if blocks < 1:
            given = "--actions" if config.pose_path is None else f"--pose-path {config.pose_path}"
            raise ValueError(
                f"{given}: {len(path)} poses are fewer than one chunk of {transformer.len_t} "
                f"latent frames needs; give at least {pixel_frames(transformer.len_t)}."
            )
        self.num_poses = len(path)
        self.blocks = min(config.total_blocks, blocks)
        # The request bounds the clip that offline mode resamples to the chunks, as in the
        # official code; poses beyond the last whole chunk still count.
        self.path = path.part(slice(0, pixel_frames(config.total_blocks * transformer.len_t)))
        pipeline = derive_config(
            config.pipeline,
            encoder=dict(
                pose_mode=config.pose_mode,
                world_scale=config.world_scale,
                len_t=transformer.len_t,
                patch_size=transformer.patch_size[1],
            ),
        )
        super().__init__(replace(config, pipeline=pipeline))

    def fitted(self, config: CameraToVideoRunnerConfig, poses: int) -> CameraToVideoRunnerConfig:
        """The config adapted to a path of so many poses; unchanged here."""
        return config

    def run(self) -> None:
        """Generate a chunk for every part of the path and write each as it comes."""
        cfg = self.config
        video = self.open_video() if self.is_rank_zero else nullcontext()
        frame = 0
        with video as writer:
            for step in self.stream(self.blocks):
                chunk, frame = step.chunk, step.frames.stop
                if writer is None or chunk is None:  # another rank decodes or writes
                    continue
                if cfg.show_path and self.path is not None:
                    chunk = draw_inset(chunk, self.path.poses, step.frames.start)
                writer.write(chunk)
        if self.is_rank_zero and self.blocks < cfg.total_blocks:
            tell(
                f"The poses ended: {self.num_poses} of them cover {self.blocks} of "
                f"{cfg.total_blocks} AR steps ({frame} frames)."
            )

    def conditions(self) -> dict[str, Any]:
        """Prompt, image and, offline, the whole path."""
        conditions = super().conditions()
        if self.config.pose_mode == "offline" and self.path is not None:
            conditions["camera"] = self.path
        return conditions

    def controller(self) -> Controller | None:
        """Streaming: a camera controlled by keys or by the poses of a file; offline: None.

        Its control input is the `CameraPath` of a chunk.
        """
        cfg = self.config
        if cfg.pose_mode == "offline" or self.path is None:
            return None
        if cfg.pose_path is not None or cfg.intrinsic_path is not None:
            return PathFollower(self.path)
        keyed = cfg.camera_encoder.control_type == "act"
        to_input = partial(camera_path, cfg.intrinsics, keyed)
        return KeyCamera(cfg.motion(), to_input, max_pitch=MAX_PITCH)

    def commands(self) -> list[Command]:
        """The key presses of ``--actions``, for a camera that is controlled by keys."""
        steered = isinstance(self.controller(), KeyCamera)
        return key_commands(self.config.actions) if steered and self.config.actions else []


def camera_path(
    intrinsics: tuple[float, ...], keyed: bool, poses: Tensor, held: Sequence[frozenset[str]]
) -> CameraPath:
    """The camera path of a chunk from key presses.

    Args:
        intrinsics: fx, fy, cx, cy in pixels of a 480x832 picture.
        keyed: whether the model also takes the keys.
        poses: ``[F, 4, 4]``.
        held: held keys of F frames.
    """
    held_keys = [[float(key in now) for key in KEY_ORDER] for now in held]
    keys = torch.tensor(held_keys, dtype=torch.float32, device="cpu")
    lens = torch.tensor(intrinsics, dtype=torch.float32, device="cpu")
    return CameraPath(poses, lens.expand(len(poses), 4), keys if keyed else None)


class PathFollower(Controller):
    """Returns a path that is known in advance; takes no events."""

    def __init__(self, path: CameraPath) -> None:
        self.path = path

    def accepts(self) -> dict[str, Any]:
        """See the contract: nothing."""
        return {"type": "object", "maxProperties": 0}

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        raise ValueError("This camera follows the poses of a file and takes no control.")

    def new_state(self) -> None:
        """See the contract: the position follows from the frames."""
        return None

    def advance(self, state: None, events: Sequence[Event], frames: range) -> CameraPath:
        """The part of the path over the frames; see the contract."""
        return self.path.part(slice(frames.start, frames.stop))


def read_path(config: CameraToVideoRunnerConfig) -> CameraPath:
    """The camera path from files or key presses.

    Raises:
        ValueError: the path is missing or invalid.
    """
    keyed = config.camera_encoder.control_type == "act"
    keys = None
    if config.key_path is not None and not (keyed and config.pose_path is not None):
        raise ValueError(
            "--key-path goes with --pose-path, for models that are controlled by keys: omit it."
        )
    if config.pose_path is not None:
        name = f"--pose-path {config.pose_path}"
        poses = read_array(config.pose_path, "--pose-path")
        if keyed:
            if config.key_path is None:
                raise ValueError(
                    f"{config.runner_name} is controlled by keys: give --key-path FILE, or "
                    "type --actions instead of --pose-path."
                )
            keys = read_array(config.key_path, "--key-path")
    elif config.actions is not None:
        name = "--actions"
        held = parse_actions(config.actions)
        poses = integrate(held, config.motion())
        keys = torch.tensor(
            [[key in now for key in KEY_ORDER] for now in (frozenset(), *held)],
            dtype=torch.bool,
            device="cpu",
        )
    else:
        raise ValueError(
            f"{config.runner_name} follows a camera: give --pose-path FILE, or type key presses "
            'such as --actions "w40 l20".'
        )
    check_poses(poses, name)
    if config.intrinsic_path is not None:
        intrinsics = read_array(config.intrinsic_path, "--intrinsic-path")
        if intrinsics.ndim == 2 and len(intrinsics) == 1:
            intrinsics = intrinsics.expand(len(poses), -1)
        name = f"--intrinsic-path {config.intrinsic_path}"
    else:
        intrinsics = torch.tensor(config.intrinsics, dtype=torch.float32, device="cpu")
        intrinsics = intrinsics.expand(len(poses), 4)
        name = "--intrinsics"
    check_intrinsics(intrinsics, len(poses), name)
    if not keyed or keys is None:
        return CameraPath(poses, intrinsics)
    if not ((keys >= 0) & (keys <= 1)).all():  # NaN is neither
        raise ValueError(f"--key-path {config.key_path}: the keys must be from 0 to 1 throughout.")
    if keys.shape != (len(poses), 4):
        raise ValueError(
            f"--key-path {config.key_path}: the keys w, a, s, d must be [{len(poses)}, 4] for "
            f"{len(poses)} poses; got {list(keys.shape)}."
        )
    return CameraPath(poses, intrinsics, keys.float())


def read_array(path: Path, flag: str) -> Tensor:
    """The numbers of a .npy file; integers become float64.

    Raises:
        ValueError: no such file, damaged, too large, or none of numbers.
    """
    try:
        array = load_array(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {reason_of(error)}.") from error
    wide = array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(wide))
