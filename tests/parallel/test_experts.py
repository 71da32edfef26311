"""Two networks by noise level on several ranks: equality, and each rank's part of two files."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.infra.config import derive_config
from flashdreams.integrations.lingbot_world.config import BASE_TINY_PIPELINE
from flashdreams.integrations.lingbot_world.encoder import CameraPath
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.actions import KeyMotion, integrate, parse_actions
from flashdreams.runtime.checkpoint import CheckpointConfig
from flashdreams.runtime.image_file import gradient_image
from tests.harness import run_ranks
from tests.parallel.rollout import relative_error

FLOAT32_TOLERANCE = 1e-5
STRATEGIES = [
    {"cfg_parallel_degree": 2},
    {"cfg_parallel_degree": 1, "ulysses_degree": 2},
    {"cfg_parallel_degree": 1, "ulysses_degree": 1, "ring_degree": 2},
    {"cfg_parallel_degree": 1, "tensor_parallel_degree": 2},
]


def config_of(folder: Path):
    """Latents of 8x10 in 6 frames, and a file and a LoRA for each network."""
    files = {
        field: CheckpointConfig(source=str(folder / f"{name}.safetensors"))
        for field, name in (("checkpoint", "high"), ("low_noise_checkpoint", "low"))
    }
    loras = dict(loras=(f"{folder}/lora.safetensors",))
    loras |= dict(low_noise_loras=(f"{folder}/lora.safetensors:-0.5",))
    return derive_config(
        BASE_TINY_PIPELINE,
        diffusion_model=dict(transformer=dict(latent_width=10, **files, **loras)),
    )


def write_weights(folder: Path) -> None:
    """Random ones; nothing stays at zero."""
    config = derive_config(
        config_of(folder).diffusion_model.transformer,
        **dict(checkpoint=None, low_noise_checkpoint=None, loras=(), low_noise_loras=()),
    )
    torch.manual_seed(0)
    model = config.setup()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.high_noise.state_dict(), folder / "high.safetensors")
    save_file(model.low_noise.state_dict(), folder / "low.safetensors")
    update = {}
    for name in ("self_attn.q", "self_attn.o", "ffn.0", "ffn.2"):  # cut by rows and by columns
        rows, columns = model.high_noise.blocks[0].get_submodule(name).weight.shape
        stem = f"diffusion_model.blocks.0.{name}"
        update[f"{stem}.lora_A.weight"] = torch.randn(2, columns)
        update[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows, 2)
    save_file(update, folder / "lora.safetensors")


def roll_out(config, strategy: dict, world_size: int, camera: bool = True):
    """The clip's latent, parameters that this rank holds, and how many layers were cut."""
    if not camera:
        config = derive_config(config, encoder=None)
    parallel = ParallelConfig(**strategy)
    pipeline = config.setup(device="cpu", load=False)
    heads = config.diffusion_model.transformer.num_heads
    degrees = resolve_degrees(parallel, world_size, heads, True)
    reports = pipeline.parallelize(build_mesh(degrees, "cpu", parallel))
    pipeline.load()
    poses = integrate(
        parse_actions("w12 l8"), KeyMotion(move_per_frame=0.25, turn_per_frame_rad=0.03)
    )
    path = CameraPath(poses, torch.tensor([477.0, 477.0, 416.0, 240.0]).expand(len(poses), 4))
    context = {"camera": path} if camera else {}
    cache_ = pipeline.initialize_cache(
        text=["a fox"], negative_text=["fog"], image=gradient_image(64, 80), **context
    )
    pipeline.generate(0, cache_)
    transformer = pipeline.diffusion_model.transformer
    held = sum(p.numel() for p in transformer.parameters())
    return cache_.diffusion.latent, held, len(reports["transformer"].slices)


def all_strategies(folder: Path):
    return [roll_out(config_of(folder), strategy, 2) for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    write_weights(path)
    return path


@cache
def one_rank(folder: Path, camera: bool = True):
    return roll_out(config_of(folder), {}, 1, camera)


def test_two_ranks_make_the_clip_of_one(folder):
    expected, whole, _ = one_rank(folder)
    for found in run_ranks(all_strategies, 2, folder):
        for (latent, held, cut), strategy in zip(found, STRATEGIES, strict=True):
            error = relative_error([latent], [expected])
            assert error <= FLOAT32_TOLERANCE, (strategy, error)
            tensor = strategy.get("tensor_parallel_degree", 1) > 1
            assert (held < 0.9 * whole, cut > 0) == (tensor, tensor)


def without_a_camera(folder: Path):
    return [
        roll_out(config_of(folder), strategy, 2, camera=False)[0] for strategy in STRATEGIES[1::2]
    ]


def test_two_ranks_make_the_clip_without_a_camera(folder):
    expected, with_camera = one_rank(folder, False)[0], one_rank(folder)[0]
    for found in run_ranks(without_a_camera, 2, folder):
        for latent in found:
            assert relative_error([latent], [expected]) <= FLOAT32_TOLERANCE
            assert relative_error([latent], [with_camera]) > 1e-3  # negative control


def swapped_files(folder: Path):
    config = config_of(folder)
    c = config.diffusion_model.transformer
    files = dict(checkpoint=c.low_noise_checkpoint, low_noise_checkpoint=c.checkpoint)
    config = derive_config(config, diffusion_model=dict(transformer=files))
    return roll_out(config, STRATEGIES[3], 2)[0]


def test_swapped_weights_are_seen(folder):
    """Negative control."""
    for latent in run_ranks(swapped_files, 2, folder):
        assert relative_error([latent], [one_rank(folder)[0]]) > 1e-3
