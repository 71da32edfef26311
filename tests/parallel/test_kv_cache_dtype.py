"""A KV cache in 8 bits on two ranks against the same on one."""

import pytest
import torch

from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.pipelines import begin, build_pipeline, control
from tests.parallel.rollout import build_model, make_mesh, relative_error, roll_out

SIZES = {"latent_height": 8, "sink_size_t": 3, "relative_rope": True}
"""20 tokens per latent frame, which ring ranks can share."""
MESHES = {
    "ulysses": ParallelConfig(ulysses_degree=2, ring_degree=1),
    "gather": ParallelConfig(ulysses_degree=1, ring_degree=2),
    "rotate": ParallelConfig(ulysses_degree=1, ring_degree=2, ring_method="rotate"),
    "tensor": ParallelConfig(tensor_parallel_degree=2),
}

ROUNDED_ELSEWHERE = 1e-4
"""A float32 sum in another order may end on the other side of a rounding."""


def run(mesh: Mesh, storage: str) -> list[torch.Tensor]:
    model = build_model(kv_cache_dtype=storage, **SIZES)
    parallelize(model, model.parallel_plan(), mesh)
    return roll_out(model, 4)


def run_meshes(storage: str) -> dict[str, list[torch.Tensor]]:
    return {name: run(make_mesh(config, 2), storage) for name, config in MESHES.items()}


def test_a_cache_in_eight_bits_is_the_same_on_two_ranks():
    storage = "int8"
    exact, alone = run(Mesh(), "native"), run(Mesh(), storage)
    for latents in run_ranks(run_meshes, 2, storage):
        errors = {name: relative_error(x, alone) for name, x in latents.items()}
        assert max(errors.values()) <= ROUNDED_ELSEWHERE, errors
    assert relative_error(exact, alone) > 3 * ROUNDED_ELSEWHERE


def go_on(storage: dict, case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last latent of a rollout, of one that was saved before it, and of one saved damaged."""
    change = dict(transformer=dict(**storage, sink_size_t=2, relative_rope=True))
    pipeline, _ = build_pipeline(case, 2, diffusion_model=change)
    cache = begin(pipeline, case)
    for index in range(4):
        pipeline.generate(index, cache, control(case, index))
        pipeline.finalize(index, cache)
    state = cache.state_dict()
    rollouts = [cache, pipeline.load_cache(state)]
    if state is not None:
        state["tensors"]["conditional/caches/blocks.*.self_attn.core/0/v"] *= -1
    rollouts.append(pipeline.load_cache(state))
    for rollout in rollouts:
        pipeline.generate(4, rollout, control(case, 4))
    return tuple(rollout.latent for rollout in rollouts)


@pytest.mark.parametrize(
    ("change", "case"),
    [
        ({"kv_cache_dtype": "int8"}, "plain"),
        ({"precision": "fp8"}, "plain"),
        ({"precision": "fp8"}, "tensor"),
    ],
    ids=str,
)
def test_a_saved_rollout_goes_on_with_the_same_bits_on_two_ranks(change, case):
    for stayed, loaded, damaged in run_ranks(go_on, 2, change, case):
        assert torch.equal(stayed, loaded)
        assert not torch.equal(stayed, damaged)


def run_strictly(world_size: int, storage: str) -> list[torch.Tensor]:
    change = dict(transformer=dict(kv_cache_dtype=storage))
    pipeline, _ = build_pipeline("plain", world_size, strict=True, diffusion_model=change)
    cache, latents = begin(pipeline, "plain"), []
    for index in range(4):
        pipeline.generate(index, cache, control("plain", index))
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
    return latents


def test_a_cache_in_eight_bits_keeps_the_bits_of_a_strict_rollout():
    alone, native = (run_ranks(run_strictly, 1, 1, x)[0] for x in ("int8", "native"))
    for latents in run_ranks(run_strictly, 2, 2, "int8"):
        assert all(torch.equal(x, y) for x, y in zip(latents, alone, strict=True))
        assert not torch.equal(latents[-1], native[-1])
