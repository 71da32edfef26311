"""Clean passes fused with the next chunk's first denoising step, against clean passes of their own.

Float32; ``max|a - b| / max|b| <= 1e-5`` over the latents of every AR step.
"""

from contextlib import contextmanager

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.encoder.base import EncoderConfig
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_pipeline

TOLERANCE = 1e-5
TOKENS_PER_FRAME = 4
STEPS = 9

# (window, sink, chunk): the chunk divides them, and it does not; nine chunks fill and wrap all.
WINDOWS = [(4, 0, 2), (6, 3, 3), (5, 1, 2), (5, 0, 2), (7, 2, 3), (3, 4, 3), (2, 0, 2), (5, 2, 1)]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(fused: bool, window: int = 5, sink: int = 1, chunk: int = 2, guided=False, **changes):
    transformer = dict(window_size_t=window, sink_size_t=sink, len_t=chunk, **changes)
    config = tiny_pipeline(**transformer, fuse_clean_pass=fused)
    config.encoder, config.decoder = EncoderConfig(), None  # control is handed on as it is
    config = derive_config(config, diffusion_model=dict(guidance_scale=3.0 if guided else None))
    pipeline = config.setup(device="cpu")
    for parameter in pipeline.parameters():  # the default initialisation is too tame to tell
        if parameter.ndim > 1:
            parameter.mul_(2)
    return pipeline


def begin(pipeline, prompts: int = 1, seed: int = 3):
    c = pipeline.diffusion_model.transformer.config
    context = {"text": draw(1, prompts, 4, TEXT_DIM)}
    if pipeline.config.diffusion_model.guidance_scale is not None:
        context["negative_text"] = draw(2, prompts, 4, TEXT_DIM)
    if c.condition_channels:
        context["condition"] = draw(4, prompts, c.condition_channels, 7, 4, 4)
    if c.image_dim is not None:
        context["image_tokens"] = draw(5, prompts, 3, c.image_dim)
    return pipeline.initialize_cache(**context, seed=seed)


def step(pipeline, cache) -> torch.Tensor:
    index, c = cache.next_index, pipeline.diffusion_model.transformer.config
    tokens = c.len_t * TOKENS_PER_FRAME
    control = None if c.control_dim is None else draw(100 + index, 1, tokens, CONTROL_DIM)
    latent = pipeline.generate(index, cache, input=control)
    pipeline.end_step(index, cache)
    return latent.clone()


def roll(pipeline, cache, steps: int = STEPS) -> list[torch.Tensor]:
    return [step(pipeline, cache) for _ in range(steps)]


def errors(a, b) -> list[float]:
    return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True)]


def both(steps: int = STEPS, prompts: int = 1, **options):
    """Latents of the fused rollout, and of the other."""
    pipelines = (build(fused, **options) for fused in (True, False))
    return [roll(pipeline, begin(pipeline, prompts), steps) for pipeline in pipelines]


@pytest.mark.parametrize(("window", "sink", "chunk"), WINDOWS)
def test_fused_rollout_equals_the_other(window, sink, chunk):
    fused, plain = both(window=window, sink=sink, chunk=chunk)
    assert max(errors(fused, plain)) <= TOLERANCE
    assert not all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(guided=True),
        dict(control_dim=None),
        dict(control_dim=None, prediction="x0"),
        dict(condition_channels=3, image_dim=10),
        dict(kv_cache_dtype="int8"),  # rounding itself changes the latents by 8e-4
        dict(linear_precision="fp8_rowwise"),  # and here by 0.4
        dict(condition_channels=3, guided=True, prompts=2),
    ],
    ids=str,
)
def test_fused_rollout_equals_the_other_with(options):
    fused, plain = both(steps=6, **options)
    assert max(errors(fused, plain)) <= TOLERANCE


def misled(change, **options) -> float:
    """The error of a fused rollout in which ``change`` falsifies what each chunk sees."""
    pipeline, plain = build(True, **options), build(False, **options)
    cache = begin(pipeline)
    cursor = cache.diffusion.conditional.cursor
    with_next = cursor.with_next

    @contextmanager
    def misleading(device):
        with with_next(device):
            cursor.groups = change(cursor.groups)
            yield

    cursor.with_next = misleading
    return max(errors(roll(pipeline, cache), roll(plain, begin(plain))))


def sees_the_next(groups):
    """The clean chunk sees all that the next one sees."""
    return groups[1], groups[1]


def sees_the_evicted(groups):
    """The next chunk sees what it evicts, too."""
    return groups[0], ((0, max(stop for _, stop in groups[1])),)


@pytest.mark.parametrize("change", [sees_the_next, sees_the_evicted])
@pytest.mark.parametrize(("window", "sink", "chunk"), [(5, 1, 2), (4, 0, 2)])
def test_seeing_too_much_is_noticed(change, window, sink, chunk):
    """Negative control."""
    assert misled(lambda groups: groups, window=window, sink=sink, chunk=chunk) <= TOLERANCE
    assert misled(change, window=window, sink=sink, chunk=chunk) > 100 * TOLERANCE


def count_calls(pipeline) -> list[int]:
    """A list that grows by one for every network call, by the size of its batch."""
    calls: list[int] = []
    network = pipeline.diffusion_model.transformer.patch_embedding
    network.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    return calls


@pytest.mark.parametrize("guided", [False, True])
def test_four_denoising_steps_take_four_calls(guided):
    timesteps = (1000.0, 750.0, 500.0, 250.0)
    for fused, expected in ((True, [2, 1, 1, 1]), (False, [1] * 5)):
        config = build(fused, guided=guided).config
        scheduler = FlowMatchSchedulerConfig(denoising_timesteps=timesteps)
        pipeline = derive_config(config, diffusion_model=dict(scheduler=scheduler)).setup(
            device="cpu"
        )
        cache, calls = begin(pipeline), count_calls(pipeline)
        step(pipeline, cache)
        first = len(calls)
        step(pipeline, cache)
        assert first == (5 - fused) * (1 + guided)
        assert sorted(calls[first:]) == sorted(expected * (1 + guided))


def test_finalize_runs_the_clean_pass_at_once():
    """Runners that finalize every step get the same bits as without the option."""
    latents = []
    for fused in (True, False):
        pipeline = build(fused)
        cache, latents_of = begin(pipeline), []
        pipeline.end_step = pipeline.finalize
        calls = count_calls(pipeline)
        latents_of = roll(pipeline, cache)
        assert calls == [1] * 3 * STEPS
        latents.append(latents_of)
    assert all(torch.equal(a, b) for a, b in zip(*latents, strict=True))


def test_now_fused_now_finalized():
    pipeline, plain = build(True), build(False)
    cache = begin(pipeline)
    latents = []
    for i in range(STEPS):
        latents.append(step(pipeline, cache))
        if i % 3 == 1:
            pipeline.finalize(i, cache)
            pipeline.finalize(i, cache)  # done already
    assert max(errors(latents, roll(plain, begin(plain)))) <= TOLERANCE


@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_prompt_update_ends_the_step_under_the_old_prompt(at, reencode):
    latents = []
    for pipeline in (build(True, guided=True), build(False, guided=True)):
        cache = begin(pipeline)
        before = roll(pipeline, cache, at)
        pipeline.update_prompt(cache, draw(8, 1, 4, TEXT_DIM), reencode_window=reencode)
        latents.append([*before, *roll(pipeline, cache, 3)])
    assert max(errors(*latents)) <= TOLERANCE


def test_a_prompt_update_without_flushing_is_noticed():
    """Negative control."""
    latents = []
    for pipeline in (build(True), build(False)):
        cache = begin(pipeline)
        roll(pipeline, cache, 4)
        cache.flush = lambda: None
        pipeline.update_prompt(cache, draw(8, 1, 4, TEXT_DIM))
        latents.append(roll(pipeline, cache, 3))
    assert max(errors(*latents)) > 100 * TOLERANCE


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_an_export_is_that_of_the_other_rollout_and_goes_on_either_way(steps):
    pipeline, plain = build(True), build(False)
    expected = roll(plain, begin(plain), steps + 4)[steps:]
    states = []
    for each in (pipeline, plain):
        cache = begin(each)
        roll(each, cache, steps)
        states.append(cache.state_dict())
    assert states[0]["values"] == states[1]["values"]
    for name, x in states[1]["tensors"].items():
        torch.testing.assert_close(states[0]["tensors"][name], x, rtol=1e-5, atol=1e-4)
    for each in (pipeline, plain):
        again = each.load_cache(states[0])
        assert max(errors(roll(each, again, 4), expected)) <= TOLERANCE


def test_an_exported_rollout_goes_on_itself():
    pipeline, plain = build(True), build(False)
    cache = begin(pipeline)
    latents = roll(pipeline, cache, 4)
    cache.state_dict()
    latents += roll(pipeline, cache, 4)
    assert max(errors(latents, roll(plain, begin(plain), 8))) <= TOLERANCE


def test_rollouts_may_interleave():
    pipeline = build(True)
    alone = [roll(pipeline, begin(pipeline, seed=seed)) for seed in (3, 4)]
    caches = [begin(pipeline, seed=seed) for seed in (3, 4)]
    latents = [[step(pipeline, cache) for cache in caches] for _ in range(STEPS)]
    for mixed, expected in zip(zip(*latents, strict=True), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))


def test_no_more_latents_are_kept():
    fused, plain = build(True), build(False)
    caches = [begin(pipeline) for pipeline in (fused, plain)]
    for pipeline, cache in zip((fused, plain), caches, strict=True):
        roll(pipeline, cache, 7)
        cache.flush()
    held = [[c.autoregressive_index for c in cache.diffusion.history] for cache in caches]
    assert held[0] == held[1] == [0, 4, 5, 6]


def test_a_step_that_failed_can_be_repeated():
    """Before the network call nothing of the pending chunk is lost."""
    pipeline, plain = build(True), build(False)
    cache = begin(pipeline)
    latents = roll(pipeline, cache, 4)
    with pytest.raises(RuntimeError):
        pipeline.generate(4, cache, input=torch.zeros(1, 3, CONTROL_DIM))
    with pytest.raises(ValueError, match="needs control input"):
        pipeline.generate(4, cache, input=None)
    latents += roll(pipeline, cache, 4)
    assert max(errors(latents, roll(plain, begin(plain), 8))) <= TOLERANCE


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_failed_between_the_halves_can_be_repeated(fused, monkeypatch):
    """One half has made up the clean pass, the other one has not."""
    pipeline, plain = build(fused, guided=True), build(False, guided=True)
    cache = begin(pipeline)
    latents = roll(pipeline, cache, 4)

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        transformer = pipeline.diffusion_model.transformer
        first = transformer.predict_first_flow if fused else transformer.predict_flow
        calls = iter([first, fail])
        patch.setattr(transformer, first.__name__, lambda *arguments: next(calls)(*arguments))
        with pytest.raises(RuntimeError, match="out of memory"):
            step(pipeline, cache)
    latents += roll(pipeline, cache, 4)
    assert max(errors(latents, roll(plain, begin(plain), 8))) <= TOLERANCE


def test_steps_out_of_order_are_refused():
    pipeline = build(True)
    cache = begin(pipeline)
    for call in (pipeline.end_step, pipeline.finalize):
        with pytest.raises(ValueError, match=r"expected generate\(autoregressive_index=0\) first"):
            call(0, cache)
    roll(pipeline, cache, 2)
    for call in (pipeline.end_step, pipeline.finalize):
        with pytest.raises(ValueError, match="expected autoregressive_index=1, got 0"):
            call(0, cache)
    with pytest.raises(ValueError, match="expected autoregressive_index=2, got 3"):
        pipeline.generate(3, cache, input=draw(0, 1, 8, CONTROL_DIM))


def test_without_the_option_an_unfinished_step_is_refused():
    pipeline = build(False)
    cache = begin(pipeline)
    pipeline.generate(0, cache, input=draw(0, 1, 8, CONTROL_DIM))
    with pytest.raises(ValueError, match=r"expected finalize\(autoregressive_index=0\) first"):
        pipeline.generate(1, cache, input=draw(0, 1, 8, CONTROL_DIM))


@pytest.mark.parametrize(
    ("model", "transformer", "message"),
    [
        ({}, dict(relative_rope=True), "relative_rope=True"),
        ({}, dict(streaming=False), "needs streaming=True"),
        ({}, dict(linear_precision="fp8"), "Use 'fp8_rowwise'"),
        (dict(context_noise=40.0), {}, "context_noise=40"),
    ],
)
def test_what_cannot_be_fused_is_refused(model, transformer, message):
    config = tiny_pipeline(fuse_clean_pass=True)
    with pytest.raises(ValueError, match=message):
        derive_config(config, diffusion_model=dict(model, transformer=transformer))
