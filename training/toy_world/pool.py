"""A pool of rendered clips on disk, as latents; one process fills it while others train from it."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashdreams.integrations.toy_world.codec import LATENT_CHANNELS, PatchEncoder
from flashdreams.integrations.toy_world.render import render
from flashdreams.integrations.toy_world.scene import NUM_SLOTS, random_scene
from training.toy_world.walks import random_pose, random_rollout

CLIP_FRAMES = 16
"""Frames of a clip. Frame 0 is the anchor: half of the time it is the frame before frame 1, else a
frame of the same scene seen from anywhere, as the sink frame of a long rollout is."""
GRID = 8
"""Latent rows and columns."""


class ClipPool:
    """Memory-mapped clips: ``latent [N, F, C, 8, 8]``, ``scene [N, 10]``, ``pose [N, F, 3]``."""

    def __init__(self, folder: Path, clips: int = 0) -> None:
        """Open the pool in ``folder``; ``clips`` > 0 makes a new, empty one of that size."""
        folder.mkdir(parents=True, exist_ok=True)
        self.filled_path = folder / "filled.txt"
        mode: Literal["w+", "r+"] = "w+" if clips else "r+"
        if clips:
            self.filled_path.write_text("0")
            (folder / "clips.txt").write_text(str(clips))
        count = int((folder / "clips.txt").read_text())

        def array(name: str, dtype: str, *shape: int) -> np.memmap:
            return np.memmap(folder / name, dtype=dtype, mode=mode, shape=(count, *shape))

        self.latent = array("latent", "float16", CLIP_FRAMES, LATENT_CHANNELS, GRID, GRID)
        self.pose = array("pose", "float32", CLIP_FRAMES, 3)
        self.scene = array("scene", "int8", NUM_SLOTS)

    def filled(self) -> int:
        """Clips that may be read."""
        return int(self.filled_path.read_text())

    def mark_filled(self, clips: int) -> None:
        """Say that the first ``clips`` clips may be read; readers see the old or the new number."""
        fresh = self.filled_path.with_suffix(".new")
        fresh.write_text(str(clips))
        fresh.replace(self.filled_path)

    def sample(self, batch: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random clips.

        Returns:
            Latents ``[B, C, F, 8, 8]``, scenes ``[B, 10]`` int64, poses ``[B, F, 3]``.
        """
        picked = np.sort(random.integers(0, self.filled(), batch))
        latent = torch.from_numpy(self.latent[picked].astype("float32")).transpose(1, 2)
        scene = torch.from_numpy(self.scene[picked].astype("int64"))
        return latent, scene, torch.from_numpy(self.pose[picked])


def random_clips(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes ``[B, 10]`` and camera paths ``[B, CLIP_FRAMES, 3]`` with their anchors."""
    scene = random_scene(batch, generator)
    pose = random_rollout(batch, CLIP_FRAMES, generator)
    far = torch.rand(batch, generator=generator) < 0.5
    pose[far, 0] = random_pose(batch, generator)[far]
    return scene, pose


@torch.no_grad()
def fill(pool: ClipPool, encoder: PatchEncoder, seed: int, batch: int = 32) -> None:
    """Render and encode clips until the pool is full."""
    generator = torch.Generator().manual_seed(seed)
    total = len(pool.scene)
    for start in range(0, total, batch):
        count = min(batch, total - start)
        scene, pose = random_clips(count, generator)
        frames = render(scene.repeat_interleave(CLIP_FRAMES, 0), pose.flatten(0, 1))
        latent = encoder(frames)[:, :, 0].unflatten(0, (count, CLIP_FRAMES))
        part = slice(start, start + count)
        pool.latent[part] = latent.half().numpy()
        pool.scene[part] = scene.numpy()
        pool.pose[part] = pose.numpy()
        pool.mark_filled(start + count)
