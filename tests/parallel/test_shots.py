"""Pinned frames and shots on several ranks; float32."""

import torch

from flashdreams.integrations.longlive.config import TINY_PIPELINE
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import run_ranks


def roll(world_size: int, parallel: ParallelConfig):
    pipeline = TINY_PIPELINE.setup(device="cpu", load=False)
    heads = TINY_PIPELINE.diffusion_model.transformer.num_heads
    pipeline.parallelize(build_mesh(resolve_degrees(parallel, world_size, heads), "cpu", parallel))
    pipeline.load()
    cache = pipeline.initialize_cache(text=torch.ones(1, 4, 32), seed=1)
    latents = []
    for index in range(7):
        if index in (1, 4):
            text = torch.full((1, 4, 32), float(index))
            pipeline.update_prompt(cache, text, begins_shot=True)
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
    return torch.stack(latents)


def test_shots_are_the_same_on_several_ranks():
    expected = run_ranks(roll, 1, 1, ParallelConfig())[0]
    ways = {
        "tensor": ParallelConfig(tensor_parallel_degree=2),
        "ulysses": ParallelConfig(ulysses_degree=2),
        "gather": ParallelConfig(ulysses_degree=1, ring_degree=2),
        "rotate": ParallelConfig(ulysses_degree=1, ring_degree=2, ring_method="rotate"),
    }
    for name, parallel in ways.items():
        for found in run_ranks(roll, 2, 2, parallel):
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= 1e-5, name
