"""Context parallelism: full rollouts on N ranks against the same on one."""

import pytest
import torch

from flashdreams.parallel import collectives
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.rollout import (
    CASES,
    TINY,
    build_model,
    make_mesh,
    relative_error,
    roll_out,
    run_case,
)

FLOAT32_TOLERANCE = 1e-5

CONFIGS = {
    2: [ParallelConfig(), ParallelConfig(ulysses_degree=1)],
    3: [ParallelConfig(), ParallelConfig(ulysses_degree=1)],
    4: [ParallelConfig(), ParallelConfig(ulysses_degree=1)],
}


def all_cases(world_size):
    meshes = [make_mesh(config, world_size) for config in CONFIGS[world_size]]
    results = {}
    for case in CASES:
        expected = run_case(Mesh(), case)
        for mesh in meshes:
            error = relative_error(run_case(mesh, case), expected)
            results[str(mesh.degrees), case] = error
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rollouts_equal_one_rank(world_size):
    for results in run_ranks(all_cases, world_size, world_size):
        assert len(results) == 2 * len(CASES)
        assert max(results.values()) <= FLOAT32_TOLERANCE, results


def forgotten_exchanges():
    """Replace each exchange by one that keeps this rank's own data."""
    expected = run_case(Mesh(), "sink")
    ulysses = make_mesh(ParallelConfig(), 2)
    gather = make_mesh(ParallelConfig(ulysses_degree=1), 2)
    collectives.all_to_all = lambda x, group: x.clone()
    without_all_to_all = relative_error(run_case(ulysses, "sink"), expected)

    def own_twice(x, group, dim=0):
        return true_all_gather(x, group, dim) if x.ndim == 3 else torch.cat([x, x], dim)

    true_all_gather, collectives.all_gather = collectives.all_gather, own_twice
    return without_all_to_all, relative_error(run_case(gather, "sink"), expected)


def test_forgotten_exchange_is_seen():
    for errors in run_ranks(forgotten_exchanges, 2):
        assert min(errors) > 1e-2


def sent_in_one_call():
    sent = {}
    for name, config in {
        "ulysses": ParallelConfig(),
        "gather": ParallelConfig(ulysses_degree=1),
        "rotate": ParallelConfig(ulysses_degree=1, ring_method="rotate"),
    }.items():
        mesh = make_mesh(config, 2)
        model = build_model(latent_width=8)
        parallelize(model, model.parallel_plan(), mesh)
        roll_out(model, 1)
        before = mesh.meter.snapshot()
        roll_out(model, 1)
        sent[name] = mesh.meter.since(before)
    return sent


def test_sent_bytes_equal_the_formula():
    """One AR step is three network calls; the current chunk alone is visible."""
    ranks, layers, calls, batch = 2, TINY["num_layers"], 3, 2
    tokens = TINY["len_t"] * 3 * 4
    chunk = batch * tokens * TINY["dim"] * 4
    head = batch * tokens // ranks * 4 * TINY["out_channels"] * 4
    for sent in run_ranks(sent_in_one_call, ranks):
        per_layer = {
            "ulysses": ("ulysses.all_to_all", 2, 4 * chunk // ranks * (ranks - 1) // ranks),
            "gather": ("ring.all_gather", 1, 2 * chunk // ranks * (ranks - 1)),
            "rotate": ("ring.rotate", ranks - 1, 2 * chunk // ranks * (ranks - 1)),
        }
        for strategy, (name, count, nbytes) in per_layer.items():
            traffic = sent[strategy]
            assert traffic[name].calls == count * layers * calls
            assert traffic[name].bytes_sent == nbytes * layers * calls
            assert traffic["sequence.all_gather"].bytes_sent == head * (ranks - 1) * calls
            assert len(traffic) == 2


def rotate_cases(world_size):
    """12 tokens per latent frame: the ring must share every frame evenly."""
    meshes = [make_mesh(ParallelConfig(ulysses_degree=1, ring_method="rotate"), world_size)]
    if world_size == 4:
        meshes.append(make_mesh(ParallelConfig(ring_degree=2, ring_method="rotate"), world_size))
    errors = {}
    for overrides in ({"sink_size_t": 3, "relative_rope": True}, {"streaming": False}):
        overrides["latent_width"] = 8 if overrides.get("sink_size_t") else 10
        expected = roll_out(build_model(**overrides), 4)
        for mesh in meshes:
            model = build_model(**overrides)
            parallelize(model, model.parallel_plan(), mesh)
            error = relative_error(roll_out(model, 4), expected)
            errors[str(mesh.degrees), str(overrides)] = error
    model = build_model(latent_width=10)
    parallelize(model, model.parallel_plan(), meshes[0])
    with pytest.raises(ValueError, match="15 tokens per latent frame cannot be shared"):
        roll_out(model, 1)
    return errors


@pytest.mark.parametrize("world_size", [2, 4])
def test_rotate_equals_one_rank(world_size):
    for errors in run_ranks(rotate_cases, world_size, world_size):
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def exported_caches():
    """The canonical form of a layer's cache after a rollout, under several strategies."""
    exported = []
    for config in (
        ParallelConfig(),
        ParallelConfig(tensor_parallel_degree=2),
        ParallelConfig(ring_degree=2, ring_method="rotate"),
    ):
        model = build_model(latent_width=8)
        parallelize(model, model.parallel_plan(), make_mesh(config, 4))
        cache = model.initialize_cache(text=torch.ones(1, 2, 12))
        for step in range(3):
            model.begin_step(step, cache)
            latent = torch.randn(1, 4, 2, 6, 8, generator=torch.Generator().manual_seed(step))
            model.update_cache(latent, torch.tensor(0.0), cache)
        core, layer = model.blocks[1].self_attn.core, cache.self_attention[1]
        whole = core.gather_cache(layer.k)
        assert torch.equal(core.shard_cache(whole), layer.k)
        exported.append(whole)
    return exported


def test_gathered_cache_does_not_know_the_ranks():
    for exported in run_ranks(exported_caches, 4):
        for whole in exported[1:]:
            assert whole.shape == (1, 4 * 12, 6, 8)
            torch.testing.assert_close(whole, exported[0], rtol=0, atol=2e-5)
