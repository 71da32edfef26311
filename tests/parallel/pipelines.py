"""Rollouts of whole pipelines, in pieces, on any number of ranks."""

from dataclasses import replace
from functools import cache

import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.recompute import numerics_difference
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import run_ranks
from tests.tiny import TEXT_DIM, tiny_pipeline

PIECES = ((1, 2), (2, 4), (4, 5), (1, 7))
"""(ranks, AR step at which the next piece begins)."""


def _wan_decoded():
    decoder = WanVAEDecoderConfig(
        dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,),
        latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
    )  # fmt: skip
    return derive_config(tiny_pipeline(), decoder=decoder)


def build_case(case: str):
    """The pipeline config of a case, and how ranks share it."""
    parallel = ParallelConfig()
    config = tiny_pipeline()
    if case == "relative_rope":
        config = tiny_pipeline(relative_rope=True, sink_size_t=2, window_size_t=3)
    elif case == "guided":
        config = derive_config(config, diffusion_model=dict(guidance_scale=3.0))
    elif case.endswith("_decode"):
        config = _wan_decoded()
        parallel = ParallelConfig(decode=case.removesuffix("_decode"))
    elif case == "rotate":
        parallel = ParallelConfig(ulysses_degree=1, ring_method="rotate")
    elif case == "tensor":
        config = derive_config(config, diffusion_model=dict(guidance_scale=3.0))
        parallel = ParallelConfig(tensor_parallel_degree=2)
    elif case == "toy_world":
        from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE

        config = TOY_WORLD_PIPELINE
    return config, parallel


def build_pipeline(case: str, world_size: int, strict: bool = False, **changes):
    """The pipeline of a case, cut over the ranks that there are."""
    config, parallel = build_case(case)
    config = derive_config(config, **changes)
    if world_size == 1:
        parallel = ParallelConfig()
    elif case == "tensor" and world_size == 4:
        parallel = replace(parallel, cfg_parallel_degree=2)
    parallel = replace(parallel, strict=strict)
    guided = config.diffusion_model.guidance_scale is not None
    heads = config.diffusion_model.transformer.num_heads
    degrees = resolve_degrees(parallel, world_size, heads, guided)
    pipeline = config.setup(device="cpu", load=False)
    reports = pipeline.parallelize(build_mesh(degrees, "cpu", parallel))
    pipeline.load()
    return pipeline, reports


def prompt(number: int) -> torch.Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(number))


def begin(pipeline, case: str, **context):
    if case == "toy_world":
        return pipeline.initialize_cache(text=["red floor, gold pillars, dusk sky"], seed=3)
    negative = prompt(9) if pipeline.config.diffusion_model.guidance_scale is not None else None
    return pipeline.initialize_cache(text=prompt(0), negative_text=negative, seed=3, **context)


def control(case: str, index: int):
    if case != "toy_world":
        return 0.1 * index
    from flashdreams.integrations.toy_world.runner import walk

    return walk("w4 d4", 8)[index][None]


@torch.no_grad()
def roll(case, world_size, first, last, state, strict=False, switch_at=None, lose=None):
    """AR steps ``first`` to ``last - 1``, from a state if there is one: latents, frames, state."""
    pipeline, _ = build_pipeline(case, world_size, strict)
    if state is not None and lose is not None:
        state["tensors"][lose] = torch.zeros_like(state["tensors"][lose])
    rank = torch.distributed.get_rank()
    given = state if rank == 0 else None
    cache = begin(pipeline, case) if state is None else pipeline.load_cache(given)
    latents, frames = [], []
    for index in range(first, last):
        if index == switch_at:
            pipeline.update_prompt(cache, prompt(5), reencode_window=True)
        chunk = pipeline.generate(index, cache, control(case, index))
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
        frames.append(chunk.clone())
    return latents, frames, cache.state_dict()


@torch.no_grad()
def roll_from_files(case, world_size, first, last, folder, strict=False):
    """The same through snapshots: resumes ``folder/<first>`` and saves ``folder/<last>``.

    In place of the state it returns how far the last saved chunk is from what these ranks make.
    """
    pipeline, _ = build_pipeline(case, world_size, strict)
    cache = begin(pipeline, case) if first == 0 else pipeline.resume(folder / str(first))
    difference = numerics_difference(pipeline.diffusion_model, cache.diffusion) if first else 0.0
    latents, frames = [], []
    for index in range(first, last):
        chunk = pipeline.generate(index, cache, control(case, index))
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
        frames.append(chunk.clone())
    pipeline.save(cache, folder / str(last))
    return latents, frames, difference


@cache
def stayed(case: str, strict: bool = False, switch_at: int | None = None):
    """Latents and frames of the rollout that never moves."""
    last = PIECES[-1][1]
    return run_ranks(roll, 1, case, 1, 0, last, None, strict, switch_at)[0][:2]


def moved(case: str, strict: bool = False, switch_at: int | None = None, lose: str | None = None):
    """Latents and frames of the same rollout, moved from ranks to ranks."""
    latents, frames, state, first = [], [], None, 0
    for ranks, last in PIECES:
        done = run_ranks(roll, ranks, case, ranks, first, last, state, strict, switch_at, lose)
        assert all(other[2] is None for other in done[1:])
        more, chunks, state = done[0]
        latents, frames, first = latents + more, frames + chunks, last
    return latents, frames


def moved_by_files(case: str, folder, strict: bool = False):
    """Latents and frames of the same rollout, through snapshots from ranks to ranks."""
    latents, frames, first = [], [], 0
    for ranks, last in PIECES:
        more, chunks, difference = run_ranks(
            roll_from_files, ranks, case, ranks, first, last, folder, strict
        )[0]
        assert difference <= (0.0 if strict else 1e-5)
        latents, frames, first = latents + more, frames + chunks, last
    return latents, frames
