"""The camera's path, seen from above, drawn into a corner of the video."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import invert_poses

SHARE = 4
"""The inset's side is the shorter side of the frame divided by this."""
POINTS_PER_FRAME = 8
"""Points drawn for the line between two poses."""
BACKGROUND, LINE, CAMERA = -0.8, (1.0, 1.0, 1.0), (1.0, -0.2, -0.6)


def plan_view(poses: Tensor) -> Tensor:
    """Positions from above, with the first camera looking up.

    Args:
        poses: ``[F, 4, 4]`` camera-to-world.

    Returns:
        ``[F, 2]`` float32 (row, column) in [0, 1], the path centred and its proportions kept.
    """
    wide = poses.double()
    seen = (invert_poses(wide[:1]) @ wide)[:, :3, 3]
    plane = torch.stack([-seen[:, 2], seen[:, 0]], dim=1)
    low, high = plane.amin(0), plane.amax(0)
    extent = (high - low).max().clamp(min=1e-9)
    return ((plane - (low + high) / 2) / extent + 0.5).float()


def draw_inset(chunk: Tensor, poses: Tensor, first_frame: int) -> Tensor:
    """Draw the path so far and the camera in the lower right corner of every frame.

    Args:
        chunk: ``[B, F, 3, height, width]`` in [-1, 1].
        poses: ``[frames, 4, 4]``, the whole path.
        first_frame: place of the chunk's first frame in the path.

    Returns:
        A copy of the chunk.
    """
    chunk = chunk.clone()
    side = max(min(chunk.shape[-2:]) // SHARE, 3)
    dense = F.interpolate(
        plan_view(poses).T[None],
        (len(poses) - 1) * POINTS_PER_FRAME + 1,
        mode="linear",
        align_corners=True,
    )[0].T
    places = (1 + dense * (side - 3)).round().long().to(chunk.device)
    line, camera = (chunk.new_tensor(colour)[:, None] for colour in (LINE, CAMERA))
    for t in range(chunk.shape[1]):
        panel = chunk[:, t, :, -side:, -side:]
        panel.lerp_(torch.full_like(panel, BACKGROUND), 0.6)
        now = (first_frame + t) * POINTS_PER_FRAME
        rows, columns = places[: now + 1].unbind(1)
        panel[:, :, rows, columns] = line
        row, column = places[now].tolist()
        panel[:, :, row - 1 : row + 2, column - 1 : column + 2] = camera[:, :, None]
    return chunk
