"""Wan blocks with fused kernels, interpreted, against plain ones.

Tolerance: float32 1e-5 relative, 1e-3 with e4m3, where 1e-6 may cross a border of rounding.
In bfloat16 twice the error of the plain rollout against float32:
the interpreter truncates where a GPU rounds.
"""

from unittest.mock import patch

import pytest

from flashdreams.infra.config import derive_config
from flashdreams.models.wan import fused
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.kernels.conftest import switch_to_interpreter
from tests.parallel.rollout import build_model, make_mesh, relative_error, roll_out
from tests.tiny import tiny_pipeline

pytest.importorskip("triton")

SIZES = {
    "len_t": 1,
    "window_size_t": 2,
    "sink_size_t": 1,
    "latent_height": 2,
    "latent_width": 4,
    "control_dim": 7,
}
STEPS = 4
"""One frame each; the window of two wraps in the last."""
KERNELS = ("layer_norm_modulate", "gate_residual", "qk_norm_rope", "qk_norm_rope_write")


def roll(
    fused_kernels: bool,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    kernels: tuple[str, ...] = KERNELS,
    steps: int = STEPS,
    **changes,
):
    """Latents of a rollout, and how often each kernel was called."""
    model = build_model(dtype, **{"fused_kernels": fused_kernels, **SIZES, **changes})
    parallelize(model, model.parallel_plan(), mesh or Mesh())
    model.after_load()
    with pytest.MonkeyPatch.context() as environment:
        switch_to_interpreter(environment)
        patches = [patch.object(fused, name, wraps=getattr(fused, name)) for name in kernels]
        calls = [p.start() for p in patches]
        try:
            latents = roll_out(model, steps)
        finally:
            for p in patches:
                p.stop()
    return latents, [call.call_count for call in calls]


def test_the_fused_rollout_equals_the_plain_one():
    plain, not_called = roll(False)
    same, called = roll(True)
    assert relative_error(same, plain) < 1e-5
    blocks = 2 * STEPS * 3 - STEPS
    assert not_called == [0, 0, 0, 0]
    assert called == [2 * blocks + STEPS, 2 * blocks, 0, blocks]
    assert relative_error(same, roll(False, eps=1e-3)[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("residual_dtype", [None, "float32"])
def test_in_bfloat16_the_fused_rollout_is_as_near_to_float32_as_the_plain_one(residual_dtype):
    exact, _ = roll(False)
    plain, _ = roll(False, "bfloat16", residual_dtype=residual_dtype)
    near, _ = roll(True, "bfloat16", residual_dtype=residual_dtype)
    assert 1e-3 < relative_error(near, exact) < 2 * relative_error(plain, exact) < 0.05


FP8_KERNELS = ("qk_norm_rope_quantize", "qk_norm_rope_write_fp8")


def test_the_fused_fp8_rollout_equals_the_plain_one():
    """The first chunk is not fused with the write: its scales are not known yet, and its clean pass
    attends in the last block, too, for the scale of the queries."""
    plain, _ = roll(False, precision="fp8")
    same, called = roll(True, kernels=(*KERNELS, *FP8_KERNELS), precision="fp8")
    assert relative_error(same, plain) < 1e-3
    in_a_step = 2 * 3 - 1  # two blocks, two denoising steps and the clean pass
    assert called[2:] == [in_a_step + 1, 0, 0, (STEPS - 1) * in_a_step]
    assert relative_error(same, roll(False)[0]) > 1e-3


def test_the_fused_fp8_gemm_rollout_equals_the_plain_one():
    """All three norms of a block and its GELU quantize."""
    changes = {"precision": "fp8_gemm", "fp8_gemm_min_width": 16, "ffn_dim": 96}
    plain, _ = roll(False, steps=2, **changes)
    names = ("layer_norm_quantize", "gelu_quantize", "layer_norm_modulate", "layer_norm_affine")
    same, called = roll(True, kernels=names, steps=2, **changes)
    assert relative_error(same, plain) < 3e-3
    blocks = 2 * 2 * 3 - 2  # in two AR steps; the last one of a clean pass has one norm alone
    assert called == [3 * blocks + 2, blocks, 0, 0]
    assert relative_error(same, roll(False, steps=2, **{**changes, "precision": "fp8"})[0]) > 1e-2


@pytest.mark.slow
def test_what_the_core_stores_otherwise_or_not_at_all_is_not_written_by_the_kernel():
    for changes in ({"kv_cache_dtype": "int8"}, {"streaming": False, "sink_size_t": 0}):
        plain, _ = roll(False, **changes)
        same, called = roll(True, **changes)
        assert relative_error(same, plain) < 1e-5
        assert called[2] > 0 and called[3] == 0


def roll_on_ranks(parallel: ParallelConfig, world_size: int, **changes):
    return roll(True, mesh=make_mesh(parallel, world_size), **changes)


def roll_fp8_on_ranks(parallel: ParallelConfig, world_size: int):
    return roll_on_ranks(parallel, world_size, kernels=FP8_KERNELS, precision="fp8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "with_norm"),
    [
        (ParallelConfig(), True),
        (ParallelConfig(ulysses_degree=1), True),
        (ParallelConfig(tensor_parallel_degree=2), False),
    ],
    ids=["ulysses", "gather", "tensor"],
)
def test_ranks_fuse_what_they_hold_whole(parallel, with_norm):
    """Ranks that share the heads reduce sums inside the norm, which stays unfused there.

    No rank writes in the same launch: keys and values travel first, or are not rotated there.
    """
    plain, _ = roll(False)
    for latents, calls in run_ranks(roll_on_ranks, 2, parallel, 2):
        assert relative_error(latents, plain) < 1e-5
        assert calls[0] > 0 and calls[1] > 0 and (calls[2] > 0) == with_norm
        assert calls[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{}, {"ulysses_degree": 1}, {"tensor_parallel_degree": 2}])
def test_ranks_quantize_before_they_exchange(degrees):
    plain, _ = roll(False, precision="fp8")
    parallel = ParallelConfig(**degrees)
    for latents, calls in run_ranks(roll_fp8_on_ranks, 2, parallel, 2):
        assert relative_error(latents, plain) < 1e-3
        assert (calls[0] > 0) == ("tensor_parallel_degree" not in degrees) and calls[1] == 0


def test_a_device_without_triton_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = derive_config(
        tiny_pipeline(), diffusion_model=dict(transformer=dict(fused_kernels=True))
    )
    with pytest.raises(ValueError, match="fused_kernels=True cannot be used here: needs a CUDA"):
        config.setup(device="cpu", load=False)
