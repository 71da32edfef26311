"""A rollout that goes on under another number of ranks, through the canonical form of its cache."""

import torch

from flashdreams.parallel.context import AttentionWrapper
from flashdreams.parallel.mesh import ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.rollout import build_model, make_mesh

STEPS = 6


@torch.no_grad()
def go_on(world_size, first, last, state):
    """Run AR steps ``first`` to ``last - 1`` from an exported state; strict, so that bits count."""
    model = build_model(sink_size_t=3, relative_rope=True)
    config = ParallelConfig(strict=True)
    parallelize(model, model.parallel_plan(), make_mesh(config, world_size))
    cache = model.initialize_cache(text=torch.linspace(-1, 1, 24).reshape(1, 2, 12))
    cores = [block.self_attn.core for block in model.blocks]
    layers = list(zip(cores, cache.self_attention, strict=True))
    for index, (core, layer) in enumerate(layers if state is not None else []):
        for name, whole in state[index].items():
            part = core.shard_cache(whole) if isinstance(core, AttentionWrapper) else whole
            getattr(layer, name).copy_(part)
        cache.cursor.start = first * model.config.len_t
    latents = []
    for step in range(first, last):
        model.begin_step(step, cache)
        x = torch.randn(1, 4, 2, 6, 10, generator=torch.Generator().manual_seed(step))
        x = x - model.predict_flow(x, torch.tensor(900.0), cache)
        model.update_cache(x, torch.tensor(0.0), cache)
        latents.append(x)
    exported = []
    for core, layer in layers:
        whole = core.gather_cache if isinstance(core, AttentionWrapper) else torch.clone
        exported.append({name: whole(getattr(layer, name)) for name in ("k", "v", "sink_k")})
    return latents, exported


def test_a_rollout_moves_between_numbers_of_ranks():
    stayed, _ = run_ranks(go_on, 1, 1, 0, STEPS, None)[0]
    moved, state = [], None
    for world_size, first, last in ((1, 0, 2), (2, 2, 4), (4, 4, 5), (3, 5, STEPS)):
        latents, state = run_ranks(go_on, world_size, world_size, first, last, state)[0]
        moved += latents
    for a, b in zip(moved, stayed, strict=True):
        assert torch.equal(a, b)


def test_a_lost_cache_is_seen():
    stayed, _ = run_ranks(go_on, 1, 1, 0, 3, None)[0]
    lost, _ = run_ranks(go_on, 2, 2, 2, 3, None)[0]
    assert not torch.allclose(lost[0], stayed[2], atol=1e-2)
