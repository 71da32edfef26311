"""Encoders: camera paths to ray tokens, the first image to its condition."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flashdreams.infra.component import build_component
from flashdreams.infra.encoder.base import (
    Encoder,
    EncoderConfig,
    StreamingEncoder,
    StreamingEncoderConfig,
)
from flashdreams.infra.ranges import check_range
from flashdreams.models.wan.image import mark_first_frame
from flashdreams.models.wan.vae import WanVAEImageEncoder, WanVAEImageEncoderConfig
from flashdreams.parallel.plan import state
from flashdreams.runtime.transfer import to_device

from .camera import (
    SPATIAL_FACTOR,
    TIME_FACTOR,
    camera_rays,
    check_intrinsics,
    check_poses,
    chunk_poses,
    clip_poses,
    pick_frames,
    pixel_frames,
    resample_intrinsics,
    scale_intrinsics,
    to_tokens,
    whole_chunks,
)

PoseMode = Literal["offline", "streaming"]
ControlType = Literal["cam", "act"]


@dataclass(frozen=True)
class CameraPath:
    """Camera poses of F pixel frames."""

    poses: Tensor = state("whole")
    """``[F, 4, 4]`` camera-to-world, camera axes x right, y down, z forward."""
    intrinsics: Tensor = state("whole")
    """``[F, 4]``: fx, fy, cx, cy in pixels of a picture of 480x832."""
    keys: Tensor | None = state("whole", default=None)
    """``[F, 4]``, 1 where w, a, s, d is held, else 0; for models that are steered by keys."""

    def __len__(self) -> int:
        """Frames F."""
        return len(self.poses)

    def part(self, frames: slice) -> "CameraPath":
        """The path over some of its frames."""
        keys = None if self.keys is None else self.keys[frames]
        return CameraPath(self.poses[frames], self.intrinsics[frames], keys)


MAX_SCALE = 1e6
"""Largest factor on distances; those of `check_poses` times it fit into float32."""


@dataclass(kw_only=True)
class CameraEncoderConfig(StreamingEncoderConfig):
    """Config of the camera encoder."""

    _target: type["CameraEncoder"] = field(default_factory=lambda: CameraEncoder)

    control_type: ControlType = "cam"
    """Control of the model: "cam" by the camera's path, "act" by its turns and the held
    w, a, s and d keys."""
    pose_mode: PoseMode = "streaming"
    """"offline" takes the whole path at the start of the rollout, resampled and normalised as in
    the official code; "streaming" takes each AR step's poses as they come."""
    intrinsics: Literal["per_frame", "first"] = "per_frame"
    """Offline: resample the intrinsics to the latent frames, or use those of the first frame
    for all, as earlier official code did. Streaming: those of each latent frame."""
    world_scale: float = 1.0
    """Factor on the distance between latent frames in streaming mode. Offline, the clip's longest
    distance is scaled to 1, which streaming cannot know."""
    len_t: int = 3
    """Latent frames of one chunk, as in the transformer."""
    patch_size: int = 2
    """Latent rows and columns of a token, as in the transformer."""

    def __post_init__(self) -> None:
        if not 0 < self.world_scale <= MAX_SCALE:
            raise ValueError(
                f"world_scale={self.world_scale}: must be positive, at most {MAX_SCALE:g}."
            )
        check_range(self, "len_t", "patch_size")
        if self.intrinsics not in ("per_frame", "first"):
            raise ValueError(
                f"intrinsics={self.intrinsics!r} is unknown; allowed are 'per_frame' and 'first'."
            )


@dataclass
class CameraCache:
    """The camera encoder's state in one rollout."""

    height: int = state("host")
    """In pixels."""
    width: int = state("host")
    """In pixels."""
    device: torch.device = state("host")
    clip: CameraPath | None = None
    """Offline: relative poses, intrinsics and keys of all latent frames."""
    anchor: Tensor | None = state("whole", default=None)
    """Streaming: ``[4, 4]``, the last pose of the previous AR step."""


class CameraEncoder(StreamingEncoder):
    """Turns camera paths into ray tokens, chunk by chunk."""

    config: CameraEncoderConfig

    def initialize_cache(self, condition: Tensor, camera: CameraPath | None = None) -> CameraCache:
        """Start a rollout.

        Args:
            condition: ``[B, C, T, H, W]``, the image's condition; rays are made for its size.
            camera: the whole path, for offline mode only.

        Raises:
            ValueError: a path that does not fit, is missing, or belongs to the other mode.
        """
        rows, columns = condition.shape[3:]
        cache = CameraCache(rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR, condition.device)
        offline = self.config.pose_mode == "offline"
        if offline != (camera is not None):
            raise ValueError(
                f"pose_mode={self.config.pose_mode!r} takes camera=CameraPath(poses, intrinsics) "
                + ("at the rollout's start." if offline else "step by step, as generate's input.")
            )
        if camera is not None:
            cache.clip = self.encode_clip(self._checked(camera))
        return cache

    def encode_clip(self, camera: CameraPath) -> CameraPath:
        """Relative poses, intrinsics and keys of all latent frames of a path.

        As in the official code poses and intrinsics are resampled to a whole number of chunks, and
        keys are those of every fourth frame.

        Source: Robbyant/lingbot-world, wan/image2video.py and wan/image2video_fast.py, generate.

        Raises:
            ValueError: the path is too short for one chunk.
        """
        c = self.config
        chunks = whole_chunks(len(camera), c.len_t)
        if chunks < 1:
            raise ValueError(
                f"{len(camera)} poses are fewer than one chunk of {c.len_t} latent frames "
                f"needs; give at least {pixel_frames(c.len_t)}."
            )
        frames = (len(camera) - 1) // TIME_FACTOR * TIME_FACTOR + 1
        latent_frames = chunks * c.len_t
        given = camera.intrinsics[: 1 if c.intrinsics == "first" else frames]
        return CameraPath(
            clip_poses(camera.poses[:frames], latent_frames),
            resample_intrinsics(given, latent_frames),
            None if camera.keys is None else camera.keys[::TIME_FACTOR][:latent_frames],
        )

    @torch.no_grad()
    def forward(
        self,
        input: CameraPath | None,
        autoregressive_index: int = 0,
        cache: CameraCache | None = None,
    ) -> Tensor:
        """Encode the camera of one AR step.

        Args:
            input: streaming: the path over this step's pixel frames; offline: None.
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state.

        Returns:
            ``[1, L, camera_dim]`` float32, for the whole batch.

        Raises:
            ValueError: a path that does not fit, or an AR step beyond the end of the clip.
        """
        if cache is None:
            raise ValueError("The camera encoder needs its rollout's cache: initialize_cache().")
        if cache.clip is not None:
            chunk = self._of_clip(cache.clip, input, autoregressive_index)
        else:
            chunk = self._of_input(cache, input, autoregressive_index)
        return self._tokens(chunk, cache)[None]

    def example_step(self, frames: int) -> CameraPath | None:
        """A camera at rest; None offline, where an AR step has no input."""
        if self.config.pose_mode == "offline":
            return None
        on_host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        lens = torch.tensor([477.0, 477.0, 416.0, 240.0], **on_host).expand(frames, 4)
        keys = torch.zeros(frames, 4, **on_host) if self.config.control_type == "act" else None
        return CameraPath(torch.eye(4, **on_host).expand(frames, 4, 4), lens, keys)

    def _of_clip(self, clip: CameraPath, input: Any, index: int) -> CameraPath:
        if input is not None:
            raise ValueError("pose_mode='offline' already has the whole path; input must be None.")
        start = index * self.config.len_t
        if start + self.config.len_t > len(clip):
            raise ValueError(
                f"AR step {index} is beyond the camera path, which covers "
                f"{len(clip) // self.config.len_t} AR steps."
            )
        return clip.part(slice(start, start + self.config.len_t))

    def _of_input(self, cache: CameraCache, input: Any, index: int) -> CameraPath:
        wanted = pixel_frames(self.config.len_t) if index == 0 else self.config.len_t * TIME_FACTOR
        if not isinstance(input, CameraPath):
            raise ValueError(
                f"AR step {index} takes CameraPath(poses, intrinsics) over {wanted} pixel frames; "
                f"got {type(input).__name__}."
            )
        camera = self._checked(input)
        if len(camera) != wanted:
            raise ValueError(
                f"AR step {index} takes {wanted} poses, one per pixel frame; got {len(camera)}."
            )
        picked = camera.part(pick_frames(index))
        steps = chunk_poses(picked.poses, cache.anchor, self.config.world_scale)
        cache.anchor = camera.poses[-1].clone()
        return CameraPath(steps, picked.intrinsics.float(), picked.keys)

    def _checked(self, camera: CameraPath) -> CameraPath:
        """The validated path, on the host."""
        check_poses(camera.poses)
        check_intrinsics(camera.intrinsics, len(camera))
        keyed, keys = self.config.control_type == "act", camera.keys
        if keyed and (keys is None or keys.shape != (len(camera), 4)):
            got = None if keys is None else list(keys.shape)
            raise ValueError(
                "control_type='act' takes the held keys w, a, s, d as [frames, 4], here "
                f"[{len(camera)}, 4]; got {got}."
            )
        kept = keys.cpu() if keyed and keys is not None else None
        return CameraPath(camera.poses.cpu(), camera.intrinsics.cpu(), kept)

    def _tokens(self, chunk: CameraPath, cache: CameraCache) -> Tensor:
        height, width = cache.height, cache.width
        intrinsics = to_device(scale_intrinsics(chunk.intrinsics, height, width), cache.device)
        poses = to_device(chunk.poses, cache.device)
        pixels = camera_rays(poses, intrinsics, height, width, with_origins=chunk.keys is None)
        if chunk.keys is not None:
            keys = (
                to_device(chunk.keys, cache.device)
                .to(pixels.dtype)[:, :, None, None]
                .expand(-1, -1, height, width)
            )
            pixels = torch.cat([pixels, keys], dim=1)
        return to_tokens(pixels, self.config.patch_size)


@dataclass(kw_only=True)
class ImageConditionEncoderConfig(EncoderConfig):
    """Config of the first image's condition."""

    _target: type["ImageConditionEncoder"] = field(default_factory=lambda: ImageConditionEncoder)

    vae: WanVAEImageEncoderConfig = field(default_factory=WanVAEImageEncoderConfig)
    """Encodes the clip that starts with the image and is grey afterwards."""
    latent_frames: int = 30
    """Latent frames that are encoded; later ones repeat the last. At 30 the image is outside the
    autoencoder's receptive field, so this is exact."""

    def __post_init__(self) -> None:
        check_range(self, "latent_frames")


class ImageConditionEncoder(Encoder):
    """Encodes an image to the context ``condition`` of the transformer: mask and latents."""

    config: ImageConditionEncoderConfig

    def __init__(self, config: ImageConditionEncoderConfig) -> None:
        super().__init__(config)
        self.vae: WanVAEImageEncoder = build_component(config.vae)

    def example_input(self) -> Tensor:
        """A small grey image."""
        return self.vae.example_input()

    @torch.no_grad()
    def forward(self, input: Tensor) -> Mapping[str, Tensor]:
        """Encode the first frame of a rollout.

        Args:
            input: ``[B, 3, height, width]``, RGB in [-1, 1].

        Returns:
            ``condition`` ``[B, 4 + 16, T, H, W]`` float32: the mask, 1 on the first latent frame,
            then the latents of the image and grey frames.

        Raises:
            ValueError: wrong shape or size.
            TypeError: integer pixels.

        Source: Robbyant/lingbot-world, wan/image2video_fast.py.
        """
        cache = self.vae.initialize_cache()
        video = input.unsqueeze(2) if input.ndim == 4 else input
        latents = [self.vae.encode_chunk(video, cache)]
        grey = torch.zeros_like(video[:, :, :1]).expand(-1, -1, TIME_FACTOR, -1, -1)
        latents += [
            self.vae.encode_chunk(grey, cache) for _ in range(self.config.latent_frames - 1)
        ]
        return {"condition": mark_first_frame(torch.cat(latents, dim=2))}
