"""Changing the prompt in mid-rollout (float32; tolerance 1e-5 absolute where bits may differ)."""

from types import SimpleNamespace

import pytest
import torch

from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.encoder.base import EncoderConfig
from flashdreams.models.wan.transformer import SELF_ATTENTION
from tests.listed_window import turn_in_time
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_pipeline

ATOL = 1e-5
TOKENS_PER_CHUNK = 8

# Chunks are of 2 latent frames; (window, sink, relative RoPE).
WINDOWS = [(5, 1, False), (4, 0, False), (3, 2, False), (5, 1, True), (4, 2, True), (3, 3, True)]


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def control(index: int) -> torch.Tensor:
    shape = (1, TOKENS_PER_CHUNK, CONTROL_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def build(window: int = 5, sink: int = 1, relative: bool = False, context_noise: float = 0.0):
    config = tiny_pipeline(window_size_t=window, sink_size_t=sink, relative_rope=relative)
    config.encoder, config.decoder = EncoderConfig(), None  # control is handed on as it is
    config.diffusion_model.context_noise = context_noise
    pipeline = config.setup(device="cpu")
    for parameter in pipeline.parameters():  # the default initialisation is too tame to tell
        if parameter.ndim > 1:
            parameter.mul_(2)
    return pipeline


def step(pipeline, cache, index: int, finalize: bool = True) -> torch.Tensor:
    latent = pipeline.generate(index, cache, input=control(index))
    if finalize:
        pipeline.finalize(index, cache)
    return latent


def run(pipeline, prompt: torch.Tensor, steps: int):
    cache = pipeline.initialize_cache(text=prompt, seed=3)
    latents = [step(pipeline, cache, i) for i in range(steps)]
    return cache, latents


def keys_and_values(cache) -> list[torch.Tensor]:
    layers = list(cache.diffusion.conditional.layers())
    return [x for layer in layers for x in layer.visible()]


@torch.no_grad()
def reencoded_by_hand(pipeline, latents, prompt, cache) -> None:
    """Chunk by chunk on a fresh cache, each frame with keys and values of its own, no ring.

    Every layer's keys and values are collected in a plain list of frames, so that nothing of the
    cache's bookkeeping is used; the result is compared frame by frame with the cache's slots.
    """
    transformer = pipeline.diffusion_model.transformer
    c = transformer.config
    total = c.len_t * len(latents)
    oldest = max(c.sink_size_t, total - c.window_size_t)
    held = [f for f in range(total) if f < c.sink_size_t or f >= oldest]
    evicted = max(0, total - c.sink_size_t - c.window_size_t)
    branch = transformer.initialize_cache(text=prompt)
    stores = [FrameStore(c, evicted if c.relative_rope else 0) for _ in transformer.blocks]
    for index, latent in enumerate(latents):
        kept = [t for t in range(c.len_t) if index * c.len_t + t in held]
        if not kept:
            continue
        frames = [index * c.len_t + t for t in kept]
        for store in stores:
            store.begin(frames)
        branch.caches = {SELF_ATTENTION: stores}
        chunk_control = control(index).unflatten(1, (c.len_t, -1))[:, kept].flatten(1, 2)
        inputs = transformer.inputs_at(branch, torch.tensor(frames), chunk_control)
        clean = transformer.modulations(torch.zeros(1, dtype=torch.float64))
        transformer(latent[:, :, kept], clean, inputs, branch)
    for store, layer in zip(stores, list(cache.diffusion.conditional.layers()), strict=True):
        for frame in held:
            slot = layer.cursor.frame_slots(frame, frame + 1)[0]
            place = slice(slot * c.tokens_per_frame, (slot + 1) * c.tokens_per_frame)
            key, value = store.frame(frame, moved=c.relative_rope and frame < c.sink_size_t)
            torch.testing.assert_close(layer.k[:, place], key, atol=ATOL, rtol=0)
            torch.testing.assert_close(layer.v[:, place], value, atol=ATOL, rtol=0)


class FrameStore:
    """Keys and values by frame number, in a dict."""

    cursor, spec = SimpleNamespace(groups=()), SimpleNamespace(storage="native")
    scales, quantizes_early, calibrates = None, False, False

    def __init__(self, config, evicted: int) -> None:
        self.config, self.evicted = config, evicted
        self.frames: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, current: list[int]) -> None:
        self.current = current

    def update(self, k, v):
        tokens = self.config.tokens_per_frame
        for frame, key, value in zip(
            self.current, k.split(tokens, 1), v.split(tokens, 1), strict=True
        ):
            self.frames[frame] = (key, value)
        past_sink = self.current[0] >= self.config.sink_size_t
        seen = [
            self.frame(f, moved=past_sink and f < self.config.sink_size_t)
            for f in sorted(self.frames)
        ]
        return torch.cat([s[0] for s in seen], 1), torch.cat([s[1] for s in seen], 1)

    def frame(self, number: int, moved: bool):
        key, value = self.frames[number]
        if moved and self.evicted:
            key = turn_in_time(key, self.evicted)
        return key, value


def tensors_of(branch) -> list[torch.Tensor]:
    own = [x for layer in branch.layers() for x in layer.visible()]
    return own + [x for pairs in branch.context.pairs for x in pairs[0]]


def test_update_touches_cross_attention_alone_and_keeps_its_storage():
    pipeline = build()
    cache, _ = run(pipeline, text(1), 2)
    before = [x.clone() for x in keys_and_values(cache)]
    context = cache.diffusion.conditional.context.pairs
    places = [x.data_ptr() for pairs in context for x in pairs[0]]
    old = [x.clone() for pairs in context for x in pairs[0]]
    pipeline.update_prompt(cache, text(2))
    fresh = pipeline.initialize_cache(text=text(2)).diffusion.conditional.context.pairs
    now = [x for pairs in cache.diffusion.conditional.context.pairs for x in pairs[0]]
    assert [x.data_ptr() for x in now] == places
    for new, expected in zip(now, (x for pairs in fresh for x in pairs[0]), strict=True):
        assert torch.equal(new, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, keys_and_values(cache), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(old, now, strict=True))


def test_an_update_to_the_same_prompt_changes_no_bit():
    pipeline = build()
    cache, _ = run(pipeline, text(1), 3)
    plain, _ = run(pipeline, text(1), 3)
    pipeline.update_prompt(cache, text(1))
    assert torch.equal(step(pipeline, cache, 3), step(pipeline, plain, 3))
    pipeline.update_prompt(cache, text(2))
    assert not torch.equal(step(pipeline, cache, 4), step(pipeline, plain, 4))


@pytest.mark.parametrize("context_noise", [0.0, 40.0])
def test_before_the_window_is_full_reencoding_is_a_rollout_of_clean_passes(context_noise):
    pipeline = build(window=6, sink=0, context_noise=context_noise)
    cache, _ = run(pipeline, text(1), 3)
    stale = [x.clone() for x in keys_and_values(cache)]
    pipeline.update_prompt(cache, text(2), reencode_window=True)

    by_hand = pipeline.initialize_cache(text=text(2), seed=3)
    for i, chunk in enumerate(cache.diffusion.history):
        transformer = pipeline.diffusion_model.transformer
        transformer.begin_step(i, by_hand.diffusion.conditional, control(i))
        by_hand.diffusion.latent, by_hand.diffusion.control = chunk.latent, control(i)
        by_hand.diffusion.pending = True
        pipeline.diffusion_model.finalize(i, by_hand.diffusion)
    now = keys_and_values(cache)
    assert all(torch.equal(a, b) for a, b in zip(now, keys_and_values(by_hand), strict=True))
    # Negative control: not what was there before. The first layer's keys see no prompt.
    changes = [(a - b).abs().max() for a, b in zip(now[2:], stale[2:], strict=True)]
    assert min(changes) > 100 * ATOL
    by_hand.next_index = 3
    assert torch.equal(step(pipeline, cache, 3), step(pipeline, by_hand, 3))


@pytest.mark.parametrize(("window", "sink", "relative"), WINDOWS)
@pytest.mark.parametrize("steps", [2, 5, 6])
def test_reencoding_equals_a_loop_over_frames(window, sink, relative, steps):
    pipeline = build(window, sink, relative)
    cache, latents = run(pipeline, text(1), steps)
    pipeline.update_prompt(cache, text(2), reencode_window=True)
    reencoded_by_hand(pipeline, latents, text(2), cache)


def test_the_loop_over_frames_notices_a_stale_window():
    """Negative control of the test above."""
    pipeline = build(5, 1)
    cache, latents = run(pipeline, text(1), 5)
    pipeline.update_prompt(cache, text(2))
    with pytest.raises(AssertionError):
        reencoded_by_hand(pipeline, latents, text(2), cache)


@pytest.mark.parametrize(("window", "sink", "relative"), WINDOWS)
def test_reencoding_under_the_same_prompt_twice_is_stable(window, sink, relative):
    """The first pass drops what was evicted; the second reads what the first wrote."""
    pipeline = build(window, sink, relative)
    cache, _ = run(pipeline, text(1), 5)
    pipeline.update_prompt(cache, text(2), reencode_window=True)
    first = [x.clone() for x in keys_and_values(cache)]
    pipeline.update_prompt(cache, text(2), reencode_window=True)
    assert all(torch.equal(a, b) for a, b in zip(first, keys_and_values(cache), strict=True))


@pytest.mark.parametrize(("window", "sink", "relative"), WINDOWS)
def test_a_pending_chunk_gets_its_own_clean_pass_under_the_new_prompt(window, sink, relative):
    pipeline = build(window, sink, relative)
    cache, latents = run(pipeline, text(1), 4)
    latents.append(step(pipeline, cache, 4, finalize=False))
    pipeline.update_prompt(cache, text(2), reencode_window=True)
    pipeline.finalize(4, cache)
    reencoded_by_hand(pipeline, latents, text(2), cache)


def test_without_reencoding_a_pending_chunk_alone_sees_the_new_prompt():
    pipeline = build()
    cache, _ = run(pipeline, text(1), 2)
    before = [x.clone() for x in keys_and_values(cache)]
    step(pipeline, cache, 2, finalize=False)
    pipeline.update_prompt(cache, text(2))
    pipeline.finalize(2, cache)
    old, _ = run(pipeline, text(1), 3)
    layer = list(cache.diffusion.conditional.layers())[1]
    own = slice(4 * 4, 6 * 4)  # slots of frames 4 and 5
    assert torch.equal(layer.k[:, : 4 * 4], before[2])
    assert not torch.equal(
        layer.k[:, own], old.diffusion.conditional.caches[SELF_ATTENTION][1].k[:, own]
    )


def test_the_negative_half_keeps_its_prompt():
    config = tiny_pipeline()
    config.encoder, config.decoder = EncoderConfig(), None
    config.diffusion_model.guidance_scale = 3.0
    pipeline = config.setup(device="cpu")
    cache = pipeline.initialize_cache(text=text(1), negative_text=text(5))
    for i in range(2):
        step(pipeline, cache, i)
    halves = cache.diffusion.conditional, cache.diffusion.unconditional
    before = [[x.clone() for x in tensors_of(half)] for half in halves]
    pipeline.update_prompt(cache, text(2), reencode_window=True)
    same = [
        [torch.equal(a, b) for a, b in zip(old, tensors_of(half), strict=True)]
        for old, half in zip(before, halves, strict=True)
    ]
    assert all(same[1]) and not any(same[0][2:])  # the first layer's keys see no prompt


@pytest.mark.parametrize(("window", "sink"), [(5, 1), (4, 0), (3, 3)])
def test_the_rollout_keeps_no_more_latents_than_sink_and_window_need(window, sink):
    pipeline = build(window, sink)
    cache, _ = run(pipeline, text(1), 12)
    chunks = [c.autoregressive_index for c in cache.diffusion.history]
    held = [f for f in range(24) if f < sink or f >= max(sink, 24 - window)]
    assert chunks == sorted({f // 2 for f in held})


def test_updates_that_do_not_fit_are_refused():
    pipeline = build()
    cache, _ = run(pipeline, text(1), 1)
    with pytest.raises(ValueError, match="has 1 prompts, the update 2"):
        pipeline.update_prompt(cache, torch.cat([text(1), text(2)]))
    with pytest.raises(ValueError, match=r"at most 6, 12\]; got \[1, 4, 7\]"):
        pipeline.update_prompt(cache, torch.zeros(1, 4, 7))
    with pytest.raises(TypeError, match=r"does not define update_context\(cache, text\)"):
        Transformer.update_context(pipeline.diffusion_model.transformer, None)
