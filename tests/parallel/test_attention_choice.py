"""The attention call that is measured is the one that a rank makes."""

import pytest
import torch

from flashdreams.attention.backends import sdpa
from flashdreams.attention.choose import BackendChoice
from flashdreams.attention.core import AttentionCore
from flashdreams.infra import warm_up
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, local_attention, resolve_degrees
from tests.harness import run_ranks
from tests.parallel.pipelines import prompt
from tests.tiny import tiny_pipeline

STEPS = 4
"""AR steps after which the window is full."""

WAYS = {
    "ulysses": {"ulysses_degree": 2},
    "gather": {"ring_degree": 2},
    "rotate": {"ring_degree": 2, "ring_method": "rotate"},
    "tensor": {"tensor_parallel_degree": 2},
}


def _cut_pipeline(way: str):
    parallel = ParallelConfig(**WAYS[way])
    pipeline = tiny_pipeline().setup(device="cpu", load=False)
    mesh = build_mesh(resolve_degrees(parallel, 2, 2, False), "cpu", parallel)
    pipeline.parallelize(mesh)
    pipeline.load()
    return pipeline, mesh


def _seen_and_predicted(way: str):
    pipeline, mesh = _cut_pipeline(way)
    transformer = pipeline.diffusion_model.transformer
    seen = []

    def noting(q, k, v, *, scale, return_lse=False):
        seen.append((q.shape[1], k.shape[1], q.shape[2], q.shape[3]))
        return sdpa(q, k, v, scale=scale, return_lse=return_lse)

    for module in transformer.blocks[0].self_attn.modules():
        if isinstance(module, AttentionCore):
            module.backend = noting
    cache = pipeline.initialize_cache(text=prompt(0))
    for i in range(STEPS):
        seen.clear()
        pipeline.generate(autoregressive_index=i, cache=cache, input=0.1)
        pipeline.finalize(autoregressive_index=i, cache=cache)
    shape = local_attention(transformer.attention_shape(1), mesh)
    return set(seen), {(shape.queries, shape.keys, shape.num_heads, shape.head_dim)}


def _choices():
    """Ranks whose clocks disagree."""
    pipeline, mesh = _cut_pipeline("ulysses")
    transformer = pipeline.diffusion_model.transformer
    own = ("sdpa_math", "sdpa_flash")[mesh.ulysses.rank]
    warm_up.choose_backend = lambda *_: BackendChoice(own, ())
    choice = warm_up.choose_attention(transformer, mesh, torch.device("cuda"))
    core = next(m for m in transformer.modules() if isinstance(m, AttentionCore))
    return choice.name, core.backend.__name__


@pytest.mark.parametrize("way", WAYS)
def test_the_measured_shape_is_that_of_the_call(way):
    for seen, predicted in run_ranks(_seen_and_predicted, 2, way):
        assert seen == predicted != {(8, 24, 2, 12)}  # of the whole model


def test_all_ranks_run_what_rank_zero_chose():
    assert run_ranks(_choices, 2) == [("sdpa_math", "sdpa_math")] * 2
