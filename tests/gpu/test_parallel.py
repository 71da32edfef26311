"""The parallel path on one GPU: NCCL with groups of one rank, and two ranks over gloo."""

import pytest
import torch

from tests.harness import run_ranks
from tests.one_device import ONE_RANK, TWO_RANKS, on_one_rank, on_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SUMS_OTHERWISE = ("rotate", "tensor", "all")
"""Ways that add up in another order; float32, 1e-5 of the largest latent."""
FRAMES_TOLERANCE = 2e-3
"""Of the largest pixel: convolutions of other widths may use other kernels, in TF32."""


@pytest.fixture(scope="module")
def one_rank() -> dict[bool, dict[str, dict]]:
    """Results by way, without and with CUDA graphs; each in a process of its own."""
    return {graphs: run_ranks(on_one_rank, 1, "cuda", graphs)[0] for graphs in (False, True)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict]]:
    """Results by way, of both ranks on one GPU."""
    return run_ranks(on_two_ranks, 2, "cuda")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("way", ONE_RANK)
def test_wrappers_on_one_rank_give_the_plain_bits(one_rank, way, graphs):
    found, axes = one_rank[graphs][way], ONE_RANK[way][0]
    assert found["installed"]["decoder" if axes == {"decode"} else "transformer"]
    assert found["calls"] > 0 or axes == {"decode"}
    assert found["latents"] <= (1e-5 if way in SUMS_OTHERWISE else 0.0)
    assert found["frames"] <= FRAMES_TOLERANCE


@pytest.mark.parametrize("way", ONE_RANK)
def test_collectives_are_replayed_in_graphs(one_rank, way):
    assert one_rank[False][way]["graphs"] is None
    graphs = one_rank[True][way]["graphs"]
    assert graphs["captures_after_ready"] == 0 < graphs["captures_at_warm_up"]
    assert graphs["replays"] > 0


@pytest.mark.parametrize("way", TWO_RANKS)
def test_two_ranks_on_one_gpu_equal_one(two_ranks, way):
    for rank in two_ranks:
        assert rank[way]["latents"] <= (0.0 if way == "strict" else 1e-5)
        assert (rank[way]["frames"] or 0.0) <= (0.0 if way == "strict" else FRAMES_TOLERANCE)
