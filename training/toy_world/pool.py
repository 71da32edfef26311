"""Rendered clips as latents: a pool on disk that one process fills while others train from it, or
one on the training device that is renewed while it is used."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from flashdreams.integrations.toy_world.codec import PatchEncoder
from flashdreams.integrations.toy_world.scene import NUM_SLOTS, random_scene
from training.toy_world.walks import random_pose, random_rollout
from training.toy_world.worlds import World

CLIP_FRAMES = 16
"""Frames of a clip. Frame 0 is the anchor: half of the time it is the frame before frame 1, else a
frame of the same scene from any pose, like the sink frame of a long rollout."""


class Clips(Protocol):
    """Source of a trainer's clips."""

    def sample(self, batch: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``[B, C, F, h, w]``, scenes ``[B, 10]`` int64, poses ``[B, F, 3]``."""


class ClipPool:
    """Memory-mapped clips: ``latent [N, F, C, h, w]``, ``scene [N, 10]``, ``pose [N, F, 3]``."""

    def __init__(self, folder: Path, world: World, clips: int = 0) -> None:
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

        self.latent = array("latent", "float16", CLIP_FRAMES, *_latent_shape(world))
        self.pose = array("pose", "float32", CLIP_FRAMES, 3)
        self.scene = array("scene", "int8", NUM_SLOTS)

    def filled(self) -> int:
        """Number of clips that may be read."""
        return int(self.filled_path.read_text())

    def mark_filled(self, clips: int) -> None:
        """Publish that the first ``clips`` clips may be read; readers see the old or new number."""
        fresh = self.filled_path.with_suffix(".new")
        fresh.write_text(str(clips))
        fresh.replace(self.filled_path)

    def sample(self, batch: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random clips.

        Returns:
            Latents ``[B, C, F, h, w]``, scenes ``[B, 10]`` int64, poses ``[B, F, 3]``.
        """
        picked = np.sort(random.integers(0, self.filled(), batch))
        latent = torch.from_numpy(self.latent[picked].astype("float32")).transpose(1, 2)
        scene = torch.from_numpy(self.scene[picked].astype("int64"))
        return latent, scene, torch.from_numpy(self.pose[picked])


def random_clips(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes ``[B, 10]`` and camera paths ``[B, CLIP_FRAMES, 3]`` with their anchors."""
    scene = random_scene(batch, generator)
    pose = random_rollout(batch, CLIP_FRAMES, generator)
    far = torch.rand(batch, generator=generator, device=generator.device) < 0.5
    pose[far, 0] = random_pose(batch, generator)[far]
    return scene, pose


@torch.no_grad()
def draw_clips(world: World, encoder: PatchEncoder, scene: Tensor, pose: Tensor) -> Tensor:
    """Render and encode clips: ``[B, CLIP_FRAMES, C, h, w]``."""
    frames = world.draw(scene.repeat_interleave(CLIP_FRAMES, 0), pose.flatten(0, 1), world.size)
    return encoder(frames)[:, :, 0].unflatten(0, (len(scene), CLIP_FRAMES))


def fill(pool: ClipPool, world: World, encoder: PatchEncoder, seed: int, batch: int = 32) -> None:
    """Render and encode clips until the pool is full."""
    generator = torch.Generator().manual_seed(seed)
    total = len(pool.scene)
    for start in range(0, total, batch):
        count = min(batch, total - start)
        scene, pose = random_clips(count, generator)
        part = slice(start, start + count)
        pool.latent[part] = draw_clips(world, encoder, scene, pose).half().numpy()
        pool.scene[part] = scene.numpy()
        pool.pose[part] = pose.numpy()
        pool.mark_filled(start + count)


class LiveClips:
    """A pool on the device of the encoder; every sample renews some of its clips."""

    def __init__(
        self, world: World, encoder: PatchEncoder, seed: int, clips: int = 2048, fresh: int = 8
    ) -> None:
        """Draw all clips.

        Args:
            world: world of the clips.
            encoder: encoder on the training device.
            seed: seed of scenes and walks.
            clips: number of clips in the pool, a multiple of ``fresh``.
            fresh: number of clips that each sample renews.
        """
        self.world, self.encoder, self.fresh = world, encoder, fresh
        device = encoder.mean.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.scene, self.pose = random_clips(clips, self.generator)
        shape = (clips, CLIP_FRAMES, *_latent_shape(world))
        self.latent = torch.empty(shape, dtype=torch.float16, device=device)
        self._order = torch.arange(clips, device=device).split(fresh)
        self._next = 0
        for part in self._order:
            self.latent[part] = self._drawn(part)

    def sample(self, batch: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """See `Clips`."""
        if self._next == 0:
            self._scene, self._pose = random_clips(len(self.scene), self.generator)
        part = self._order[self._next]
        self.scene[part], self.pose[part] = self._scene[part], self._pose[part]
        self.latent[part] = self._drawn(part)
        self._next = (self._next + 1) % len(self._order)
        picked = torch.from_numpy(random.integers(0, len(self.scene), batch))
        picked = picked.to(self.latent.device)
        latent = self.latent[picked].float().transpose(1, 2)
        return latent, self.scene[picked], self.pose[picked]

    def _drawn(self, part: Tensor) -> Tensor:
        drawn = draw_clips(self.world, self.encoder, self.scene[part], self.pose[part])
        return drawn.to(self.latent.dtype)


def _latent_shape(world: World) -> tuple[int, int, int]:
    c = world.transformer
    return c.in_channels, c.latent_height, c.latent_width
