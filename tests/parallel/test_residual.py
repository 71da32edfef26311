"""A float32 residual beside bfloat16 branches on several ranks: same errors, same exchanges."""

import pytest
import torch

from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.rollout import build_model, make_mesh, roll_out

SIZES = {"sink_size_t": 1, "control_dim": 7}
STEPS = 4
ALLOWED_RATIO = 1.5
"""Of the error against float32 to that of one rank."""

STRATEGIES = {
    "ulysses": ParallelConfig(),
    "gather": ParallelConfig(ulysses_degree=1),
    "tensor": ParallelConfig(tensor_parallel_degree=2),
    "strict": ParallelConfig(strict=True),
}


def roll(mesh: Mesh, dtype: str = "bfloat16", **changes):
    """Latents of all AR steps, and the bytes that this rank sent for them."""
    model = build_model(dtype, **SIZES, **changes)
    parallelize(model, model.parallel_plan(), mesh)
    latents = torch.stack(roll_out(model, STEPS))
    return latents, {name: traffic.bytes_sent for name, traffic in mesh.meter.counts.items()}


def roll_on_ranks(names: list[str], world_size: int):
    return {
        (name, residual_dtype): roll(
            make_mesh(STRATEGIES[name], world_size), residual_dtype=residual_dtype
        )
        for name in names
        for residual_dtype in (None, "float32")
    }


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def extra_bytes(found, name: str) -> dict[str, int]:
    wide, narrow = found[name, "float32"][1], found[name, None][1]
    assert wide.keys() == narrow.keys()
    return {kind: wide[kind] - sent for kind, sent in narrow.items() if wide[kind] != sent}


@pytest.mark.slow
def test_ranks_err_no_more_and_exchange_branches():
    """Only the patches that the head puts out are gathered in float32: 16 channels of a token."""
    exact, _ = roll(Mesh(), "float32")
    wide, _ = roll(Mesh(), residual_dtype="float32")
    narrow, _ = roll(Mesh())
    assert error(wide, exact) < 0.8 * error(narrow, exact)
    strict, _ = roll(make_mesh(STRATEGIES["strict"], 1), residual_dtype="float32")
    tokens = {"ulysses": 15, "gather": 15, "strict": 16}  # of each of two entries, per rank
    for found in run_ranks(roll_on_ranks, 2, list(STRATEGIES), 2):
        for name in STRATEGIES:
            ratio = error(found[name, "float32"][0], exact) / error(wide, exact)
            assert ratio < ALLOWED_RATIO, (name, ratio)
            patches = {"sequence.all_gather": 2 * STEPS * tokens.get(name, 0) * 2 * 16 * 2}
            assert extra_bytes(found, name) == (patches if name in tokens else {})
        assert torch.equal(found["strict", "float32"][0], strict)
        assert not torch.equal(found["strict", None][0], strict)
