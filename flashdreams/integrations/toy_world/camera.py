"""The camera embedding: the rays of each token's patch."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range

from .hits import HIT_FEATURES, hit_features
from .rays import focal_length, slopes, waves
from .world import HALF_SIZE, camera_to_pose, pose_to_camera

UPRIGHT_TOLERANCE = 1e-3
"""Largest entry of a camera matrix that no turn about the vertical axis explains."""

_RAYS_PER_TOKEN = 4
_ANGLE_HARMONICS = (1, 2, 4)
_PLACE_HARMONICS = (0.5, 1, 2, 4)


def ray_features(pose: Tensor, rows: int, columns: int, pixel_size: tuple[int, int]) -> Tensor:
    """Describe the rays of every token, in Fourier form.

    A horizontal ray is the line ``(angle, moment, along)``: its compass angle, its signed distance
    from the middle of the world (the Pluecker moment in the plane) and how far along it the camera
    stands. Every token sees four of them, spread over its columns; the place of the camera and of
    the token in the picture come beside them.

    Args:
        pose: ``[..., 3]`` (x, y, heading).
        rows: token rows of a frame.
        columns: token columns of a frame.
        pixel_size: height and width of a frame in pixels.

    Returns:
        ``[..., rows * columns, control_features(rows, columns)]`` float32.
    """
    height, width = pixel_size
    x, y, heading = pose.float().unbind(-1)
    across = slopes(columns * _RAYS_PER_TOKEN, width, focal_length(height), pose.device)
    angle = heading[..., None] + torch.atan(across)
    sine, cosine = angle.sin(), angle.cos()
    moment = x[..., None] * cosine - y[..., None] * sine
    along = x[..., None] * sine + y[..., None] * cosine
    rays = torch.cat(
        [waves(angle, _ANGLE_HARMONICS), _place_waves(moment), _place_waves(along)], dim=-1
    )
    rays = rays.unflatten(-2, (columns, _RAYS_PER_TOKEN)).flatten(-2)
    shape = (*pose.shape[:-1], rows, columns, -1)
    place = torch.cat([_place_waves(x), _place_waves(y)], dim=-1)
    row = torch.eye(rows, dtype=torch.float32, device=pose.device)[:, None]
    column = torch.eye(columns, dtype=torch.float32, device=pose.device)[None]
    parts = [rays[..., None, :, :], place[..., None, None, :], row, column]
    return torch.cat([part.expand(shape) for part in parts], dim=-1).flatten(-3, -2)


def control_features(rows: int, columns: int) -> int:
    """Number of features that ``ray_features`` gives each token."""
    per_ray = 2 * len(_ANGLE_HARMONICS) + 4 * len(_PLACE_HARMONICS)
    return _RAYS_PER_TOKEN * per_ray + 4 * len(_PLACE_HARMONICS) + rows + columns


def _place_waves(length: Tensor) -> Tensor:
    return waves(length * (math.pi / HALF_SIZE), _PLACE_HARMONICS)


@dataclass(kw_only=True)
class CameraEncoderConfig(EncoderConfig):
    """Config of the camera encoder; the sizes are those of the transformer's frames."""

    _target: type["CameraEncoder"] = field(default_factory=lambda: CameraEncoder)

    token_rows: int = 4
    """Token rows of a latent frame."""
    token_columns: int = 4
    """Token columns of a latent frame."""
    height: int = 64
    """Picture height in pixels."""
    width: int = 64
    """Picture width in pixels."""
    materials: bool = False
    """For images with materials: also embed what the rays hit; see `hit_features`."""

    def __post_init__(self) -> None:
        check_range(self, "token_rows", "token_columns", "height", "width")

    def features(self, pose: Tensor) -> Tensor:
        """Ray features of the tokens of frames.

        Args:
            pose: ``[..., 3]`` (x, y, heading).

        Returns:
            ``[..., token_rows * token_columns, F]`` float32.
        """
        grid = (self.token_rows, self.token_columns, (self.height, self.width))
        rays = ray_features(pose, *grid)
        return torch.cat([rays, hit_features(pose, *grid)], dim=-1) if self.materials else rays

    @property
    def control_dim(self) -> int:
        """Number of features of a token."""
        hits = HIT_FEATURES if self.materials else 0
        return control_features(self.token_rows, self.token_columns) + hits


class CameraEncoder(Encoder):
    """Turns camera poses into per-token control features; keeps nothing between steps."""

    config: CameraEncoderConfig

    def forward(self, input: Tensor) -> Tensor:
        """Encode the poses of one chunk.

        Args:
            input: ``[B, T, 4, 4]`` or ``[T, 4, 4]`` upright camera-to-world matrices (x right,
                y down, z forward).

        Returns:
            ``[B, T * rows * columns, F]`` float32.

        Raises:
            ValueError: another shape, or a camera that is not upright.
        """
        if not isinstance(input, Tensor) or input.ndim not in (3, 4) or input.shape[-2:] != (4, 4):
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"Camera poses must be [B, T, 4, 4] or [T, 4, 4]; got {got}.")
        c = self.config
        poses = input if input.ndim == 4 else input[None]
        plane = camera_to_pose(poses)
        upright = pose_to_camera(plane)
        upright[..., :3, 3] = poses[..., :3, 3]
        error = float((poses.double() - upright).abs().amax())
        if not error <= UPRIGHT_TOLERANCE:  # also where it is NaN
            raise ValueError(
                f"Camera poses must be of an upright camera: finite, a rotation about the vertical "
                f"axis and the last row 0, 0, 0, 1; the matrices differ from that by {error:.2g}, "
                f"at most {UPRIGHT_TOLERANCE:g} is allowed."
            )
        return c.features(plane).flatten(1, 2)

    def example_step(self, frames: int) -> Tensor:
        """A camera at rest."""
        return torch.eye(4, dtype=torch.float32, device="cpu").expand(frames, 4, 4)
