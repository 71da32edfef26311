"""Wan 2.2 TI2V through its literal and runner, against the official code (float32, atol 5e-5)."""

from functools import partial

import pytest
import torch
from PIL import Image

from flashdreams.infra.config import derive_config
from flashdreams.infra.prompt import save_prompt_embeds
from flashdreams.integrations.wan22.config import PIPELINE, RUNNER
from flashdreams.integrations.wan22.image import size_of_shape
from flashdreams.models.wan.vae22 import WanVAE22DecoderConfig, WanVAE22ImageEncoderConfig
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.goldens import golden_config, golden_path, load_golden

GOLDEN, VAE = "c2_wan22_ti2v_tiny", "c2_wan22_vae_tiny"
ATOL = 5e-5
SIZES = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "text_dim")


def file(folder: str, name: str) -> CheckpointConfig:
    return CheckpointConfig(source=str(golden_path(folder, f"{name}.safetensors")))


def golden_pipeline(**model):
    """The shipped literal at the golden's size, with the official weights in float32."""
    official, vae = golden_config(GOLDEN)["config"], golden_config(VAE)["config"]
    transformer = dict(
        {name: official[name] for name in SIZES},
        dtype="float32",
        len_t=3,
        window_size_t=3,
        latent_height=4,
        latent_width=6,
        checkpoint=file(GOLDEN, "weights"),
    )
    encoder = WanVAE22ImageEncoderConfig(dim=vae["dim"], checkpoint=file(VAE, "weights_encoder"))
    decoder = WanVAE22DecoderConfig(dim=vae["dec_dim"], checkpoint=file(VAE, "weights_decoder"))
    model = {"scheduler": dict(num_inference_steps=5), **model}
    return derive_config(
        PIPELINE,
        image_encoder=encoder,
        decoder=decoder,
        diffusion_model=dict(transformer=transformer, **model),
    )


def golden_runner(folder, **model):
    """A run from an image file and prompts on: size, resampling and encoding are the runner's."""
    golden = load_golden(GOLDEN, "sampling_i2v.safetensors")
    Image.fromarray(golden["image_u8_hwc"].numpy()).save(folder / "image.png")
    for name in ("context", "context_null"):
        save_prompt_embeds(folder / f"{name}.safetensors", golden[name][None])
    config = derive_config(
        RUNNER,
        pipeline=golden_pipeline(**model),
        image_path=folder / "image.png",
        prompt_embeds=folder / "context.safetensors",
        negative_prompt_embeds=folder / "context_null.safetensors",
        max_pixels=golden_config(GOLDEN)["sampling"]["i2v_max_area"],
        output_dir=folder,
        device="cpu",
    )
    return config.setup()


def sample(runner, **changed) -> torch.Tensor:
    noise = load_golden(GOLDEN, "sampling_i2v.safetensors")["noise"][None]
    conditions = {**runner.conditions(), **changed}
    cache = runner.pipeline.initialize_cache(**conditions, noise=lambda *_: noise)
    runner.pipeline.generate(autoregressive_index=0, cache=cache)
    return cache.latent[0]


@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_forward_with_one_and_with_many_timesteps_matches_official(case):
    io = load_golden(GOLDEN, f"io_{case}.safetensors")
    pipeline = derive_config(golden_pipeline(), text_encoder=None)
    model = pipeline.setup(device="cpu").diffusion_model.transformer
    cache = model.initialize_cache(text=io[f"{case}/context"][None])
    model.begin_step(0, cache)
    timestep, expected = io[f"{case}/timestep"], io[f"{case}/output"]
    timestep = timestep[0] if case == "a" else timestep
    predict = partial(model.predict_flow, io[f"{case}/x"][None], cache=cache)
    torch.testing.assert_close(predict(timestep)[0], expected, atol=ATOL, rtol=0)
    if case == "b":
        frames = timestep.unflatten(1, (3, -1))
        assert (frames == frames[:, :, :1]).all()
        per_frame = predict(frames[:, :, 0])[0]
        torch.testing.assert_close(per_frame, expected, atol=ATOL, rtol=0)
        uniform = predict(timestep[0, -1])[0]  # negative control: frame 0 like all others
        assert (uniform - expected).abs().max() > 1
    else:
        assert (predict(timestep - 50)[0] - expected).abs().max() > 10 * ATOL


def test_the_run_from_an_image_matches_official(tmp_path, monkeypatch):
    golden = load_golden(GOLDEN, "sampling_i2v.safetensors")
    runner = golden_runner(tmp_path)
    assert runner.config.frame_size == size_of_shape(100, 150, 32, 6144) == (64, 96)
    found = runner.image[0, :, None]
    torch.testing.assert_close(found, golden["image_preprocessed"], atol=1e-6, rtol=0)
    z = runner.pipeline.image_encoder(runner.image)
    torch.testing.assert_close(z[0], golden["z_image"], atol=ATOL, rtol=0)

    transformer, calls = runner.pipeline.diffusion_model.transformer, []
    predict = type(transformer).predict_flow

    def record(self, latent, timestep, cache):
        flow = predict(self, latent, timestep, cache)
        calls.append((latent, timestep, flow))
        return flow

    monkeypatch.setattr(type(transformer), "predict_flow", record)
    latent = sample(runner)
    assert len(calls) == 10
    for place, (seen, timestep, flow) in enumerate(calls):
        step, branch = place // 2, ("cond", "uncond")[place % 2]
        close = partial(torch.testing.assert_close, atol=ATOL, rtol=0)
        close(seen[0], golden[f"step{step}/latent_in"])
        close(flow[0], golden[f"step{step}/{branch}"])
        official = golden["timestep_per_token"][step]
        assert torch.equal(timestep[0].repeat_interleave(6).float(), official)
    torch.testing.assert_close(latent, golden["latent_final"], atol=ATOL, rtol=0)
    runner.close()


def uniform_timesteps(runner, monkeypatch) -> dict:
    model = runner.pipeline.diffusion_model
    flow = model._flow
    monkeypatch.setattr(model, "_flow", lambda cache: lambda x, t: flow(cache)(x, t[0, -1]))
    return {}


def flipped_image(runner, monkeypatch) -> dict:
    return {"image": runner.image.flip(3)}


@pytest.mark.parametrize(
    ("mistake", "model"),
    [
        (None, dict(scheduler=dict(num_inference_steps=5, shift=3.0))),
        (None, dict(guidance_scale=4.0)),
        (None, dict(first_frames_from_image=False)),
        (uniform_timesteps, {}),
        (flipped_image, {}),
    ],
)
def test_mistakes_are_other_samples(mistake, model, tmp_path, monkeypatch):
    """Negative controls: shift, guidance, an image that is not held, one timestep for all."""
    golden = load_golden(GOLDEN, "sampling_i2v.safetensors")
    runner = golden_runner(tmp_path, **model)
    changed = {} if mistake is None else mistake(runner, monkeypatch)
    latent = sample(runner, **changed)
    assert (latent - golden["latent_final"]).abs().max() > 1000 * ATOL
    runner.close()
