"""Compiled Wan blocks: the rollout of the eager ones (float32, 1e-5 relative), compiled once."""

import os

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.compilation import why_no_compiler
from tests.harness import run_ranks
from tests.parallel.pipelines import prompt
from tests.parallel.rollout import relative_error
from tests.tiny import tiny_pipeline

NO_COMPILER = why_no_compiler(torch.device("cpu"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NO_COMPILER is not None, reason=f"torch.compile: {NO_COMPILER}"),
]
STEPS = 5
"""Two frames each; sink and window hold six, so the window wraps in the fourth."""


def build(compile_blocks: bool, **transformer):
    """A pipeline of float32 weights, not cut and not warm yet."""
    config = derive_config(
        tiny_pipeline(),
        diffusion_model=dict(transformer=dict(compile_blocks=compile_blocks, **transformer)),
    )
    return config.setup(device="cpu", load=False)


def roll(pipeline, batch_size: int = 1):
    """Clean latents of a rollout in which nothing may be compiled."""
    latents = []
    cache = pipeline.initialize_cache(text=prompt(0).expand(batch_size, -1, -1), seed=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for index in range(STEPS):
            pipeline.generate(index, cache, 0.1 * index)
            pipeline.finalize(index, cache)
            latents.append(cache.latent.clone())
    return latents


def eager_rollout(**transformer):
    pipeline = build(False, **transformer)
    pipeline.load()
    return roll(pipeline)


def test_compiled_rollout_equals_the_eager_one_and_compiles_nothing_after_warm_up():
    eager, pipeline = eager_rollout(), build(True)
    pipeline.load()
    ready = pipeline.warm_up()
    assert ready.compiled.graphs > 0 and 0 < ready.compiled.ms < ready.ms
    assert "torch.compile" in str(ready)
    latents = roll(pipeline)
    assert 0 < relative_error(latents, eager) < 1e-5
    assert relative_error(latents[1:], eager[:-1]) > 1e-2
    figures = pipeline.stats()["torch_compile"]
    assert figures["graphs_at_warm_up"] == ready.compiled.graphs
    assert figures["graphs_after_ready"] == 0
    with pytest.raises(RuntimeError, match="recompile"):
        roll(pipeline, batch_size=2)


def test_a_float32_residual_is_compiled_with_its_blocks():
    """Where neighbours are computed in one go bfloat16 is rounded less often, or as often."""
    wide = {"dtype": "bfloat16", "residual_dtype": "float32"}
    exact, eager, pipeline = eager_rollout(), eager_rollout(**wide), build(True, **wide)
    pipeline.load()
    pipeline.warm_up()
    latents = roll(pipeline)
    assert 0 < relative_error(latents, eager) < 2 * relative_error(eager, exact) < 0.05
    assert pipeline.stats()["torch_compile"]["graphs_after_ready"] == 0


def roll_on_ranks(compile_blocks: bool, parallel: ParallelConfig, world_size: int):
    """Latents, and what this rank sent for them."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    pipeline = build(compile_blocks)
    degrees = resolve_degrees(parallel, world_size, num_heads=2)
    mesh = build_mesh(degrees, "cpu", parallel)
    pipeline.parallelize(mesh)
    pipeline.load()
    assert (pipeline.warm_up().compiled.graphs > 0) == compile_blocks
    return roll(pipeline), mesh.meter.counts


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor_parallel_degree=2),
        ParallelConfig(ulysses_degree=1, ring_method="rotate"),
    ],
    ids=["ulysses", "tensor", "rotate"],
)
def test_ranks_compile_around_their_exchanges(parallel):
    eager = run_ranks(roll_on_ranks, 2, False, parallel, 2)
    compiled = run_ranks(roll_on_ranks, 2, True, parallel, 2, timeout_s=300)
    for (latents, sent), (expected, expected_sent) in zip(compiled, eager, strict=True):
        assert relative_error(latents, expected) < 1e-5
        assert sent == expected_sent


def test_strict_ranks_refuse_to_compile():
    parallel = ParallelConfig(strict=True)
    mesh = build_mesh(resolve_degrees(parallel, 1, num_heads=2), "cpu", parallel)
    with pytest.raises(ValueError, match="strict=True with compile_blocks=True"):
        build(True).parallelize(mesh)


def test_without_a_compiler_the_setting_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler is not found"):
        build(True)
