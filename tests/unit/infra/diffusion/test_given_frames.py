"""Latent frames that an image gives the first AR step: what the network sees, what comes out."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.base import flow_to_x0, mix_noise
from flashdreams.infra.diffusion.scheduler.euler import EulerSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from tests.tiny import TEXT_DIM, tiny_pipeline

LEN_T = 3


def build(given: bool = True, scheduler=None, **model):
    config = derive_config(
        tiny_pipeline(control_dim=None, len_t=LEN_T, window_size_t=6),
        encoder=None,
        diffusion_model=dict(
            first_frames_from_image=given,
            scheduler=scheduler or FlowMatchSchedulerConfig(denoising_timesteps=(1000.0, 500.0)),
            **model,
        ),
    )
    return config.setup(device="cpu")


def text(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def image(frames: int = 1) -> torch.Tensor:
    return torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(5))


def begin(pipeline, given=None, **context):
    if pipeline.config.diffusion_model.guidance_scale is not None:
        context["negative_text"] = text(1)
    return pipeline.initialize_cache(text=text(), image=given, seed=3, **context)


def steps(pipeline, cache, count: int) -> list[torch.Tensor]:
    latents = []
    for index in range(cache.next_index, cache.next_index + count):
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
        latents.append(cache.latent)
    return latents


@pytest.mark.parametrize("frames", [1, 2])
def test_every_call_sees_the_given_frames_at_timestep_zero(frames, monkeypatch):
    pipeline, given, seen = build(guidance_scale=3.0), image(frames), []
    predict = type(pipeline.diffusion_model.transformer).predict_flow

    def spy(self, latent, timestep, cache):
        seen.append((latent.clone(), timestep.clone()))
        return predict(self, latent, timestep, cache)

    monkeypatch.setattr(type(pipeline.diffusion_model.transformer), "predict_flow", spy)
    (latent,) = steps(pipeline, begin(pipeline, given), 1)
    assert torch.equal(latent[:, :, :frames], given)
    assert all((latent[:, :, frames:] != given[:, :, :1]).flatten())
    schedule = pipeline.diffusion_model.scheduler.timesteps
    assert len(seen) == 2 * len(schedule)  # two branches
    for place, (found, timestep) in enumerate(seen):
        assert torch.equal(found[:, :, :frames], given)
        assert timestep.dtype == schedule.dtype
        expected = [0.0] * frames + [float(schedule[place // 2])] * (LEN_T - frames)
        assert timestep.tolist() == [expected]
    seen.clear()
    steps(pipeline, begin(pipeline, given), 2)
    assert all(timestep.ndim == 0 for _, timestep in seen[2 * len(schedule) :])


def by_hand(pipeline, given: torch.Tensor, stamp_between: bool = True) -> torch.Tensor:
    """The loop as the models' own code writes it: the latent is set again after every step."""
    model, count = pipeline.diffusion_model, given.shape[2]
    transformer, schedule = model.transformer, model.scheduler
    cache = transformer.initialize_cache(text=text())
    transformer.begin_step(0, cache)
    noise = begin(pipeline).diffusion.noise
    shape = transformer.latent_shape(1)
    sigmas = [*schedule.sigmas.tolist(), 0.0]
    latent = noise(0, 0, shape).clone()
    latent[:, :, :count] = given
    for step, sigma in enumerate(sigmas[:-1]):
        timestep = schedule.timesteps[step].repeat(1, LEN_T)
        timestep[:, :count] = 0
        x0 = flow_to_x0(latent, transformer.predict_flow(latent, timestep, cache), sigma)
        if isinstance(schedule.config, EulerSchedulerConfig):
            flow = (latent - x0) / sigma
            latent = latent + (sigmas[step + 1] - sigma) * flow
        elif sigmas[step + 1] > 0:
            latent = mix_noise(x0, noise(0, step + 1, shape), sigmas[step + 1])
        else:
            latent = x0
        if stamp_between or step == len(sigmas) - 2:
            latent[:, :, :count] = given
    return latent


@pytest.mark.parametrize(
    "scheduler",
    [EulerSchedulerConfig(num_inference_steps=3), FlowMatchSchedulerConfig(
        denoising_timesteps=(1000.0, 700.0, 300.0))],
)  # fmt: skip
def test_any_schedule_equals_the_loop_that_sets_the_frames_after_every_step(scheduler):
    pipeline = build(scheduler=scheduler)
    (found,) = steps(pipeline, begin(pipeline, image()), 1)
    torch.testing.assert_close(found, by_hand(pipeline, image()), atol=1e-5, rtol=0)
    once = by_hand(pipeline, image(), stamp_between=False)  # negative control
    assert (once - found).abs().max() > 1e-3


def test_without_an_image_nothing_is_held():
    with_option, without = build(), build(given=False)
    for a, b in zip(
        steps(with_option, begin(with_option), 2), steps(without, begin(without), 2), strict=True
    ):
        assert torch.equal(a, b)
    held = steps(with_option, begin(with_option, image()), 2)
    assert not torch.equal(held[1], b), "the second step sees another past"


def test_a_saved_rollout_goes_on_with_the_same_bits():
    pipeline = build()
    whole = steps(pipeline, begin(pipeline, image()), 3)
    cache = begin(pipeline, image())
    steps(pipeline, cache, 1)
    resumed = pipeline.load_cache(cache.state_dict())
    assert torch.equal(torch.cat(steps(pipeline, resumed, 2)), torch.cat(whole[1:]))


def test_given_frames_that_fill_the_chunk_are_all_of_it():
    pipeline, given = build(), image(LEN_T)
    (latent,) = steps(pipeline, begin(pipeline, given), 1)
    assert torch.equal(latent, given)


def test_wrong_frames_are_refused():
    pipeline = build()
    for wrong in (
        image(LEN_T + 1),
        image()[:, :3],
        image()[..., :2],
        image().repeat(2, 1, 1, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"the first latent frames of \[1, 4, 3, 4, 4\], from"):
            pipeline.diffusion_model.initialize_cache(
                {"text": text(), "image": wrong}, None, lambda *_: None, 1
            )
    with pytest.raises(ValueError, match="set one of them"):
        build(first_latent_from_image=True)


# Whole chunks that a rollout begins with.


def plain(**overrides):
    return build(given=False, **overrides)


@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_rollout_goes_on_from_the_latents_of_another(chunks, precision):
    """The window is past its end, and noise is numbered by the AR step: the same bits."""
    pipeline = plain(guidance_scale=3.0, transformer={"precision": precision})
    whole = steps(pipeline, begin(pipeline), 5)
    initial = torch.cat(whole[:chunks], dim=2)
    cache = begin(pipeline, initial_latent=initial)
    found = steps(pipeline, cache, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    other = steps(pipeline, begin(pipeline, initial_latent=-initial), 5)  # negative control
    assert not torch.equal(other[chunks], whole[chunks])


def test_given_chunks_make_no_network_call_but_the_clean_pass():
    pipeline = plain()
    transformer, called = pipeline.diffusion_model.transformer, []
    transformer.predict_flow = lambda *_, **__: pytest.fail("denoised")
    transformer.update_cache = lambda latent, timestep, cache: called.append(float(timestep))
    cache = begin(pipeline, initial_latent=image(2 * LEN_T))
    for index in range(2):
        transformer.begin_step = lambda *_: None
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
    assert called == [0.0, 0.0]


def test_a_rollout_with_given_chunks_is_saved_in_the_middle_of_them():
    pipeline = plain()
    whole = steps(pipeline, begin(pipeline, initial_latent=image(2 * LEN_T)), 4)
    cache = begin(pipeline, initial_latent=image(2 * LEN_T))
    steps(pipeline, cache, 1)
    for other in (pipeline.load_cache(cache.state_dict()), cache.clone()):
        found = steps(pipeline, other, 3)
        assert all(torch.equal(a, b) for a, b in zip(found, whole[1:], strict=True))


def test_the_first_chunk_schedule_is_for_the_first_that_is_generated():
    short = FlowMatchSchedulerConfig(denoising_timesteps=(1000.0,))
    pipeline, calls = plain(first_chunk_scheduler=short), []
    predict = pipeline.diffusion_model.transformer.predict_flow

    def spy(latent, timestep, cache):
        calls.append(float(timestep))
        return predict(latent, timestep, cache)

    pipeline.diffusion_model.transformer.predict_flow = spy
    steps(pipeline, begin(pipeline, initial_latent=image(2 * LEN_T)), 4)
    assert calls[:1] == [1000.0] and len(calls) == 1 + 2


@pytest.mark.parametrize(
    ("latent", "got"),
    [
        (image(LEN_T + 1), r"whole chunks, 3 frames each; got \[1, 4, 4, 4, 4\]"),
        (image(LEN_T)[:, :3], r"latents \[1, 4, frames, 4, 4\].*got \[1, 3, 3, 4, 4\]"),
        (image(LEN_T)[0], r"got \[4, 3, 4, 4\]"),
        ([1.0], "got list"),
        (image(LEN_T) * float("nan"), "initial_latent: 192 of 192 values .* are NaN"),
    ],
)
def test_initial_latents_that_do_not_fit_are_refused(latent, got):
    with pytest.raises(ValueError, match=got):
        begin(plain(), initial_latent=latent)


def test_an_initial_latent_beside_an_image_or_without_streaming_is_refused():
    with pytest.raises(ValueError, match="already has the first latent frames"):
        begin(build(), image(), initial_latent=image(LEN_T))
    config = plain().config
    once = derive_config(config, diffusion_model=dict(transformer=dict(streaming=False)))
    with pytest.raises(TypeError, match="initial_latent"):
        begin(once.setup(device="cpu"), initial_latent=image(LEN_T))
