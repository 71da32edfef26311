"""Context parallelism: full rollouts on N ranks against the same on one."""

import pytest
import torch

from flashdreams.infra.rollout import gather_parts
from flashdreams.parallel import collectives
from flashdreams.parallel.mesh import ParallelConfig
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
    single_rank,
)

FLOAT32_TOLERANCE = 1e-5

GATHERED = ("relative_rope", "bidirectional", "per_frame_timesteps")


def all_cases(world_size):
    """All cases with as much Ulysses as fits (2 x 2 on four ranks), some with gathering alone."""
    auto = make_mesh(ParallelConfig(), world_size)
    gather = make_mesh(ParallelConfig(ulysses_degree=1), world_size)
    latents = {(str(auto.degrees), case): run_case(auto, case) for case in CASES}
    return latents | {(str(gather.degrees), case): run_case(gather, case) for case in GATHERED}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rollouts_equal_one_rank(world_size):
    for latents in run_ranks(all_cases, world_size, world_size):
        assert len(latents) == len(CASES) + len(GATHERED)
        errors = {key: relative_error(x, single_rank(key[1])) for key, x in latents.items()}
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def forgotten_exchanges():
    """Replace each collective by one that keeps this rank's own data."""
    ulysses = make_mesh(ParallelConfig(), 2)
    gather = make_mesh(ParallelConfig(ulysses_degree=1), 2)
    true_all_gather = collectives.Channel.all_gather

    def own_twice(self, x, dim=0):
        return true_all_gather(self, x, dim) if x.ndim == 3 else torch.cat([x, x], dim)

    collectives.Channel.all_to_all = lambda self, x: x.clone()
    without_all_to_all = run_case(ulysses, "sink")
    collectives.Channel.all_gather = own_twice
    return without_all_to_all, run_case(gather, "sink")


def test_forgotten_exchange_is_seen():
    for wrong in run_ranks(forgotten_exchanges, 2):
        assert min(relative_error(x, single_rank("sink")) for x in wrong) > 1e-2


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
    """One AR step is two network calls and a clean pass; the current chunk alone is visible.

    The clean pass exchanges no queries in the last layer, attends to nothing there and gathers no
    output.
    """
    ranks, layers, calls, batch = 2, TINY["num_layers"], 2, 2
    tokens = TINY["len_t"] * 3 * 4
    chunk = batch * tokens * TINY["dim"] * 4
    head = batch * tokens // ranks * 4 * TINY["out_channels"] * 4
    for sent in run_ranks(sent_in_one_call, ranks):
        exchanged, gathered = chunk // ranks * (ranks - 1) // ranks, chunk // ranks * (ranks - 1)
        per_layer = {
            "ulysses": ("ulysses.all_to_all", 2, 4 * exchanged, 1, 2 * exchanged),
            "gather": ("ring.all_gather", 1, 2 * gathered, 1, 2 * gathered),
            "rotate": ("ring.rotate", ranks - 1, 2 * gathered, 0, 0),
        }
        for strategy, (name, count, nbytes, last_count, last_nbytes) in per_layer.items():
            traffic = sent[strategy]
            whole_layers = layers * calls + layers - 1
            assert traffic[name].calls == count * whole_layers + last_count
            assert traffic[name].bytes_sent == nbytes * whole_layers + last_nbytes
            assert traffic["sequence.all_gather"].bytes_sent == head * (ranks - 1) * calls
            assert len(traffic) == 2


ROTATE_CASES = {
    "streaming": {"sink_size_t": 3, "relative_rope": True, "latent_width": 8},
    "bidirectional": {"streaming": False},
    "fewer tokens than ranks": {
        "streaming": False,
        "len_t": 1,
        "latent_height": 2,
        "latent_width": 6,
    },
}
"""The cache is shared evenly at 12 tokens per latent frame; without one, 15 are fine."""


def rotate_cases(world_size):
    meshes = [make_mesh(ParallelConfig(ulysses_degree=1, ring_method="rotate"), world_size)]
    if world_size == 4:
        meshes.append(make_mesh(ParallelConfig(ring_degree=2, ring_method="rotate"), world_size))
    latents = {}
    for case, overrides in ROTATE_CASES.items():
        for mesh in meshes:
            model = build_model(**overrides)
            parallelize(model, model.parallel_plan(), mesh)
            latents[str(mesh.degrees), case] = roll_out(model, 4)
    model = build_model(latent_width=10)
    parallelize(model, model.parallel_plan(), meshes[0])
    with pytest.raises(ValueError, match="15 tokens per latent frame cannot be shared"):
        roll_out(model, 1)
    return latents


@pytest.mark.parametrize("world_size", [2, 4])
def test_rotate_equals_one_rank(world_size):
    expected = {case: roll_out(build_model(**o), 4) for case, o in ROTATE_CASES.items()}
    for latents in run_ranks(rotate_cases, world_size, world_size):
        errors = {key: relative_error(x, expected[key[1]]) for key, x in latents.items()}
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def forgotten_rotation():
    """Every rank keeps its own share of the keys and takes it for the next one's."""
    collectives.Channel.start_rotate = lambda self, x: lambda: x
    model = build_model(**ROTATE_CASES["streaming"])
    mesh = make_mesh(ParallelConfig(ulysses_degree=1, ring_method="rotate"), 2)
    parallelize(model, model.parallel_plan(), mesh)
    return roll_out(model, 4)


def test_forgotten_rotation_is_seen():
    expected = roll_out(build_model(**ROTATE_CASES["streaming"]), 4)
    for wrong in run_ranks(forgotten_rotation, 2):
        assert relative_error(wrong, expected) > 1e-2


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
        layer = list(cache.layers())[1]
        exported.append(gather_parts(dict(layer.parts())).get("k"))
    return exported


def test_gathered_cache_does_not_know_the_ranks():
    first, *others = run_ranks(exported_caches, 4)[0]
    for whole in others:
        assert whole.shape == (1, 4 * 12, 6, 8)
        torch.testing.assert_close(whole, first, rtol=0, atol=2e-5)
