"""The conductor: context, order, interleaved rollouts, noise."""

from unittest.mock import Mock

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from tests.tiny import TEXT_DIM, tiny_pipeline


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def rollout(pipeline, steps: int, **context) -> list[torch.Tensor]:
    cache = pipeline.initialize_cache(**context)
    chunks = []
    for i in range(steps):
        chunks.append(pipeline.generate(autoregressive_index=i, cache=cache, input=0.1 * i))
        pipeline.finalize(autoregressive_index=i, cache=cache)
    return chunks


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline().setup(device="cpu")


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(pipeline):
    first = rollout(pipeline, 3, text=text(0), seed=7)
    again = rollout(pipeline, 3, text=text(0), seed=7)
    other = rollout(pipeline, 3, text=text(0), seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_two_pipelines_without_weights_agree(pipeline):
    twin = tiny_pipeline().setup(device="cpu")
    for name, parameter in pipeline.state_dict().items():
        assert torch.equal(parameter, twin.state_dict()[name])


def test_interleaved_rollouts_equal_solo_rollouts(pipeline):
    solo = [rollout(pipeline, 5, text=text(s), seed=s) for s in (1, 2)]
    caches = [pipeline.initialize_cache(text=text(s), seed=s) for s in (1, 2)]
    for i in range(5):
        for k, cache in enumerate(caches):
            chunk = pipeline.generate(autoregressive_index=i, cache=cache, input=0.1 * i)
            assert torch.equal(chunk, solo[k][i])
        for cache in caches:
            pipeline.finalize(autoregressive_index=i, cache=cache)


def test_finalize_is_what_later_chunks_depend_on(pipeline):
    """Negative control of the interleaving test: a wrong context shows in the next chunk."""
    expected = rollout(pipeline, 2, text=text(1), seed=1)
    cache = pipeline.initialize_cache(text=text(1), seed=1)
    pipeline.generate(autoregressive_index=0, cache=cache, input=0.0)
    cache.diffusion.latent = cache.diffusion.latent + 1
    pipeline.finalize(autoregressive_index=0, cache=cache)
    chunk = pipeline.generate(autoregressive_index=1, cache=cache, input=0.1)
    assert not torch.equal(chunk, expected[1])


@pytest.mark.parametrize("context_noise", [0.0, 40.0])
def test_the_clean_pass_takes_the_chunk_as_it_is_at_the_timestep_of_the_context(context_noise):
    """As the official inference does: no noise is added, and none is drawn for it."""
    config = derive_config(tiny_pipeline(), diffusion_model={"context_noise": context_noise})
    pipeline = config.setup(device="cpu")
    model = pipeline.diffusion_model
    drawn = []

    def noise(index: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        drawn.append((index, step))
        return torch.randn(shape, generator=torch.Generator().manual_seed(10 * index + step))

    caches = [pipeline.initialize_cache(text=text(0), noise=noise) for _ in range(3)]
    for cache in caches:
        pipeline.generate(autoregressive_index=0, cache=cache, input=0.0)
    pipeline.finalize(autoregressive_index=0, cache=caches[0])
    assert set(drawn) == {(0, step) for step in range(model.scheduler.num_inference_steps)}
    for cache, timestep in zip(caches[1:], (context_noise, context_noise + 9), strict=True):
        model.transformer.update_cache(
            cache.diffusion.latent, torch.tensor(timestep), cache.diffusion.conditional
        )
    found, by_hand, other = (
        torch.stack([layer.v for layer in cache.diffusion.conditional.layers()]) for cache in caches
    )
    assert torch.equal(found, by_hand)
    assert not torch.equal(found, other)  # negative control: another timestep


def test_a_fractional_timestep_of_the_context_wants_a_schedule_of_fractions():
    """Whole timesteps would cut it off in silence."""
    for scheduler in (FlowMatchSchedulerConfig(), FlowMatchSchedulerConfig(timestep_dtype="int64")):
        model = dict(context_noise=40.5, scheduler=scheduler)
        config = derive_config(tiny_pipeline(), diffusion_model=model)
        if scheduler.timestep_dtype == "int64":
            with pytest.raises(ValueError, match=r"context_noise=40.5: .* give 40 or 41"):
                config.setup(device="cpu")
        else:
            config.setup(device="cpu")


def test_steps_out_of_order_are_refused(pipeline):
    cache = pipeline.initialize_cache(text=text(0))
    with pytest.raises(ValueError, match=r"finalize.*expected generate\(autoregressive_index=0\)"):
        pipeline.finalize(autoregressive_index=0, cache=cache)
    with pytest.raises(ValueError, match="expected autoregressive_index=0, got 1"):
        pipeline.generate(autoregressive_index=1, cache=cache, input=0.0)
    pipeline.generate(autoregressive_index=0, cache=cache, input=0.0)
    with pytest.raises(ValueError, match=r"expected finalize\(autoregressive_index=0\) first"):
        pipeline.generate(autoregressive_index=1, cache=cache, input=0.0)
    with pytest.raises(ValueError, match="expected autoregressive_index=0, got 1"):
        pipeline.finalize(autoregressive_index=1, cache=cache)


def test_a_step_that_failed_between_the_branches_can_be_repeated(monkeypatch):
    config = derive_config(
        tiny_pipeline(control_dim=None), encoder=None, diffusion_model=dict(guidance_scale=3.0)
    )
    pipeline = config.setup(device="cpu")
    transformer = pipeline.diffusion_model.transformer

    def roll(fails_at: int | None) -> list[torch.Tensor]:
        cache = pipeline.initialize_cache(text=text(0), negative_text=text(1))
        latents = []
        for i in range(5):
            if i == fails_at:
                flow = torch.zeros(transformer.latent_shape(1))
                with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="memory"):
                    failing = Mock(side_effect=[flow, RuntimeError("out of memory")])
                    patch.setattr(transformer, "predict_flow", failing)
                    pipeline.generate(i, cache)
            pipeline.generate(i, cache)
            pipeline.finalize(i, cache)
            latents.append(cache.latent)
        return latents

    assert all(torch.equal(a, b) for a, b in zip(roll(3), roll(None), strict=True))


def test_end_step_is_finalize_with_a_warning(pipeline):
    cache = pipeline.initialize_cache(text=text(0))
    pipeline.generate(0, cache, 0.0)
    with pytest.warns(DeprecationWarning, match="end_step is deprecated .* call fin"):
        pipeline.end_step(0, cache)
    pipeline.generate(1, cache, 0.0)  # finalized


def test_context_reaches_the_component_that_declares_it(pipeline):
    cache = pipeline.initialize_cache(text=text(0), offset=3.0)
    assert cache.encoder == [3.0]


def test_unknown_context_names_the_nearest_and_the_known(pipeline):
    with pytest.raises(TypeError, match=r"'ofset'.*'offset'.*condition.*seed.*text"):
        pipeline.initialize_cache(text=text(0), ofset=3.0)


def test_input_without_an_encoder_is_refused():
    config = derive_config(tiny_pipeline(control_dim=None), encoder=None)
    pipeline = config.setup(device="cpu")
    cache = pipeline.initialize_cache(text=text(0))
    with pytest.raises(ValueError, match="no encoder"):
        pipeline.generate(autoregressive_index=0, cache=cache, input=1.0)
    assert pipeline.generate(autoregressive_index=0, cache=cache).shape == (1, 2, 3, 4, 4)


def test_without_a_decoder_the_latent_comes_out():
    pipeline = derive_config(tiny_pipeline(), decoder=None).setup(device="cpu")
    cache = pipeline.initialize_cache(text=text(0))
    chunk = pipeline.generate(autoregressive_index=0, cache=cache, input=0.0)
    assert chunk.shape == (1, 4, 2, 4, 4)
    assert chunk is cache.latent


def test_noise_may_come_from_a_callable(pipeline):
    asked = []

    def noise(autoregressive_index, denoising_step, shape):
        asked.append((autoregressive_index, denoising_step, tuple(shape)))
        return torch.zeros(shape)

    rollout(pipeline, 2, text=text(0), noise=noise)
    shape = (1, 4, 2, 4, 4)
    assert asked == [(0, 0, shape), (0, 1, shape), (1, 0, shape), (1, 1, shape)]
    with pytest.raises(ValueError, match="noise must be"):
        rollout(pipeline, 1, text=text(0), noise=lambda *_: torch.zeros(3))


def test_guidance_mixes_two_branches():
    plain = tiny_pipeline()
    guided = derive_config(plain, diffusion_model=dict(guidance_scale=1.0))
    strong = derive_config(plain, diffusion_model=dict(guidance_scale=3.0))
    negative = text(9)
    alone = rollout(plain.setup(device="cpu"), 2, text=text(0))
    once = rollout(guided.setup(device="cpu"), 2, text=text(0), negative_text=negative)
    thrice = rollout(strong.setup(device="cpu"), 2, text=text(0), negative_text=negative)
    torch.testing.assert_close(once[1], alone[1], atol=1e-5, rtol=0)
    assert (thrice[1] - alone[1]).abs().max() > 1e-3


def test_stage_times_are_recorded_per_step(pipeline):
    cache = pipeline.initialize_cache(text=text(0))
    for i in range(2):
        pipeline.generate(autoregressive_index=i, cache=cache, input=0.0)
        pipeline.finalize(autoregressive_index=i, cache=cache)
    assert [r["autoregressive_index"] for r in cache.records] == [0, 1]
    assert all(r["diffuse_ms"] > 0 and r["finalize_ms"] > 0 for r in cache.records)


def test_long_rollout_keeps_its_memory():
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=text(0))
    layer = next(cache.diffusion.conditional.layers())
    storage = layer.k.data_ptr()
    for i in range(40):
        pipeline.generate(autoregressive_index=i, cache=cache, input=0.0)
        pipeline.finalize(autoregressive_index=i, cache=cache)
    assert layer.k.data_ptr() == storage
    assert layer.cursor.visible_tokens == layer.k.shape[1]


@pytest.mark.parametrize("inside", [(True, False), (False, True)])
@pytest.mark.parametrize("transformer", [{}, {"kv_cache_dtype": "int8"}], ids=str)
def test_a_rollout_goes_on_outside_of_inference_mode(transformer, inside):
    pipeline = tiny_pipeline(**transformer).setup(device="cpu")

    def roll(modes: tuple[bool, bool]) -> list[torch.Tensor]:
        chunks: list[torch.Tensor] = []
        for half, mode in enumerate(modes):
            with torch.inference_mode(mode):
                if half == 0:
                    cache = pipeline.initialize_cache(text=text(1))
                else:
                    pipeline.update_prompt(cache, text(2), reencode_window=True)
                    cache = pipeline.load_cache(cache.state_dict())
                for i in range(3 * half, 3 * half + 3):
                    chunks.append(pipeline.generate(i, cache, 0.1))
                    pipeline.finalize(i, cache)
        return chunks

    for a, b in zip(roll(inside), roll((False, False)), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_state_made_in_inference_mode_could_not_be_written_outside(pipeline):
    """Negative control: what PyTorch says where the pipeline does not leave the mode."""
    transformer = pipeline.diffusion_model.transformer
    with torch.inference_mode():
        cache = transformer.initialize_cache(text=text(1))
    transformer.begin_step(0, cache, torch.zeros(1, 8, 5))
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        transformer.predict_flow(
            torch.zeros(transformer.latent_shape(1)), torch.tensor(500.0), cache
        )
