"""The Wan transformer against numbers of the official code (float32, atol 5e-5)."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.integrations.self_forcing.config import PIPELINE
from flashdreams.models.wan.transformer import (
    SELF_ATTENTION,
    WanTransformer,
    WanTransformerConfig,
)
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.goldens import golden_path, load_golden

ATOL = 5e-5


def tiny_config(**overrides) -> WanTransformerConfig:
    sizes = dict(
        dim=64, ffn_dim=144, num_heads=2, num_layers=3, freq_dim=32, text_dim=64, text_len=16
    )
    return WanTransformerConfig(**{**sizes, **overrides})


def load_tiny(folder: str, **overrides) -> WanTransformer:
    model = WanTransformer(tiny_config(**overrides))
    model.load_state_dict(load_golden(folder, "weights.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_bidirectional_forward_matches_official(case):
    io = load_golden("b1_wan21_t2v_tiny", "io.safetensors")
    x = io[f"{case}/x"]
    _, _, frames, rows, columns = x.shape
    model = load_tiny(
        "b1_wan21_t2v_tiny",
        len_t=frames,
        latent_height=rows,
        latent_width=columns,
        streaming=False,
    )
    cache = model.initialize_cache(text=io[f"{case}/context"])
    model.begin_step(0, cache)
    flow = model.predict_flow(x, io[f"{case}/timestep"][0], cache)
    torch.testing.assert_close(flow, io[f"{case}/output"], atol=ATOL, rtol=0)

    wrong = model.predict_flow(x, io[f"{case}/timestep"][0] - 50, cache)
    assert (wrong - io[f"{case}/output"]).abs().max() > 10 * ATOL


@torch.no_grad()
def test_streaming_rollout_matches_official_self_forcing():
    inputs = load_golden("b2_self_forcing_tiny", "inputs.safetensors")
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    model = load_tiny("b2_self_forcing_tiny", len_t=3, latent_height=8, latent_width=8)
    cache = model.initialize_cache(text=inputs["prompt_embeds"])
    for index in range(20):
        chunk, step = divmod(index, 5)
        noisy = calls[f"call{index:02d}/noisy"].transpose(1, 2)
        timestep = calls["call_timestep"][index].float()
        if step == 0:
            model.begin_step(chunk, cache)
        if step < 4:
            flow = model.predict_flow(noisy, timestep, cache).transpose(1, 2)
            torch.testing.assert_close(flow, calls[f"call{index:02d}/flow"], atol=ATOL, rtol=0)
        else:
            model.update_cache(noisy, timestep, cache)


def weights_of(folder: str) -> CheckpointConfig:
    return CheckpointConfig(source=str(golden_path(folder, "weights.safetensors")))


SAMPLERS = {"unipc": "unipc", "dpmpp": "dpm++"}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(("scale", "agrees"), [(5.0, True), (4.8, False)])
def test_guided_sampling_matches_official(sampler, scale, agrees):
    """The whole loop of a bidirectional model, from the noise to the latent."""
    golden = load_golden("b1_wan21_t2v_tiny", "sampling.safetensors")
    transformer = tiny_config(
        len_t=3,
        latent_height=8,
        latent_width=8,
        streaming=False,
        checkpoint=weights_of("b1_wan21_t2v_tiny"),
    )
    config = StreamInferencePipelineConfig(
        name="golden",
        diffusion_model=DiffusionModelConfig(
            transformer=transformer,
            scheduler=FlowUniPCSchedulerConfig(
                num_inference_steps=6, shift=5.0, solver=SAMPLERS[sampler]
            ),
            guidance_scale=scale,
        ),
    )
    pipeline = config.setup(device="cpu")
    assert torch.equal(pipeline.diffusion_model.scheduler.timesteps, golden[f"{sampler}/timesteps"])
    cache = pipeline.initialize_cache(
        text=golden["context"],
        negative_text=golden["context_null"],
        noise=lambda index, step, shape: golden["noise"],
    )
    latent = pipeline.generate(autoregressive_index=0, cache=cache)
    error = (latent[0] - golden[f"{sampler}/latents_after_step"][-1]).abs().max().item()
    assert error < ATOL if agrees else error > 100 * ATOL


def golden_self_forcing(dtype: str = "float32", **model):
    """The shipped Self-Forcing literal at the golden's size."""
    transformer = tiny_config(
        dtype=dtype,
        len_t=3,
        latent_height=8,
        latent_width=8,
        window_size_t=21,
        checkpoint=weights_of("b2_self_forcing_tiny"),
    )
    overrides = {"transformer": transformer, **model}
    config = derive_config(
        PIPELINE, text_encoder=None, decoder=None, diffusion_model=dict(**overrides)
    )
    return config.setup(device="cpu")


def golden_rollout(pipeline):
    inputs = load_golden("b2_self_forcing_tiny", "inputs.safetensors")

    def noise(index: int, step: int, shape) -> torch.Tensor:
        if step == 0:
            return inputs["noise"][:, 3 * index : 3 * index + 3].transpose(1, 2)
        return inputs[f"renoise/chunk{index}/after_step{step - 1}"][None].transpose(1, 2)

    cache = pipeline.initialize_cache(text=inputs["prompt_embeds"], noise=noise)
    chunks = []
    for i in range(4):
        chunks.append(pipeline.generate(autoregressive_index=i, cache=cache))
        pipeline.finalize(autoregressive_index=i, cache=cache)
    return torch.cat(chunks, dim=2).transpose(1, 2), cache


def test_whole_pipeline_rollout_matches_official_self_forcing():
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    output, cache = golden_rollout(golden_self_forcing())
    torch.testing.assert_close(output, calls["output"], atol=ATOL, rtol=0)
    branch = cache.diffusion.conditional
    for layer, (kv, cross) in enumerate(
        zip(branch.caches[SELF_ATTENTION], branch.context.pairs, strict=True)
    ):
        for name, tensor in zip("kv", kv.visible(), strict=True):
            expected = calls[f"final_kv/{layer}/{name}"]
            torch.testing.assert_close(tensor, expected, atol=ATOL, rtol=0)
        for name, tensor in zip("kv", cross[0], strict=True):
            expected = calls[f"final_cross_kv/{layer}/{name}"]
            torch.testing.assert_close(tensor, expected, atol=ATOL, rtol=0)


def test_given_latents_take_the_place_of_the_first_chunk():
    """As the official rollout continues from an initial latent: one clean pass over it."""
    inputs = load_golden("b2_self_forcing_tiny", "inputs.safetensors")
    initial = inputs["initial_latent_3"].transpose(1, 2)
    pipeline = golden_self_forcing(first_latent_from_image=True)

    def noise(index: int, step: int, shape) -> torch.Tensor:
        return inputs["noise"][:, 3 * index + step : 3 * index + step + 3].transpose(1, 2)

    cache = pipeline.initialize_cache(text=inputs["prompt_embeds"], image=initial, noise=noise)
    first = pipeline.generate(autoregressive_index=0, cache=cache)
    pipeline.finalize(autoregressive_index=0, cache=cache)
    found = pipeline.generate(autoregressive_index=1, cache=cache)

    model = pipeline.diffusion_model
    by_hand = model.transformer.initialize_cache(text=inputs["prompt_embeds"])
    model.transformer.begin_step(0, by_hand)
    model.transformer.update_cache(initial, torch.tensor(0.0), by_hand)
    model.transformer.begin_step(1, by_hand)
    expected = model.scheduler.sample(
        lambda latent, timestep: model.transformer.predict_flow(latent, timestep, by_hand),
        lambda step: noise(1, step, None),
    )
    assert torch.equal(first, initial) and torch.equal(found, expected)
    plain = pipeline.initialize_cache(text=inputs["prompt_embeds"], image=-initial, noise=noise)
    pipeline.generate(autoregressive_index=0, cache=plain)
    pipeline.finalize(autoregressive_index=0, cache=plain)
    other = pipeline.generate(autoregressive_index=1, cache=plain)
    assert (other - expected).abs().max() > 1000 * ATOL
    with pytest.raises(ValueError, match=r"latents of one AR step \[1, 16, 3, 8, 8\]; got"):
        pipeline.initialize_cache(text=inputs["prompt_embeds"], image=initial[:, :, :1])


@pytest.mark.parametrize("wrong", [dict(shift=8.0), dict(warp_denoising_step=False)])
def test_a_wrong_schedule_is_another_rollout(wrong):
    """Negative control: the mistakes that are easy to make show at once."""
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    output, _ = golden_rollout(golden_self_forcing(scheduler=wrong))
    assert (output - calls["output"]).abs().max() > 1000 * ATOL


def test_bfloat16_stays_as_near_to_float32_as_the_official_code_does():
    """The official bfloat16 rollout differs by at most 0.034, 0.006 on average, without growth."""
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    pipeline = golden_self_forcing()
    rounded = golden_self_forcing("bfloat16")
    exact, _ = golden_rollout(pipeline)
    output, _ = golden_rollout(rounded)
    error = (output - calls["output"]).abs()
    assert output.dtype == torch.float32 and rounded.diffusion_model.transformer.dtype.itemsize == 2
    assert error.max() < 1.5 * 0.034 and error.mean() < 1.5 * 0.006
    by_chunk = error.unflatten(1, (4, 3)).mean((0, 2, 3, 4, 5))
    assert by_chunk[-1] < 2 * by_chunk[0]
    assert (exact - calls["output"]).abs().max() < error.max() / 100
