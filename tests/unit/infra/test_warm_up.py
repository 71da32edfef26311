"""What is built before the first rollout, and the pool of storages that keeps it valid.

CUDA's recorder is replaced by one that runs on a CPU and is as blind: what a graph froze stays so.
"""

import gc
import logging

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.parallel.collectives import TrafficMeter
from tests.tiny import TEXT_DIM, tiny_pipeline
from tests.unit.runtime.test_cuda_graph import trace_graphs

SLOW = pytest.mark.slow
FILLING = 2
"""AR steps of the tiny transformer until its window is full; they are eager, 3 calls each."""


def graphed_pipeline(warm: bool = True, max_rollouts: int = 1, guided: bool = False, **transformer):
    """A tiny pipeline whose network calls are recorded on a CPU as on CUDA."""
    config = tiny_pipeline(use_cuda_graph=True, num_layers=1, **transformer)
    scale = {"guidance_scale": 3.0} if guided else {}
    config = derive_config(config, max_rollouts=max_rollouts, diffusion_model=scale)
    pipeline = config.setup(device="cpu")
    model = pipeline.diffusion_model.transformer
    trace_graphs(model)
    if warm:
        pipeline.warm_up()
    return pipeline


def begin(pipeline, seed: int):
    generator = torch.Generator().manual_seed(seed)
    text, negative = torch.randn(2, 1, 4, TEXT_DIM, generator=generator)
    guided = pipeline.config.diffusion_model.guidance_scale is not None
    words = {"text": text, "negative_text": negative} if guided else {"text": text}
    return pipeline.initialize_cache(**words, seed=seed)


def step(pipeline, cache) -> torch.Tensor:
    index = cache.next_index
    pipeline.generate(autoregressive_index=index, cache=cache, input=0.1 * (index % 7))
    pipeline.finalize(autoregressive_index=index, cache=cache)
    return cache.latent


def eager_latents(seed: int, steps: int, guided: bool = False) -> list[torch.Tensor]:
    config = derive_config(
        tiny_pipeline(num_layers=1),
        diffusion_model={"guidance_scale": 3.0 * guided or None},
    )
    pipeline = config.setup(device="cpu")
    cache = begin(pipeline, seed)
    return [step(pipeline, cache) for _ in range(steps)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensor_bytes() -> int:
    gc.collect()
    tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    return sum(x.nbytes for x in tensors if x.layout == torch.strided)  # others have no nbytes


def graphs_of(pipeline) -> dict[str, int]:
    return pipeline.stats()["cuda_graphs"]


def test_a_cpu_has_nothing_to_build():
    pipeline = tiny_pipeline(use_cuda_graph=True).setup(device="cpu")
    done = pipeline.warm_up()
    assert (done.steps, done.captures) == (0, 0)
    assert pipeline.diffusion_model.transformer.network.eager_calls == 0
    assert pipeline.diffusion_model.pool is None
    assert pipeline.stats().keys() == {
        "warm_up_ms",
        "attention_backend",
        "attention_backends",
        "fingerprint",
    }


def test_a_network_that_cannot_be_captured_runs_eagerly(caplog):
    """As one that waits for the GPU: nothing differs but the speed, and one line says why."""
    pipeline = graphed_pipeline(warm=False)
    pipeline.diffusion_model.transformer.network._backend.refuse = True
    with caplog.at_level(logging.WARNING):
        done = pipeline.warm_up()
    assert [("cannot be captured" in r.message) for r in caplog.records] == [True]
    assert done.captures == 0
    assert "not permitted" in graphs_of(pipeline)["off"]
    cache = begin(pipeline, 1)
    assert same([step(pipeline, cache) for _ in range(5)], eager_latents(1, 5))
    assert graphs_of(pipeline)["replays"] == 0


def test_two_graphs_per_storage_are_captured_whatever_the_window():
    assert graphed_pipeline(window_size_t=9).warmed_up.captures == 2
    assert graphed_pipeline(guided=True).warmed_up.captures == 2 * 2
    pipeline = graphed_pipeline(max_rollouts=2)
    done = pipeline.warmed_up
    assert done.captures == 2 * 2
    assert "CUDA graphs" in str(done)
    assert pipeline.warm_up() is done
    assert graphs_of(pipeline) == {
        "captures_at_warm_up": done.captures,
        "captures_after_ready": 0,
        "replays": 0,
        "eager_calls": 0,
    }


@pytest.mark.parametrize(
    ("steps", "guided"),
    [(24, False), pytest.param(200, False, marks=SLOW), pytest.param(200, True, marks=SLOW)],
)
def test_nothing_is_captured_after_warm_up_whatever_rollouts_do(steps, guided):
    """A long rollout, a second one in its storage, and two interleaved; bit for bit as eager."""
    pipeline = graphed_pipeline(max_rollouts=2, guided=guided)
    first = begin(pipeline, 1)
    early = [step(pipeline, first).clone() for _ in range(8)]
    last, held = early[-1], 0
    for _ in range(8, steps):
        last = step(pipeline, first)
        held = held or tensor_bytes()
    assert tensor_bytes() == held
    expected = eager_latents(1, steps, guided)
    assert same(early, expected[:8]) and torch.equal(last, expected[-1])
    first.release()
    second = begin(pipeline, 2)
    assert same([step(pipeline, second) for _ in range(6)], eager_latents(2, 6, guided))
    third = begin(pipeline, 3)
    pairs = [(step(pipeline, third), step(pipeline, second)) for _ in range(6)]
    assert same([a for a, _ in pairs], eager_latents(3, 6, guided))
    assert same([b for _, b in pairs], eager_latents(2, 12, guided)[6:])
    counts = graphs_of(pipeline)
    branches = 2 if guided else 1
    assert counts["captures_after_ready"] == 0
    assert counts["eager_calls"] == 3 * 3 * FILLING * branches
    assert counts["replays"] == 3 * (steps + 18 - 3 * FILLING) * branches


@pytest.mark.parametrize(
    "transformer",
    [
        {"relative_rope": True, "sink_size_t": 2, "window_size_t": 3},
        {"kv_cache_dtype": "int8"},
        {"precision": "fp8"},
        {"condition_channels": 2, "image_dim": 6, "image_len": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_state_stay_in_place_too(transformer):
    context = {}
    if "image_dim" in transformer:
        context = {"image_tokens": torch.ones(1, 3, 6), "condition": torch.ones(1, 2, 5, 4, 4)}
    eager = tiny_pipeline(num_layers=1, **transformer).setup(device="cpu")
    graphed = graphed_pipeline(**transformer)
    found = []
    for pipeline in (graphed, eager):
        for seed in (1, 2):
            text = torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
            more = {name: seed * value for name, value in context.items()}
            cache = pipeline.initialize_cache(text=text, seed=seed, **more)
            found.append([step(pipeline, cache) for _ in range(7)])
            cache.release()
    assert same(found[0] + found[1], found[2] + found[3])
    counts = graphs_of(graphed)
    assert counts["captures_after_ready"] == 0 < counts["replays"]


def test_without_a_pool_every_rollout_is_captured_anew():
    """Negative control: a graph belongs to one storage."""
    pipeline = graphed_pipeline(warm=False)
    graphs = pipeline.diffusion_model.transformer.network
    for seed in (1, 2):
        cache = begin(pipeline, seed)
        for _ in range(4):
            step(pipeline, cache)
        if seed == 1:
            once = graphs.captures
    assert graphs.captures == 2 * once > 0
    graphs.seal()
    other = begin(pipeline, 3)
    with pytest.raises(RuntimeError, match="sealed since warm-up"):
        for _ in range(4):
            step(pipeline, other)


def test_a_storage_that_keeps_the_old_prompt_shows():
    """Negative control of the second rollout: its prompt must have been copied in."""
    pipeline = graphed_pipeline()
    cache = begin(pipeline, 2)
    for pairs in cache.diffusion.conditional.context.pairs:
        for x in pairs[0]:
            x.zero_()
    assert not same([step(pipeline, cache) for _ in range(2)], eager_latents(2, 2))


def test_a_rollout_beyond_the_pool_is_eager_and_says_so_once(caplog):
    pipeline = graphed_pipeline()
    first = begin(pipeline, 1)
    with caplog.at_level(logging.WARNING):
        others = [begin(pipeline, seed) for seed in (2, 3)]
    assert [r.message for r in caplog.records if "max_rollouts=1" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == 1
    for cache, seed in zip((first, *others), (1, 2, 3), strict=True):
        assert same([step(pipeline, cache) for _ in range(5)], eager_latents(seed, 5))
    counts = graphs_of(pipeline)
    assert counts["captures_after_ready"] == 0
    assert (counts["replays"], counts["eager_calls"]) == (9, 6 + 30)


def test_each_reason_for_a_rollout_without_graphs_is_told(caplog):
    pipeline = graphed_pipeline()
    text = torch.zeros(2, 4, TEXT_DIM)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pipeline.initialize_cache(text=text)
        held = [begin(pipeline, seed) for seed in (1, 2, 3)]
    told = [record.message for record in caplog.records]
    assert len(held) == 3 and len(told) == 2
    assert "another shape" in told[0] and "max_rollouts=1" in told[1]


@pytest.mark.parametrize("decodes_here", [True, False])
def test_a_rank_that_leaves_decoding_to_another_decodes_no_zeros(decodes_here):
    pipeline = graphed_pipeline(warm=False)
    pipeline.decodes_here = decodes_here
    calls = []
    pipeline.decoder.register_forward_hook(lambda *_: calls.append(1))
    pipeline.warm_up()
    assert len(calls) == 2 * decodes_here


def test_a_batch_of_two_is_eager():
    pipeline = graphed_pipeline()
    text = torch.randn(2, 4, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    cache = pipeline.initialize_cache(text=text, seed=1)
    for _ in range(4):
        step(pipeline, cache)
    assert graphs_of(pipeline)["replays"] == 0
    cache = begin(pipeline, 1)
    assert same([step(pipeline, cache) for _ in range(4)], eager_latents(1, 4))
    assert graphs_of(pipeline)["replays"] == 3 * (4 - FILLING)


def test_a_forgotten_rollout_gives_its_storage_back():
    pipeline = graphed_pipeline()
    cache = begin(pipeline, 1)
    pool = pipeline.diffusion_model.pool
    assert pool.lease(lambda storage: True) is None
    del cache
    gc.collect()
    storage = pool.lease(lambda storage: True)
    assert storage is not None
    pool.give_back(storage)
    assert same([step(pipeline, begin(pipeline, 2))], eager_latents(2, 1))


def test_a_storage_is_given_back_once():
    pipeline = graphed_pipeline()
    cache = begin(pipeline, 1)
    cache.release()
    cache.release()
    del cache
    gc.collect()
    held = begin(pipeline, 2), begin(pipeline, 3)
    branches = [cache.diffusion.conditional for cache in held]
    assert branches[0] is not branches[1]


def test_a_refused_prompt_leaves_the_storage_free():
    pipeline = graphed_pipeline()
    with pytest.raises(ValueError, match="Text embeddings must be"):
        pipeline.initialize_cache(text=torch.zeros(1, 4, TEXT_DIM + 1))
    cache = begin(pipeline, 2)
    assert same([step(pipeline, cache) for _ in range(4)], eager_latents(2, 4))
    assert graphs_of(pipeline)["replays"] == 3 * (4 - FILLING)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_released_rollout_is_refused(pooled):
    pipeline = graphed_pipeline() if pooled else tiny_pipeline().setup(device="cpu")
    cache = begin(pipeline, 1)
    latent = step(pipeline, cache)
    cache.release()
    assert len(cache.records) == 1 and cache.latent is latent
    for use in (
        lambda: pipeline.generate(autoregressive_index=1, cache=cache, input=0.0),
        lambda: pipeline.finalize(autoregressive_index=0, cache=cache),
        lambda: pipeline.update_prompt(cache, torch.zeros(1, 4, TEXT_DIM)),
        cache.state_dict,
    ):
        with pytest.raises(ValueError, match="released after 1 AR steps"):
            use()


@pytest.mark.parametrize("steps", [2, 5])
def test_prompt_updates_and_imports_keep_storage_in_place(steps):
    """Also in mid-chunk, and when the window holds a part of a chunk."""
    graphed, eager = (
        graphed_pipeline(max_rollouts=2),
        tiny_pipeline(num_layers=1).setup(device="cpu"),
    )
    other = torch.randn(1, 3, TEXT_DIM, generator=torch.Generator().manual_seed(9))
    found = []
    for pipeline in (graphed, eager):
        cache = begin(pipeline, 1)
        latents = [step(pipeline, cache) for _ in range(steps)]
        pipeline.generate(autoregressive_index=steps, cache=cache, input=0.0)
        pipeline.update_prompt(cache, other, reencode_window=True)
        pipeline.finalize(autoregressive_index=steps, cache=cache)
        latents += [step(pipeline, cache) for _ in range(3)]
        pipeline.update_prompt(cache, other + 1, reencode_window=True)
        fork = pipeline.load_cache(cache.state_dict())
        latents += [x for _ in range(4) for x in (step(pipeline, fork), step(pipeline, cache))]
        found.append(latents)
    assert same(*found)
    counts = graphs_of(graphed)
    assert counts["captures_after_ready"] == 0 < counts["replays"]


def test_dropped_graphs_leave_rollouts_that_go_on():
    pipeline = graphed_pipeline()
    cache = begin(pipeline, 1)
    latents = [step(pipeline, cache) for _ in range(3)]
    pipeline.drop_graphs()
    latents += [step(pipeline, cache) for _ in range(3)]
    assert same(latents, eager_latents(1, 6))
    assert graphs_of(pipeline)["eager_calls"] == 3 * FILLING + 9


def test_replays_count_what_the_recorded_call_sent():
    """The meter of the ranks counts one collective per call; warm-up leaves no trace in it."""
    meters = []
    for warm in (False, True):
        pipeline = graphed_pipeline(warm=False)
        meter, model = TrafficMeter(), pipeline.diffusion_model.transformer
        object.__setattr__(pipeline.layout.mesh, "meter", meter)
        model.network.meter = meter
        model.blocks[0].register_forward_hook(lambda *_, meter=meter: meter.add("exchange", 10))
        if warm:
            pipeline.warm_up()
            assert not meter.counts
        else:
            model.network = model.__call__
        cache = begin(pipeline, 1)
        for _ in range(5):
            step(pipeline, cache)
        meters.append(meter.counts)
    assert meters[0] == meters[1]
    assert meters[0]["exchange"].calls > 0


def test_a_pool_of_none_is_refused():
    with pytest.raises(ValueError, match="max_rollouts=0 must be at least 1"):
        derive_config(tiny_pipeline(), max_rollouts=0)
