"""The clean pass beside decoding: what comes after what, with streams that are recorded."""

import inspect
import itertools

import pytest
import torch

from tests.streams import RecordedCuda, recorded_side
from tests.tiny import TEXT_DIM, tiny_pipeline

TEXT = torch.ones(1, 3, TEXT_DIM)


def recorded(joins: bool = True):
    """A pipeline whose operations are recorded by name, and the record."""
    pipeline, cuda = tiny_pipeline().setup(device="cpu"), RecordedCuda()
    model = pipeline.diffusion_model
    model.side = recorded_side(cuda)
    if not joins:
        model.side.join = lambda: None
    transformer = model.transformer
    for owner, method in (
        (transformer, "begin_step"),
        (transformer, "update_cache"),
        (transformer, "update_context"),
        (transformer, "rewrite_context"),
        (transformer, "initialize_cache"),
        (pipeline.decoder, "forward"),
    ):
        setattr(owner, method, _told(getattr(owner, method), method, cuda))
    return pipeline, cuda


def _told(function, name, cuda):
    def call(*args, **kwargs):
        cuda.run(name)
        return function(*args, **kwargs)

    call.__signature__ = inspect.signature(function)
    return call


def step(pipeline, cache, index):
    pipeline.generate(index, cache, 0.5)
    pipeline.finalize(index, cache)


CONSUMERS = {
    "generate": lambda pipeline, cache, cuda: pipeline.generate(1, cache, 0.5),
    "update_prompt": lambda pipeline, cache, cuda: pipeline.update_prompt(cache, TEXT),
    "another rollout": lambda pipeline, cache, cuda: pipeline.initialize_cache(text=TEXT),
    "state_dict": lambda pipeline, cache, cuda: (cache.state_dict(), cuda.run("read")),
    "release": lambda pipeline, cache, cuda: (cache.release(), cuda.run("reuse")),
    "drop_graphs": lambda pipeline, cache, cuda: (pipeline.drop_graphs(), cuda.run("reuse")),
}


def first_use_follows_the_clean_pass(consumer: str, joins: bool = True) -> bool:
    pipeline, cuda = recorded(joins)
    cache = pipeline.initialize_cache(text=TEXT)
    step(pipeline, cache, 0)
    first = len(cuda.names)
    CONSUMERS[consumer](pipeline, cache, cuda)
    return cuda.precedes(cuda.names.index("update_cache"), first)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_whatever_touches_the_rollout_next_waits_for_the_clean_pass(consumer):
    assert first_use_follows_the_clean_pass(consumer)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_forgotten_join_is_seen(consumer):
    assert not first_use_follows_the_clean_pass(consumer, joins=False)


def test_the_clean_pass_runs_beside_decoding_and_behind_the_diffusion():
    pipeline, cuda = recorded()
    cache = pipeline.initialize_cache(text=TEXT)
    step(pipeline, cache, 0)
    begun, decoded, cleaned = map(cuda.names.index, ("begin_step", "forward", "update_cache"))
    assert cuda.precedes(begun, cleaned) and not cuda.on_main[cleaned]
    assert not cuda.precedes(decoded, cleaned) and not cuda.precedes(cleaned, decoded)


def test_a_prompt_that_changes_before_the_clean_pass_comes_before_it():
    pipeline, cuda = recorded()
    cache = pipeline.initialize_cache(text=TEXT)
    pipeline.generate(0, cache, 0.5)
    pipeline.update_prompt(cache, TEXT)
    pipeline.finalize(0, cache)
    changed, cleaned = map(cuda.names.index, ("update_context", "update_cache"))
    assert cuda.precedes(changed, cleaned)


def test_interleaved_rollouts_take_turns():
    """Captured calls of all rollouts share their memory: no two may run at once."""
    pipeline, cuda = recorded()
    caches = [pipeline.initialize_cache(text=TEXT, seed=seed) for seed in (0, 1)]
    for index in range(2):
        for cache in caches:
            step(pipeline, cache, index)
    calls = [i for i, name in enumerate(cuda.names) if name in ("begin_step", "update_cache")]
    assert all(cuda.precedes(a, b) for a, b in itertools.pairwise(calls))


def test_the_clean_pass_is_timed_on_its_stream():
    pipeline, cuda = recorded()
    cache = pipeline.initialize_cache(text=TEXT)
    clock = cache.timer._clock
    true_mark, marks = clock.mark, []
    clock.mark = lambda: (marks.append(cuda.current is cuda.main), true_mark())[1]
    pipeline.generate(0, cache, 0.5)
    assert all(marks)
    marks.clear()
    pipeline.finalize(0, cache)
    assert marks == [False, False]
    assert cache.records[0]["finalize_ms"] > 0


def test_it_can_be_switched_off():
    config = tiny_pipeline()
    config.diffusion_model.overlap_clean_pass = False
    model = config.setup(device="cpu").diffusion_model
    assert not model.may_overlap
    assert tiny_pipeline().setup(device="cpu").diffusion_model.may_overlap
