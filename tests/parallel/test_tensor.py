"""Tensor parallelism, alone and with the other axes; float32."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel import tensor
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from flashdreams.runtime.checkpoint import CheckpointConfig, load_checkpoint
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


def combined_cases(configs, world_size, cases):
    errors = {}
    for case in cases:
        expected = run_case(Mesh(), case)
        for config in configs:
            mesh = make_mesh(config, world_size, CASES[case].get("num_heads", 6))
            errors[str(mesh.degrees), case] = relative_error(run_case(mesh, case), expected)
    return errors


def test_tensor_parallel_rollouts_equal_one_rank():
    configs = [ParallelConfig(tensor_parallel_degree=2)]
    for errors in run_ranks(combined_cases, 2, configs, 2, list(CASES)):
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def test_tensor_parallel_composes_with_the_sequence_axes():
    """Twelve heads are cut twice: over tensor parallelism, then over Ulysses."""
    configs = [
        ParallelConfig(tensor_parallel_degree=2, ring_degree=1),
        ParallelConfig(tensor_parallel_degree=2, ring_degree=2),
    ]
    for errors in run_ranks(combined_cases, 4, configs, 4, ["twelve_heads"]):
        assert len(errors) == 2
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def norm_over_own_heads():
    """The mistake that the sharded norm is there to avoid."""
    expected = run_case(Mesh(), "window")
    tensor.ShardedRMSNorm.forward = lambda self, x: nn.functional.rms_norm(
        x, x.shape[-1:], self.weight, self.eps
    )
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=2), 2)
    return relative_error(run_case(mesh, "window"), expected)


def test_norm_over_own_heads_is_seen():
    assert min(run_ranks(norm_over_own_heads, 2)) > 1e-3


def load_slices(path):
    """Build on meta, cut, read this rank's slices alone."""
    expected = roll_out(build_model(), 3)
    with torch.device("meta"):
        model = WanTransformer(WanTransformerConfig(**TINY))
    names = list(model.state_dict())
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=2), 2)
    report = parallelize(model, model.parallel_plan(), mesh)
    assert list(model.state_dict()) == names
    loaded = load_checkpoint(model, CheckpointConfig(source=path), slices=report.slices)
    model.requires_grad_(False)
    return relative_error(roll_out(model, 3), expected), loaded.bytes_read


def test_sharded_loading_reads_slices_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = build_model().state_dict()
    save_file(weights, path)
    whole = sum(w.numel() * 4 for w in weights.values())
    for error, bytes_read in run_ranks(load_slices, 2, str(path)):
        assert error <= FLOAT32_TOLERANCE
        assert bytes_read < 0.75 * whole


class _Channel:
    size, rank, name = 2, 1, "tp"


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ffn has 9 entries along dim 0, not divisible"):
        tensor.ColwiseLinear(nn.Linear(4, 9), _Channel(), "ffn")
    with pytest.raises(ValueError, match="not an RMS norm"):
        tensor.ShardedRMSNorm(nn.LayerNorm(8), _Channel(), "norm")
    with pytest.raises(ValueError, match="needs a 1-D weight"):
        tensor.ShardedRMSNorm(nn.Linear(2, 2), _Channel(), "norm")
