"""precision="fp8" on several ranks: the same e4m3 numbers travel, and strict ranks have one bit.

Tolerance: float32 1e-3 of the largest latent between numbers of ranks. Rounding differs by 1e-6
there, which now and then puts a number on the other side of a border between two e4m3 numbers.
"""

import pytest
import torch

from flashdreams.parallel.mesh import ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.rollout import build_model, make_mesh, relative_error, roll_out

SIZES = {"num_heads": 12, "dim": 72, "sink_size_t": 3, "relative_rope": True, "precision": "fp8"}
STEPS = 5
"""Two frames each: the sink is wide in the first two, the window of four wraps in the last two."""

STRATEGIES = {
    2: {
        "ulysses": ParallelConfig(),
        "gather": ParallelConfig(ulysses_degree=1),
        "tensor": ParallelConfig(tensor_parallel_degree=2),
    },
    4: {
        "ulysses and tensor": ParallelConfig(ulysses_degree=2, tensor_parallel_degree=2),
        "ulysses and gather": ParallelConfig(ulysses_degree=2),
    },
}


def rollout_of(config: ParallelConfig, world_size: int, **changes):
    model = build_model(**{**SIZES, **changes})
    parallelize(model, model.parallel_plan(), make_mesh(config, world_size, 12))
    model.after_load()
    return roll_out(model, STEPS)


def rollouts(world_size: int):
    return {name: rollout_of(c, world_size) for name, c in STRATEGIES[world_size].items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_rollout_of_one(world_size):
    expected = rollout_of(ParallelConfig(), 1)
    wide = rollout_of(ParallelConfig(), 1, precision="native")
    assert relative_error(expected, wide) > 1e-3  # negative control: e4m3 shows
    for found in run_ranks(rollouts, world_size, world_size):
        for name, latents in found.items():
            assert relative_error(latents, expected) < 1e-3, name


GEMM = {"precision": "fp8_gemm", "fp8_gemm_min_width": 16, "dim": 96, "ffn_dim": 96}


def gemm_rollouts(world_size: int):
    return {name: rollout_of(c, world_size, **GEMM) for name, c in STRATEGIES[world_size].items()}


def test_ranks_that_cut_tokens_have_the_fp8_matmuls_of_one():
    """Scales of rows follow from whole rows, wherever they are. Ranks that cut the second matmul of
    the feed-forward do not have these, and keep it in the type of the network: nearer to it."""
    expected, wide = (
        rollout_of(ParallelConfig(), 1, **{**GEMM, **change})
        for change in ({}, {"precision": "native"})
    )
    own_error = relative_error(expected, wide)
    assert own_error > 5e-3
    for found in run_ranks(gemm_rollouts, 2, 2):
        for name in ("ulysses", "gather"):
            assert relative_error(found[name], expected) < own_error / 4, name
        assert relative_error(found["tensor"], expected) > own_error / 4  # negative control
        assert relative_error(found["tensor"], wide) < 1.5 * own_error


def strict_rollouts(world_size: int):
    return {
        name: torch.cat(rollout_of(ParallelConfig(strict=True, **degrees), world_size), dim=2)
        for name, degrees in {"ulysses": {}, "gather": {"ulysses_degree": 1}}.items()
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_strict_ranks_have_the_bits_of_one(world_size):
    expected = run_ranks(strict_rollouts, 1, 1)[0]
    for found in run_ranks(strict_rollouts, world_size, world_size):
        for name, latents in found.items():
            assert torch.equal(latents, expected[name]), name


def bytes_sent(precision: str) -> int:
    """Bytes that a rank sends in the all-to-alls of the third AR step."""
    changes = {"sink_size_t": 0, "relative_rope": False, "precision": precision}
    model, mesh = build_model(**{**SIZES, **changes}), make_mesh(ParallelConfig(), 2, 12)
    parallelize(model, model.parallel_plan(), mesh)
    sent = []
    for steps in (2, 3):
        roll_out(model, steps)
        sent.append(mesh.meter.snapshot()["ulysses.all_to_all"].bytes_sent)
    return sent[1] - 2 * sent[0]


def test_queries_keys_and_values_travel_as_one_byte_each():
    """Of float32 the four tensors of a layer take 16 bytes a channel; three of e4m3 and one of
    float32 take 7, and 2 for 8 where a clean pass ends with keys and values."""
    for wide, narrow in zip(
        run_ranks(bytes_sent, 2, "native"), run_ranks(bytes_sent, 2, "fp8"), strict=True
    ):
        assert 0.4 < narrow / wide < 7 / 16


def refused():
    model = build_model(precision="fp8")
    config = ParallelConfig(ring_degree=2, ulysses_degree=1, ring_method="rotate")
    parallelize(model, model.parallel_plan(), make_mesh(config, 2))
    with pytest.raises(ValueError, match="cannot be used with ring_method='rotate'"):
        roll_out(model, 1)


def test_a_cache_that_rotates_is_refused():
    run_ranks(refused, 2)
