"""Guidance over two ranks, alone and with the sequence axes; float32."""

import pytest
import torch
import torch.distributed as dist

from flashdreams.parallel.guidance import Guidance, build_guidance
from flashdreams.parallel.mesh import Mesh, ParallelConfig, build_mesh, resolve_degrees
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.rollout import build_model, relative_error


@torch.no_grad()
def guided_rollout(mesh):
    """Each rank advances the caches of its own branches alone."""
    model = build_model(sink_size_t=1)
    parallelize(model, model.parallel_plan(), mesh)
    guidance = build_guidance(mesh)
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randn(1, 4, 12, generator=draw) for _ in range(2)]
    wanted = (guidance.evaluates_conditional, guidance.evaluates_unconditional)
    caches = [
        model.initialize_cache(text=t) if on else None for t, on in zip(texts, wanted, strict=True)
    ]
    latents = []
    for step in range(3):
        own = [cache for cache in caches if cache is not None]
        for cache in own:
            model.begin_step(step, cache)
        x = torch.randn(1, 4, 2, 6, 10, generator=draw)
        for time in (900.0, 400.0):

            def predict(cache, x=x, time=time):
                return model.predict_flow(x, torch.tensor(time), cache)

            flow = guidance(lambda: predict(caches[0]), lambda: predict(caches[1]), 3.0)
            x = x - 0.5 * flow
        for cache in own:
            model.update_cache(x, torch.tensor(0.0), cache)
        latents.append(x)
    return latents, len(own)


def guided_cases(world_size):
    mesh = build_mesh(resolve_degrees(ParallelConfig(), world_size, 6, guided=True), "cpu")
    latents, halves = guided_rollout(mesh)
    sent = mesh.meter.counts["cfg.all_gather"]
    return relative_error(latents, guided_rollout(Mesh())[0]), halves, sent.calls


@pytest.mark.parametrize(("world_size", "tolerance"), [(2, 0.0), (4, 1e-5)])
def test_guidance_over_two_ranks_equals_one(world_size, tolerance):
    for error, halves, calls in run_ranks(guided_cases, world_size, world_size):
        assert error <= tolerance
        assert halves == 1
        assert calls == 6


def swapped_halves():
    mesh = build_mesh(resolve_degrees(ParallelConfig(), 2, 6, guided=True), "cpu")
    guidance = build_guidance(mesh)
    assert guidance.channel is not None
    guidance.evaluates_conditional = dist.get_rank() == 1
    return float(guidance(lambda: torch.tensor(3.0), lambda: torch.tensor(1.0), 2.0))


def test_swapped_halves_are_seen():
    assert run_ranks(swapped_halves, 2) != [5.0, 5.0]
    right = Guidance()(lambda: torch.tensor(3.0), lambda: torch.tensor(1.0), 2.0)
    assert float(right) == 5.0
