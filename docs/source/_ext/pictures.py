"""Pictures of the embedded worlds for the README and the site, made with the shipped weights.

``PYTHONPATH=. python docs/source/_ext/pictures.py`` writes, into ``docs/source/_static``, for
``toy-world`` and ``courtyard`` each a ``.png`` (truth over model, held-out walks) and a ``.webp``
(a clip of the default command, truth on the left).
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world.config import COURTYARD_RUNNER, TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.runner import walk
from flashdreams.integrations.toy_world.scene import scene_from_text
from flashdreams.integrations.toy_world.world import camera_to_pose
from training.toy_world.evaluate import (
    EVALUATION_SEED,
    FPS,
    contact_sheet,
    draw_held_out,
    self_rollout,
)
from training.toy_world.worlds import WORLDS

STATIC = Path(__file__).parents[1] / "_static"
CLIP_FRAMES = 128
CLIP_HEIGHT = 192
RUNNERS = {"toy-world": TOY_WORLD_RUNNER, "courtyard": COURTYARD_RUNNER}


def write_sheet(name: str, pipeline: StreamInferencePipeline) -> None:
    """Three held-out walks of six seconds, truth over model."""
    world = WORLDS[name]
    walks = draw_held_out(3, 6 * FPS, EVALUATION_SEED + 1, world)
    frames = self_rollout(pipeline, walks, walks.scene)
    sheet = contact_sheet(frames, walks.truth, scale=128 // world.size[0])
    Image.fromarray(sheet.numpy()).save(STATIC / f"{name}.png", optimize=True)


def write_clip(name: str, pipeline: StreamInferencePipeline) -> None:
    """The walk of the default command, truth on the left."""
    world, runner = WORLDS[name], RUNNERS[name]
    poses = walk(runner.actions, CLIP_FRAMES)
    cache = pipeline.initialize_cache(text=[runner.prompt], seed=0)
    scene = scene_from_text(runner.prompt)[None]
    frames = []
    for i, pose in enumerate(poses):
        chunk = pipeline.generate(autoregressive_index=i, cache=cache, input=pose[None])
        pipeline.finalize(autoregressive_index=i, cache=cache)
        truth = world.draw(scene, camera_to_pose(pose)[None].float(), world.size)
        frames.append(picture(torch.cat([truth[0], chunk[0, 0]], dim=-1)))
    frames[0].save(
        STATIC / f"{name}.webp", save_all=True, append_images=frames[1:], duration=1000 // FPS,
        loop=0, quality=55, method=6,
    )  # fmt: skip


def picture(frame: Tensor) -> Image.Image:
    """An enlarged picture of a frame ``[3, height, width]`` in [-1, 1]."""
    pixels = ((frame.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    size = (image.width * CLIP_HEIGHT // image.height, CLIP_HEIGHT)
    return image.resize(size, Image.Resampling.BICUBIC)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for slug, shipped in WORLDS.items():
        shown = shipped.pipeline.setup(device="cpu")
        write_sheet(slug, shown)
        write_clip(slug, shown)
