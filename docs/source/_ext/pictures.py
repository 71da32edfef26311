"""Pictures of the toy world for the README and the site, made with the shipped weights.

``PYTHONPATH=. python docs/source/_ext/pictures.py`` writes ``toy-world.png`` (truth over model,
held-out walks) and ``toy-world.webp`` (a clip, truth on the left) into ``docs/source/_static``.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE, TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.render import render
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

STATIC = Path(__file__).parents[1] / "_static"
CLIP_FRAMES = 128
CLIP_SCALE = 3


def write_sheet(pipeline: StreamInferencePipeline, path: Path) -> None:
    """Three held-out walks of six seconds, truth over model."""
    walks = draw_held_out(3, 6 * FPS, EVALUATION_SEED + 1)
    sheet = contact_sheet(self_rollout(pipeline, walks, walks.scene), walks.truth)
    Image.fromarray(sheet.numpy()).save(path, optimize=True)


def write_clip(pipeline: StreamInferencePipeline, path: Path) -> None:
    """The walk that ``flashdreams-run toy-world`` shows, truth on the left."""
    prompt = TOY_WORLD_RUNNER.prompt
    poses = walk(TOY_WORLD_RUNNER.actions, CLIP_FRAMES)
    cache = pipeline.initialize_cache(text=[prompt], seed=0)
    scene = scene_from_text(prompt)[None]
    frames = []
    for i, pose in enumerate(poses):
        chunk = pipeline.generate(autoregressive_index=i, cache=cache, input=pose[None])
        pipeline.finalize(autoregressive_index=i, cache=cache)
        truth = render(scene, camera_to_pose(pose)[None].float())
        frames.append(picture(torch.cat([truth[0], chunk[0, 0]], dim=-1)))
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, quality=55,
        method=6,
    )  # fmt: skip


def picture(frame: Tensor) -> Image.Image:
    """An enlarged picture of a frame ``[3, height, width]`` in [-1, 1]."""
    pixels = ((frame.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    size = (image.width * CLIP_SCALE, image.height * CLIP_SCALE)
    return image.resize(size, Image.Resampling.BICUBIC)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = TOY_WORLD_PIPELINE.setup(device="cpu")
    write_sheet(world, STATIC / "toy-world.png")
    write_clip(world, STATIC / "toy-world.webp")
