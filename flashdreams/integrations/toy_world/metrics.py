"""PSNR of frames against the ground truth."""

from torch import Tensor


def psnr_db(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of each frame: ``[..., 3, h, w]`` in [-1, 1] to ``[...]``."""
    error = (frames.float() - truth.float()).square().mean((-3, -2, -1)) / 4
    return -10 * error.clamp_min(1e-10).log10()
