"""The cost model's counts against counted rollouts."""

import sys
from pathlib import Path

import pytest

from flashdreams.infra.config import derive_config
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees
from tests.harness import run_ranks

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, BENCHMARKS)
    try:
        import scaling
    finally:
        sys.path.remove(BENCHMARKS)
    return scaling


def count(configs):
    sys.path.insert(0, BENCHMARKS)
    import scaling

    native = scaling.MODELS["tiny"]
    wide = derive_config(native, dtype="bfloat16", residual_dtype="float32")
    return [
        scaling.count_call(model, config, write_only)[:2]
        for model in (native, wide)
        for config in configs
        for write_only in (False, True)
    ]


@pytest.mark.parametrize("world_size", [4])
def test_predicted_counts_equal_the_counted_ones(world_size, scaling):
    configs = [
        ParallelConfig(),
        ParallelConfig(ulysses_degree=1, ring_method="rotate"),
        ParallelConfig(tensor_parallel_degree=2),
    ]
    for predicted, counted in run_ranks(count, world_size, configs)[0]:
        assert predicted.flops > 0 and predicted.traffic
        assert predicted == counted


def test_published_figures_of_wan_are_met(scaling):
    """202 TFLOP per chunk; 10.3 MiB by Ulysses and 20.6 by gathering on 4 ranks (1.3B, 480x832)."""
    sys.path.insert(0, BENCHMARKS)
    import collectives

    sys.path.remove(BENCHMARKS)
    call = scaling.predict_call(scaling.MODELS["wan-1.3b"], ParallelDegrees(), 21)
    assert 5 * call.flops == pytest.approx(202e12, rel=0.005)
    rows = collectives.bytes_table({"wan-1.3b": scaling.MODELS["wan-1.3b"]})
    four = next(row for row in rows if row["ranks"] == 4)
    schemes = ("native", "gather", "cached_ulysses", "cached_gather")
    assert [round(four[s], 1) for s in schemes] == [10.3, 20.6, 41.1, 144.0]
