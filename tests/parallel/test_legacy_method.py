"""A method written against the documentation of 0.1 runs, with warnings, until 0.3.

Float32 within 1e-5 of the largest latent on 2 and 4 ranks; bits where a rollout is saved, loaded,
cloned or replayed at the same number of ranks.
"""

import warnings
from functools import cache

import pytest
import torch

from flashdreams.parallel.mesh import ParallelConfig
from tests.harness import run_ranks
from tests.legacy_method import TEXT_DIM, LegacyTransformer, legacy_pipeline
from tests.parallel.rollout import relative_error
from tests.unit.runtime.test_cuda_graph import trace_graphs

WAYS = {"ulysses": {}, "ring": {"ulysses_degree": 1}, "tensor": {"tensor_parallel_degree": 2}}
STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def prompt(seed: int = 0):
    return torch.randn(1, 2, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def build(world_size: int = 1, way: str = "ulysses", **transformer):
    pipeline = legacy_pipeline(**transformer).setup(device="cpu", load=False)
    degrees = dict(WAYS[way])
    if "ulysses_degree" in degrees:
        degrees["ring_degree"] = world_size
    pipeline.parallelize(pipeline.build_mesh(world_size, ParallelConfig(**degrees)))
    pipeline.load()
    return pipeline


def advance(pipeline, cache, steps):
    latents = []
    for _ in range(steps):
        index = cache.next_index
        latents.append(pipeline.generate(autoregressive_index=index, cache=cache).clone())
        pipeline.end_step(autoregressive_index=index, cache=cache)
    return latents


def roll(world_size: int, way: str):
    """Latents of a rollout, and those after save and load, after clone, and of its source."""
    pipeline = build(world_size, way)
    cache = pipeline.initialize_cache(text=prompt(), seed=2)
    latents = advance(pipeline, cache, STEPS)
    pipeline.update_prompt(cache, prompt(1), reencode_window=True)
    state = cache.state_dict()
    loaded, fork = pipeline.load_cache(state), cache.clone()
    after = [advance(pipeline, c, 3) for c in (cache, loaded, fork)]
    return latents, after, pipeline.diffusion_model.transformer.finished


@cache
def on_one_rank():
    return run_ranks(roll, 1, 1, "ulysses")[0]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_it_runs_on_many_ranks_and_its_rollouts_move(way, world_size):
    expected, (follows, *_), _ = on_one_rank()
    for latents, after, finished in run_ranks(roll, world_size, world_size, way):
        assert finished == 1
        assert relative_error(latents, expected) <= 1e-5
        assert relative_error(after[0], follows) <= 1e-5
        for moved in after[1:]:
            assert all(torch.equal(a, b) for a, b in zip(moved, after[0], strict=True))


def test_the_context_counts():
    """Negative control: the prompt change and the rewriting show."""
    pipeline = build()
    cache = pipeline.initialize_cache(text=prompt(), seed=2)
    advance(pipeline, cache, STEPS)
    assert relative_error(advance(pipeline, cache, 3), on_one_rank()[1][0]) > 1e-3


def test_its_own_graphs_are_captured_and_replayed():
    pipeline = build(use_cuda_graph=True)
    trace_graphs(pipeline.diffusion_model.transformer)
    done = pipeline.warm_up()
    assert done.captures == 3  # 2, 4 and 6 visible frames
    for seed in (0, 1):
        cache = pipeline.initialize_cache(text=prompt(seed), seed=2)
        found = advance(pipeline, cache, STEPS)
        cache.release()
        plain = build()
        eager = advance(plain, plain.initialize_cache(text=prompt(seed), seed=2), STEPS)
        assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))
    graphs = pipeline.stats()["cuda_graphs"]
    assert (graphs["captures_after_ready"], graphs["eager_calls"]) == (0, 0)


def test_every_name_on_its_way_out_warns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = build()
        cache = pipeline.initialize_cache(text=prompt())
        advance(pipeline, cache, 2)
        pipeline.update_prompt(cache, prompt(1), reencode_window=True)
    said = {str(w.message) for w in caught if w.category is DeprecationWarning}
    for name in (
        *("finish_loading", "ParallelPlan.rollout", "end_step", "copy_in_place"),
        *("CacheCursor.place ", "CacheCursor.rewriting", "CacheCursor.place_next"),
    ):
        assert any(name in text for text in said), name


def test_state_without_styles_and_without_a_plan_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(LegacyTransformer, "parallel_plan", lambda self: None)
    pipeline = legacy_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt())
    advance(pipeline, cache, 1)
    for call in (cache.state_dict, cache.clone):
        with pytest.raises(TypeError, match=r"LegacyCache\.layers \(a list\) does not say"):
            call()
