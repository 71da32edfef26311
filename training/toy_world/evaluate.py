"""Compares self-rollouts of the toy world with the rendered ground truth.

``python -m training.toy_world.evaluate`` prints the table of the README and writes
a picture, truth above model. Scenes and walks use a seed that training never uses.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world.metrics import psnr_db
from flashdreams.integrations.toy_world.scene import (
    FLOOR_SLOT,
    HIDDEN,
    SKY_SLOT,
    random_scene,
    scene_to_text,
)
from flashdreams.integrations.toy_world.world import pose_to_camera
from training.toy_world.walks import random_rollout
from training.toy_world.worlds import WORLDS, World

FPS = 16
EVALUATION_SEED = 20_000


@dataclass
class HeldOut:
    """Scenes ``[B, 10]``, poses ``[B, F, 3]`` and true frames ``[B, F, 3, h, w]`` of some walks."""

    scene: Tensor
    pose: Tensor
    truth: Tensor


def draw_held_out(
    walks: int,
    frames: int,
    seed: int = EVALUATION_SEED,
    world: World = WORLDS["toy-world"],
    device: str | torch.device = "cpu",
) -> HeldOut:
    """Draw scenes and walks and render their frames; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    scene = random_scene(walks, generator)
    pose = random_rollout(walks, frames, generator)
    scene, pose = scene.to(device), pose.to(device)
    truth = world.draw(scene.repeat_interleave(frames, 0), pose.flatten(0, 1), world.size)
    return HeldOut(scene, pose, truth.unflatten(0, (walks, frames)))


def self_rollout(
    pipeline: StreamInferencePipeline,
    walks: HeldOut,
    prompt: Tensor,
    image: Tensor | None = None,
    wipe: bool = False,
    seed: int = 0,
) -> Tensor:
    """Generate every frame from the model's own earlier frames.

    Args:
        pipeline: the toy world.
        walks: walks whose poses are followed.
        prompt: ``[B, 10]`` scenes given to the model; slots may be hidden.
        image: ``[B, 3, h, w]``, given as the first frame.
        wipe: clear all earlier frames before each frame, including the first frame.
        seed: seed of the noise.

    Returns:
        ``[B, F, 3, h, w]``; latents ``[B, C, F, h / 8, w / 8]`` from a pipeline without a decoder.
    """
    text = [scene_to_text(scene) for scene in prompt.cpu()]
    cameras = pose_to_camera(walks.pose).float()
    cache = pipeline.initialize_cache(text=text, image=image, seed=seed)
    frames = []
    for i in range(walks.pose.shape[1]):
        if wipe and i > 0:
            cache = pipeline.initialize_cache(text=text, seed=seed)
        index = 0 if wipe else i
        frames.append(pipeline.generate(index, cache, input=cameras[:, i : i + 1]))
        if not wipe:
            pipeline.finalize(index, cache)
    return torch.cat(frames, dim=1 if pipeline.decoder is not None else 2)


def hide_floor_and_sky(scene: Tensor) -> Tensor:
    """Hide the parts of prompts that the first frame shows: the floor and the sky."""
    hidden = scene.clone()
    hidden[:, [FLOOR_SLOT, SKY_SLOT]] = HIDDEN
    return hidden


def evaluate(pipeline: StreamInferencePipeline, walks: HeldOut) -> dict[str, float]:
    """The figures of the README, PSNR in dB averaged over frames and walks."""
    truth, edge = walks.truth, 5 * FPS
    model = psnr_db(self_rollout(pipeline, walks, walks.scene), truth)
    repeat = psnr_db(truth[:, :1].expand_as(truth), truth)[:, 1:]
    mean_frame = psnr_db(truth.mean(1, keepdim=True).expand_as(truth), truth)
    hidden, first = hide_floor_and_sky(walks.scene), truth[:, 0]
    kept = psnr_db(self_rollout(pipeline, walks, hidden, first), truth)[:, 1:]
    wiped = psnr_db(self_rollout(pipeline, walks, hidden, first, wipe=True), truth)[:, 1:]
    figures = {
        "model": model.mean(),
        "model_first_5s": model[:, :edge].mean(),
        "model_last_5s": model[:, -edge:].mean(),
        "repeat_first_frame": repeat.mean(),
        "mean_frame": mean_frame.mean(),
        "hidden_slots": kept.mean(),
        "hidden_slots_last_5s": kept[:, -edge:].mean(),
        "hidden_slots_wiped": wiped.mean(),
        "hidden_slots_wiped_last_5s": wiped[:, -edge:].mean(),
    }
    return {name: round(float(value), 2) for name, value in figures.items()}


def contact_sheet(model: Tensor, truth: Tensor, columns: int = 8, scale: int = 2) -> Tensor:
    """Truth above model, one pair of rows per walk: uint8 ``[height, width, 3]``."""
    picked = torch.linspace(0, truth.shape[1] - 1, columns).round().long()
    rows = []
    for true, generated in zip(truth, model, strict=True):
        for frames in (true, generated):
            rows.append(torch.cat(list(frames[picked]), dim=-1))
    sheet = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return sheet.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def main() -> None:
    """Evaluate the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default="toy-world")
    parser.add_argument("--walks", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--steps", type=float, nargs="+", default=[1000.0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    scheduler = dict(denoising_timesteps=tuple(args.steps))
    world = WORLDS[args.world]
    config = derive_config(world.pipeline, diffusion_model=dict(scheduler=scheduler))
    pipeline = config.setup()
    walks = draw_held_out(args.walks, args.seconds * FPS, world=world)
    print(json.dumps(evaluate(pipeline, walks), indent=2))
    shown = draw_held_out(3, args.seconds * FPS, EVALUATION_SEED + 1, world)
    sheet = contact_sheet(self_rollout(pipeline, shown, shown.scene), shown.truth)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    import mediapy

    mediapy.write_image(args.output_dir / f"{args.world}-truth-over-model.png", sheet.numpy())


if __name__ == "__main__":
    main()
