"""Recorded calls with exchanges inside, on two ranks, with a recorder in the place of CUDA's."""

import pytest
import torch

from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import run_ranks
from tests.parallel.pipelines import prompt
from tests.tiny import tiny_pipeline
from tests.unit.runtime.test_cuda_graph import trace_graphs

WAYS = {"ulysses": {"ulysses_degree": 2}, "gather": {"ring_degree": 2}}


def _roll(way: str, graphs: bool, counted: bool = True):
    parallel = ParallelConfig(**WAYS[way])
    pipeline = tiny_pipeline(use_cuda_graph=True).setup(device="cpu", load=False)
    mesh = build_mesh(resolve_degrees(parallel, 2, 2, False), "cpu", parallel)
    pipeline.parallelize(mesh)
    model = pipeline.diffusion_model.transformer
    if graphs:
        trace_graphs(model)
    pipeline.load()
    if not counted:
        model.network.meter = None
    pipeline.warm_up()
    latents = []
    for seed in (1, 2):
        cache = pipeline.initialize_cache(text=prompt(seed), seed=seed)
        for i in range(5):
            pipeline.generate(autoregressive_index=i, cache=cache, input=0.1)
            pipeline.finalize(autoregressive_index=i, cache=cache)
            latents.append(cache.latent)
        cache.release()
    return latents, mesh.meter.counts, pipeline.stats().get("cuda_graphs")


@pytest.mark.parametrize("way", WAYS)
def test_replays_exchange_and_count_as_eager_calls_do(way):
    """Bit for bit, over two rollouts in one storage; nothing is captured after warm-up."""
    eager, replayed = (run_ranks(_roll, 2, way, graphs) for graphs in (False, True))
    for (a, sent, _), (b, counted, graphs) in zip(eager, replayed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert counted == sent and sum(t.calls for t in sent.values()) > 0
        assert graphs["captures_after_ready"] == 0 < graphs["replays"]


def test_replays_without_a_meter_are_not_seen():
    """Negative control: replaying issues no calls that would count themselves."""
    metered = run_ranks(_roll, 2, "ulysses", True)
    unmetered = run_ranks(_roll, 2, "ulysses", True, False)
    for (_, seen, graphs), (_, missed, _) in zip(metered, unmetered, strict=True):
        assert graphs["replays"] > 0
        assert sum(t.calls for t in missed.values()) < sum(t.calls for t in seen.values())
