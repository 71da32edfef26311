"""Tensor parallelism, alone and with the other axes; float32."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel import tensor
from flashdreams.parallel.mesh import ParallelConfig
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
    single_rank,
)

FLOAT32_TOLERANCE = 1e-5


def run_cases(configs, world_size, cases):
    latents = {}
    for case in cases:
        for config in configs:
            mesh = make_mesh(config, world_size, CASES[case].get("num_heads", 6))
            latents[str(mesh.degrees), case] = run_case(mesh, case)
    return latents


def test_tensor_parallel_rollouts_equal_one_rank():
    configs = [ParallelConfig(tensor_parallel_degree=2)]
    for latents in run_ranks(run_cases, 2, configs, 2, list(CASES)):
        errors = {key: relative_error(x, single_rank(key[1])) for key, x in latents.items()}
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def test_tensor_parallel_composes_with_the_sequence_axes():
    """Twelve heads are cut twice: over tensor parallelism, then over Ulysses."""
    configs = [
        ParallelConfig(tensor_parallel_degree=2, ring_degree=1),
        ParallelConfig(tensor_parallel_degree=2, ring_degree=2),
    ]
    for latents in run_ranks(run_cases, 4, configs, 4, ["twelve_heads"]):
        assert len(latents) == 2
        errors = {key: relative_error(x, single_rank(key[1])) for key, x in latents.items()}
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def norm_over_own_heads():
    """The mistake that the sharded norm is there to avoid."""
    tensor.ShardedRMSNorm.forward = lambda self, x: nn.functional.rms_norm(
        x, x.shape[-1:], self.weight, self.eps
    )
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=2), 2)
    return run_case(mesh, "window")


def test_norm_over_own_heads_is_seen():
    for latents in run_ranks(norm_over_own_heads, 2):
        assert relative_error(latents, single_rank("window")) > 1e-3


def load_slices(path):
    """Build on meta, cut, read this rank's slices alone."""
    with torch.device("meta"):
        model = WanTransformer(WanTransformerConfig(**TINY))
    names = list(model.state_dict())
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=2), 2)
    report = parallelize(model, model.parallel_plan(), mesh)
    assert list(model.state_dict()) == names
    loaded = load_checkpoint(model, CheckpointConfig(source=path), slices=report.slices)
    model.requires_grad_(False)
    return roll_out(model, 4), loaded.bytes_read


def test_sharded_loading_reads_slices_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = build_model().state_dict()
    save_file(weights, path)
    whole = sum(w.numel() * 4 for w in weights.values())
    for latents, bytes_read in run_ranks(load_slices, 2, str(path)):
        assert relative_error(latents, single_rank("window")) <= FLOAT32_TOLERANCE
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
