"""Camera paths as the model sees them: relative poses, rays and ray tokens."""

# Shapes: F pixel frames, T latent frames. Poses are camera-to-world matrices [*, 4, 4] with camera
# axes x right, y down, z forward; intrinsics are rows of fx, fy, cx, cy in pixels.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TIME_FACTOR = 4
"""Pixel frames per latent frame after the first."""
SPATIAL_FACTOR = 8
"""Pixels per latent row or column."""
INTRINSICS_HEIGHT, INTRINSICS_WIDTH = 480, 832
"""Picture size that intrinsics refer to. Source: Robbyant/lingbot-world, image2video_fast.py."""
ROTATION_TOLERANCE = 1e-3
"""Largest entry of ``R R^T - 1`` that still counts as a rotation."""
MAX_DISTANCE = 1e12
"""Largest coordinate of a camera: its square still fits in float32."""
MAX_PIXELS = 1e5
"""Largest focal length and farthest principal point, in pixels."""
MAX_VIEW_DEGREES = 150
"""Widest field of view. Wider ones are nearly always a mistake in units, such as
intrinsics as fractions of the image."""


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip with so many latent frames."""
    return 1 + TIME_FACTOR * (latent_frames - 1)


def whole_chunks(num_poses: int, len_t: int) -> int:
    """Number of chunks of ``len_t`` latent frames for so many poses, one per pixel frame."""
    latent_frames = (num_poses - 1) // TIME_FACTOR + 1 if num_poses > 0 else 0
    return latent_frames // len_t


def check_poses(poses: Tensor, name: str = "poses") -> None:
    """Refuse an invalid camera path.

    Args:
        poses: expected ``[F, 4, 4]``, floating point.
        name: their name in the message.

    Raises:
        ValueError: another shape or type, a value that is not finite, a last row other than
            0 0 0 1, or a matrix that is not a rotation; the message names the first such frame.
    """
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) == 0:
        raise ValueError(f"{name}: camera poses must be [frames, 4, 4]; got {list(poses.shape)}.")
    if not poses.is_floating_point():
        raise ValueError(f"{name}: camera poses must be floating point; got {poses.dtype}.")
    wide = poses.double()
    frame = _first_frame(~wide.isfinite().flatten(1).all(1))
    if frame is not None:
        raise ValueError(f"{name}: the pose of frame {frame} is not finite.")
    last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=poses.device)
    frame = _first_frame(((wide[:, 3] - last_row).abs() > ROTATION_TOLERANCE).any(1))
    if frame is not None:
        row = ", ".join(f"{value:g}" for value in wide[frame, 3].tolist())
        raise ValueError(f"{name}: the last row of frame {frame} is {row}; it must be 0, 0, 0, 1.")
    frame = _first_frame((wide[:, :3, 3].abs() > MAX_DISTANCE).any(1))
    if frame is not None:
        raise ValueError(
            f"{name}: the position of frame {frame} has a coordinate of "
            f"{wide[frame, :3, 3].abs().max():g}; at most {MAX_DISTANCE:g} is allowed."
        )
    rotation = wide[:, :3, :3]
    excess = rotation @ rotation.mT - torch.eye(3, dtype=torch.float64, device=poses.device)
    error, determinant = excess.abs().amax((1, 2)), torch.linalg.det(rotation)
    frame = _first_frame((error > ROTATION_TOLERANCE) | (determinant < 0))
    if frame is not None:
        raise ValueError(
            f"{name}: the upper left 3x3 of frame {frame} is not a rotation: R R^T is off 1 by "
            f"{error[frame]:.2g} (at most {ROTATION_TOLERANCE:g}), the determinant is "
            f"{determinant[frame]:.2g} (1 for a rotation)."
        )


def check_intrinsics(intrinsics: Tensor, num_frames: int, name: str = "intrinsics") -> None:
    """Refuse invalid intrinsics for a path of ``num_frames`` poses.

    Args:
        intrinsics: expected ``[num_frames, 4]``, floating point: fx, fy, cx, cy.
        num_frames: number of poses.
        name: their name in the message.

    Raises:
        ValueError: another shape, type or length, a value that is not finite, a focal length that
            is not positive, or a view wider than ``MAX_VIEW_DEGREES``; the message names the first
            such frame.
    """
    if intrinsics.ndim != 2 or intrinsics.shape[1] != 4 or not intrinsics.is_floating_point():
        raise ValueError(
            f"{name}: intrinsics must be floating point [frames, 4] (fx, fy, cx, cy); "
            f"got {intrinsics.dtype} {list(intrinsics.shape)}."
        )
    if len(intrinsics) != num_frames:
        raise ValueError(
            f"{name}: {len(intrinsics)} rows of intrinsics for {num_frames} poses; "
            "there must be one row per pose."
        )
    frame = _first_frame(~intrinsics.isfinite().all(1))
    if frame is not None:
        raise ValueError(f"{name}: the intrinsics of frame {frame} are not finite.")
    frame = _first_frame((intrinsics.abs() > MAX_PIXELS).any(1))
    if frame is not None:
        raise ValueError(
            f"{name}: the intrinsics of frame {frame} have {intrinsics[frame].abs().max():g} "
            f"pixels; at most {MAX_PIXELS:g} are allowed."
        )
    frame = _first_frame((intrinsics[:, :2] <= 0).any(1))
    if frame is not None:
        raise ValueError(
            f"{name}: the focal lengths of frame {frame} are {intrinsics[frame, 0]:g} and "
            f"{intrinsics[frame, 1]:g}; they must be positive."
        )
    least = intrinsics.new_tensor([INTRINSICS_WIDTH, INTRINSICS_HEIGHT]) / 2
    least = least / math.tan(math.radians(MAX_VIEW_DEGREES / 2))
    frame = _first_frame((intrinsics[:, :2] < least).any(1))
    if frame is not None:
        fx, fy = intrinsics[frame, :2].tolist()
        view = max(math.atan(INTRINSICS_WIDTH / 2 / fx), math.atan(INTRINSICS_HEIGHT / 2 / fy))
        raise ValueError(
            f"{name}: the focal lengths of frame {frame}, {fx:g} and {fy:g}, give a view of "
            f"{2 * math.degrees(view):.0f} degrees; at most {MAX_VIEW_DEGREES} are allowed. Give "
            f"fx of at least {math.ceil(least[0])} and fy of at least {math.ceil(least[1])}, in "
            f"pixels of a {INTRINSICS_HEIGHT}x{INTRINSICS_WIDTH} image, not in fractions of it."
        )


def _first_frame(wrong: Tensor) -> int | None:
    frames = wrong.nonzero()
    return int(frames[0]) if len(frames) else None


def invert_poses(poses: Tensor) -> Tensor:
    """Inverses ``[*, 4, 4]`` of rigid motions: transposed rotation, rotated-back translation."""
    rotation = poses[..., :3, :3].mT
    inverse = torch.zeros_like(poses)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -(rotation @ poses[..., :3, 3:])
    inverse[..., 3, 3] = 1
    return inverse


def resample_poses(poses: Tensor, num_frames: int) -> Tensor:
    """Resample a path evenly to another number of frames, keeping its ends.

    Positions are interpolated linearly, rotations along the shorter great arc between neighbours.

    Args:
        poses: ``[F, 4, 4]``.
        num_frames: T, at least 1.

    Returns:
        ``[T, 4, 4]`` float64.
    """
    wide = poses.double()
    before, after, weight = _places(len(wide), num_frames, poses.device)
    quaternions = quaternions_of(wide[:, :3, :3])
    resampled = torch.eye(4, dtype=torch.float64, device=poses.device).repeat(num_frames, 1, 1)
    turned = slerp(quaternions[before], quaternions[after], weight)
    resampled[:, :3, :3] = rotations_of(turned)
    resampled[:, :3, 3] = torch.lerp(wide[before, :3, 3], wide[after, :3, 3], weight)
    return resampled


def resample_intrinsics(intrinsics: Tensor, num_frames: int) -> Tensor:
    """Resample intrinsics ``[F, 4]`` linearly, like poses; a single row applies to all frames.

    Args:
        intrinsics: of as many frames as the path.
        num_frames: T, at least 1.

    Returns:
        ``[T, 4]`` float32; rows that are all the same stay as they are.

    Source: Robbyant/lingbot-world, wan/utils/cam_utils.py, resample_camera_intrinsics.
    """
    wide = intrinsics.double()
    before, after, weight = _places(len(wide), num_frames, intrinsics.device)
    return torch.lerp(wide[before], wide[after], weight).float()


def _places(count: int, num_frames: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Evenly spread positions among ``count`` frames: neighbours ``[T]`` and weight ``[T, 1]``."""
    last = count - 1
    place = torch.linspace(0, last, num_frames, dtype=torch.float64, device=device)
    before = place.floor().long().clamp(max=max(last - 1, 0))
    after = (before + 1).clamp(max=last)
    return before, after, (place - before)[:, None]


def quaternions_of(rotations: Tensor) -> Tensor:
    """Unit quaternions ``[*, 4]`` (w, x, y, z), up to sign, of rotations ``[*, 3, 3]``.

    The eigenvector of the largest eigenvalue gives the nearest rotation if rounding has spoilt
    the matrix.

    Source: Bar-Itzhack, New method for extracting the quaternion from a rotation matrix, 2000.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotations.unbind(-2))
    rows = [
        torch.stack(row, dim=-1)
        for row in (
            (a + e + i, h - f, c - g, d - b),
            (h - f, a - e - i, b + d, c + g),
            (c - g, b + d, e - a - i, f + h),
            (d - b, c + g, f + h, i - a - e),
        )
    ]
    return torch.linalg.eigh(torch.stack(rows, dim=-2)).eigenvectors[..., -1]


def rotations_of(quaternions: Tensor) -> Tensor:
    """Rotations ``[*, 3, 3]`` of unit quaternions ``[*, 4]`` (w, x, y, z)."""
    w, x, y, z = quaternions.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Unit quaternions at ``weight`` of the way along the shorter arc.

    Args:
        start: ``[*, 4]``.
        end: ``[*, 4]``.
        weight: ``[*, 1]`` in [0, 1].
    """
    cosine = (start * end).sum(-1, keepdim=True)
    end = torch.where(cosine < 0, -end, end)
    # The chord is accurate where the cosine loses all digits.
    half = torch.asin(((end - start).norm(dim=-1, keepdim=True) / 2).clamp(max=1))
    sine = (2 * half).sin()
    straight = sine < 1e-12
    sine = torch.where(straight, torch.ones_like(sine), sine)
    first = torch.where(straight, 1 - weight, (2 * half * (1 - weight)).sin() / sine)
    second = torch.where(straight, weight, (2 * half * weight).sin() / sine)
    mixed = first * start + second * end
    return mixed / mixed.norm(dim=-1, keepdim=True)


def relative_poses(poses: Tensor) -> Tensor:
    """The motion of every frame as seen from the frame before it; the first is the identity.

    Args:
        poses: ``[T, 4, 4]`` camera-to-world.

    Returns:
        ``[T, 4, 4]``, same dtype: the pose of frame t in the camera axes of frame t - 1.
    """
    # Via the first frame, so that a world with a distant origin rounds as in the
    # reference.
    from_first = invert_poses(poses[:1]) @ poses
    from_first[0] = torch.eye(4, dtype=poses.dtype, device=poses.device)
    steps = from_first.clone()
    steps[1:] = invert_poses(from_first[:-1]) @ from_first[1:]
    return steps


def clip_poses(poses: Tensor, latent_frames: int) -> Tensor:
    """Relative poses of a whole clip that is known in advance.

    The path is resampled to the latent frames and made relative, and translations are divided by
    the largest of them. float32 from the resampling on, like the reference; positions are counted
    from the first one before they are rounded, so that a distant origin costs no precision.

    Args:
        poses: ``[F, 4, 4]``, one pose per pixel frame.
        latent_frames: T.

    Returns:
        ``[T, 4, 4]`` float32.

    Source: Robbyant/lingbot-world, wan/utils/cam_utils.py and wan/image2video_fast.py.
    """
    path = resample_poses(poses, latent_frames)
    path[:, :3, 3] -= path[0, :3, 3].clone()
    steps = relative_poses(path.float())
    largest = steps[:, :3, 3].norm(dim=-1).max()
    if largest > 0:
        steps[:, :3, 3] /= largest
    return steps


def pick_frames(autoregressive_index: int) -> slice:
    """The pixel frames of an AR step that represent its latent frames.

    Of the first step, which begins with a single frame, every fourth from that one on; of later
    steps the last of every four. Over the rollout these are frames 0, 4, 8, ...
    """
    return slice(0 if autoregressive_index == 0 else TIME_FACTOR - 1, None, TIME_FACTOR)


def chunk_poses(picked: Tensor, anchor: Tensor | None, world_scale: float) -> Tensor:
    """Relative poses of one chunk, without the poses of later chunks.

    Args:
        picked: ``[T, 4, 4]``, the poses of the chunk's latent frames.
        anchor: ``[4, 4]``, the last pose of the previous AR step; None for the first.
        world_scale: factor on translations. The inverse of the clip's largest step gives what
            ``clip_poses`` gives.

    Returns:
        ``[T, 4, 4]`` float32; computed in float64.
    """
    path = picked.double() if anchor is None else torch.cat([anchor[None], picked]).double()
    steps = relative_poses(path)[len(path) - len(picked) :]
    steps[:, :3, 3] *= world_scale
    return steps.float()


def scale_intrinsics(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Scale intrinsics ``[T, 4]``, which refer to 480x832 pixels, to another image size."""
    x, y = width / INTRINSICS_WIDTH, height / INTRINSICS_HEIGHT
    return intrinsics * intrinsics.new_tensor([x, y, x, y])


def camera_rays(
    poses: Tensor,
    intrinsics: Tensor,
    height: int,
    width: int,
    *,
    with_origins: bool = True,
) -> Tensor:
    """Where every pixel's ray begins and where it goes.

    Args:
        poses: ``[T, 4, 4]``.
        intrinsics: ``[T, 4]`` in pixels of this picture size.
        height: in pixels.
        width: in pixels.
        with_origins: whether the origins come before the directions.

    Returns:
        ``[T, 6 or 3, height, width]``: origin x, y, z, then the unit direction x, y, z through
        the pixel's centre, in the dtype of ``poses``.

    Source: Robbyant/lingbot-world, wan/utils/cam_utils.py (origins instead of moments).
    """
    columns = torch.arange(width, dtype=poses.dtype, device=poses.device)
    rows = torch.arange(height, dtype=poses.dtype, device=poses.device)[:, None]
    fx, fy, cx, cy = intrinsics.to(poses).view(-1, 4, 1, 1).unbind(1)
    x = ((columns + 0.5 - cx) / fx).expand(-1, height, width)
    y = ((rows + 0.5 - cy) / fy).expand(-1, height, width)
    local = torch.stack([x, y, torch.ones_like(x)], dim=1)
    local = local / local.norm(dim=1, keepdim=True)
    directions = (poses[:, :3, :3] @ local.flatten(2)).unflatten(2, (height, width))
    if not with_origins:
        return directions
    origins = poses[:, :3, 3, None, None].expand_as(directions)
    return torch.cat([origins, directions], dim=1)


def to_tokens(pixels: Tensor, patch_size: int = 2) -> Tensor:
    """Fold per-pixel channels into tokens.

    Args:
        pixels: ``[T, C, height, width]``, sides multiples of ``8 * patch_size``.
        patch_size: latent rows and columns of a token.

    Returns:
        ``[T * rows * columns, C * 64 * patch_size**2]``: frame by frame, row by row; of a token
        first the channel, then the pixel in the latent pixel, then the latent pixel.
    """
    per_latent = F.pixel_unshuffle(pixels, SPATIAL_FACTOR)
    return F.pixel_unshuffle(per_latent, patch_size).movedim(1, -1).flatten(0, 2)
