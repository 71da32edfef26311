"""Two networks by noise level: which one is asked, how they load, what a rollout keeps; float32."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdreams.infra.component import check_weights, load_component
from flashdreams.infra.config import config_fields, derive_config
from flashdreams.infra.diffusion.experts import EXPERTS, NoiseExpertsConfig
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.weights import memory_estimate, require_weights, weight_nbytes
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError
from tests.tiny import TEXT_DIM, tiny_pipeline, tiny_transformer

CPU = torch.device("cpu")
ATOL = 1e-6


@dataclass(kw_only=True)
class TinyExpertsConfig(NoiseExpertsConfig, WanTransformerConfig):
    """Two small Wan transformers."""

    expert_config = WanTransformerConfig


def experts_config(**overrides) -> TinyExpertsConfig:
    c = tiny_transformer()
    fields = {name: getattr(c, name) for name in config_fields(c)} | {"use_cuda_graph": False}
    return TinyExpertsConfig(**{**fields, "boundary": 0.947, **overrides})


def build(config):
    torch.manual_seed(0)
    model = config.setup()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    load_component(model, CPU)
    return model.requires_grad_(False).eval()


def text(number: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(number))


def latent_of(model, seed: int = 0) -> torch.Tensor:
    return torch.randn(model.latent_shape(1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("timestep", "expert"),
    [
        (torch.tensor(999), "high_noise"),
        (torch.tensor(947), "high_noise"),
        (torch.tensor(946), "low_noise"),
        (torch.tensor(946.99), "low_noise"),
        (torch.tensor(0), "low_noise"),
        (torch.tensor([[0.0, 950.0]]), "high_noise"),
        (torch.tensor([[0.0, 940.0]]), "low_noise"),
    ],
)
def test_the_noise_level_chooses_the_network(timestep, expert):
    model = build(experts_config())
    cache = model.initialize_cache(text())
    model.begin_step(autoregressive_index=0, cache=cache)
    x, flows = latent_of(model), {}
    for name in EXPERTS:
        network = getattr(model, name)
        state = network.initialize_cache(text())
        network.begin_step(0, state)
        flows[name] = network.predict_flow(x, timestep, state)
    (other,) = set(EXPERTS) - {expert}
    found = model.predict_flow(x, timestep, cache)
    assert torch.equal(found, flows[expert])
    assert not torch.equal(found, flows[other])  # negative control


def sampled(transformer_config, weights, **changes) -> torch.Tensor:
    config = DiffusionModelConfig(
        transformer=transformer_config,
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=8, shift=10.0),
        guidance_scale=5.0,
        **changes,
    )
    model = config.setup()
    model.transformer.load_state_dict(weights)
    model.requires_grad_(False).eval()
    noise = latent_of(model.transformer)
    cache = model.initialize_cache({"text": text()}, {"text": text(1)}, lambda *_: noise, 1)
    return model.generate(0, cache, None)


def test_sampling_with_guidance_is_the_loop_over_two_plain_networks():
    config = experts_config(streaming=False)
    model = build(config)
    found = sampled(config, model.state_dict())
    scheduler = FlowUniPCSchedulerConfig(num_inference_steps=8, shift=10.0).setup()
    asked: list[str] = []

    def flow(latent, timestep):
        asked.append("high_noise" if int(timestep) >= 947 else "low_noise")
        network = getattr(model, asked[-1])
        predicted = []
        for number in (0, 1):
            state = network.initialize_cache(text(number))
            network.begin_step(0, state)
            predicted.append(network.predict_flow(latent, timestep, state))
        return predicted[1] + 5.0 * (predicted[0] - predicted[1])

    expected = scheduler.sample(flow, lambda _: latent_of(model))
    assert set(asked) == set(EXPERTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL * expected.abs().max().item())
    other = sampled(derive_config(config, boundary=0.9), model.state_dict())
    assert (other - expected).abs().max() > 1e-3  # negative control: another boundary


def streaming_pipeline():
    """With the sliding window of a streaming method: each network keeps keys and values."""
    config = derive_config(tiny_pipeline(), encoder=None)
    transformer = experts_config(boundary=0.9)  # timesteps 1000 and 833
    config = derive_config(config, diffusion_model=dict(transformer=transformer))
    pipeline = config.setup(device="cpu")
    pipeline.diffusion_model.transformer.load_state_dict(build(transformer).state_dict())
    return pipeline


def roll(pipeline, cache, steps) -> list[torch.Tensor]:
    chunks = []
    for index in steps:
        chunks.append(pipeline.generate(index, cache))
        pipeline.finalize(index, cache)
    return chunks


def test_a_streaming_rollout_is_saved_cloned_and_interleaved():
    pipeline = streaming_pipeline()
    whole = roll(pipeline, pipeline.initialize_cache(text=text(), seed=3), range(5))
    cache = pipeline.initialize_cache(text=text(), seed=3)
    roll(pipeline, cache, range(3))
    state, copy = cache.state_dict(), cache.clone()
    roll(pipeline, pipeline.initialize_cache(text=text(1), seed=4), range(5))
    for other in (pipeline.load_cache(state), copy, cache):
        found = roll(pipeline, other, range(3, 5))
        assert all(torch.equal(a, b) for a, b in zip(found, whole[3:], strict=True))
    assert any("/low_noise/" in path for path in state["tensors"])


def test_a_clean_pass_writes_the_keys_of_both_networks():
    pipeline = streaming_pipeline()
    kept = pipeline.initialize_cache(text=text(), seed=3)
    whole = roll(pipeline, kept, range(3))
    cache = pipeline.initialize_cache(text=text(), seed=3)
    transformer = pipeline.diffusion_model.transformer
    low = transformer.low_noise.update_cache
    chunks = []
    for index in range(3):
        chunks.append(pipeline.generate(index, cache))
        transformer.low_noise.update_cache = lambda latent, *rest: low(
            torch.zeros_like(latent), *rest
        )
        pipeline.finalize(index, cache)
        transformer.low_noise.update_cache = low
    assert torch.equal(chunks[0], whole[0]) and not torch.equal(chunks[1], whole[1])


def test_another_prompt_reaches_both_networks():
    pipeline = streaming_pipeline()
    fresh = roll(pipeline, pipeline.initialize_cache(text=text(1), seed=3), range(1))
    cache = pipeline.initialize_cache(text=text(), seed=3)
    pipeline.update_prompt(cache, text(1))
    assert torch.equal(roll(pipeline, cache, range(1))[0], fresh[0])
    pipeline.update_prompt(cache, text(1), reencode_window=True)
    assert all(cursor.start == 2 for cursor in cache.diffusion.conditional.cursors)


def save_weights(folder, model) -> dict[str, CheckpointConfig]:
    """A file of each network, and one of both."""
    files = {}
    for name, module in (("high_noise", model.high_noise), ("low_noise", model.low_noise)):
        files[name] = module.state_dict()
    files["both"] = model.state_dict()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {n: CheckpointConfig(source=str(folder / f"{n}.safetensors")) for n in files}


def loaded(config):
    with torch.device("meta"):
        model = config.setup()
    load_component(model, CPU)
    return model


def test_weights_come_from_two_files_or_one(tmp_path):
    model = build(experts_config())
    files = save_weights(tmp_path, model)
    apart = experts_config(checkpoint=files["high_noise"], low_noise_checkpoint=files["low_noise"])
    swapped = experts_config(
        checkpoint=files["low_noise"], low_noise_checkpoint=files["high_noise"]
    )
    for config, same in ((apart, True), (experts_config(checkpoint=files["both"]), True),
                         (swapped, False)):  # fmt: skip
        found = loaded(config)
        equal = all(
            torch.equal(x, y)
            for x, y in zip(found.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert equal == same
        cache = found.initialize_cache(text())
        found.begin_step(0, cache)
        assert found.predict_flow(latent_of(found), torch.tensor(950), cache).isfinite().all()


LORA_TARGET = "blocks.1.ffn.0"
"""48 rows of 24 columns."""


def save_loras(folder) -> dict[str, str]:
    """A kohya LoRA for each network, and one whose target neither has."""
    stem, draw = f"lora_unet_{LORA_TARGET.replace('.', '_')}", torch.Generator().manual_seed(7)
    for name in EXPERTS:
        tensors = {
            f"{stem}.lora_down.weight": torch.randn(2, 24, generator=draw),
            f"{stem}.lora_up.weight": torch.randn(48, 2, generator=draw),
            f"{stem}.alpha": torch.tensor(1.0),
        }
        save_file(tensors, folder / f"lora_{name}.safetensors")
    save_file({"blocks.9.ffn.0.diff": torch.ones(48, 24)}, folder / "lora_absent.safetensors")
    return {n: f"{folder}/lora_{n}.safetensors" for n in (*EXPERTS, "absent")}


@pytest.mark.parametrize("form", ["two files", "one file", "no file"])
def test_each_network_has_its_own_loras(form, tmp_path):
    model = build(experts_config())
    files, loras = save_weights(tmp_path, model), save_loras(tmp_path)
    fields = {"loras": (loras["high_noise"],), "low_noise_loras": (f"{loras['low_noise']}:0.5",)}
    if form == "two files":
        fields |= dict(checkpoint=files["high_noise"], low_noise_checkpoint=files["low_noise"])
    if form == "one file":
        fields |= dict(checkpoint=files["both"])
    if form == "no file":
        found = experts_config(**fields).setup()
        found.load_state_dict(model.state_dict())
        load_component(found, CPU)
    else:
        found = loaded(experts_config(**fields))
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    for name, weight in (("high_noise", 1.0), ("low_noise", 0.5)):
        file = load_file(tmp_path / f"lora_{name}.safetensors")
        down, up = (next(x for n, x in file.items() if part in n) for part in ("down", "up"))
        expected[f"{name}.{LORA_TARGET}.weight"] += weight * 0.5 * (up @ down)  # alpha / rank
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-6, msg=name)
        changed = not torch.equal(value, model.state_dict()[name])
        assert changed == name.endswith(f"{LORA_TARGET}.weight"), name


@pytest.mark.parametrize("field", ["loras", "low_noise_loras"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_lora_without_a_target_in_its_network_is_refused(field, apart, tmp_path):
    files, loras = save_weights(tmp_path, build(experts_config())), save_loras(tmp_path)
    fields = dict(checkpoint=files["high_noise"], low_noise_checkpoint=files["low_noise"])
    fields = fields if apart else dict(checkpoint=files["both"])
    with torch.device("meta"):
        model = experts_config(**fields, **{field: (loras["absent"],)}).setup()
    with pytest.raises(CheckpointError, match=r"absent(.|\n)*without a target.*\n.*blocks\.9\."):
        check_weights(model)
    assert all(x.is_meta for x in model.parameters())


def test_missing_loras_name_the_download_of_their_own_network():
    lora = "hf://org/repo/low.safetensors"
    file = CheckpointConfig(source="hf://org/repo", file="x.safetensors")
    for low, wanted in ((file, "low-noise-checkpoint"), (None, "checkpoint")):
        transformer = experts_config(
            checkpoint=file, low_noise_checkpoint=low, low_noise_loras=(lora,)
        )
        config = derive_config(tiny_pipeline(), encoder=None)
        config = derive_config(config, diffusion_model=dict(transformer=transformer))
        with pytest.raises(CheckpointError) as caught:
            require_weights(config)
        said = str(caught.value)
        assert "LoRA of --pipeline.diffusion-model.transformer.low-noise-loras:" in said
        assert f"transformer.{wanted}.download True" in said.split("LoRA of")[1]


def test_one_file_of_one_network_is_refused(tmp_path):
    files = save_weights(tmp_path, build(experts_config()))
    with pytest.raises(CheckpointError, match="does not fit"):
        loaded(experts_config(checkpoint=files["high_noise"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_noise_checkpoint": CheckpointConfig(source="x.safetensors")}, "without checkpoint"),
        ({"boundary": 0}, "must be above 0 and below 1"),
        ({"boundary": 947}, "boundary=947 must be at most 1"),
        ({"use_cuda_graph": True}, "two networks run eagerly"),
        ({"loras": ("a.safetensors:much",)}, "should read SOURCE or SOURCE:WEIGHT"),
        ({"low_noise_loras": ("a.safetensors:much",)}, "should read SOURCE or SOURCE:WEIGHT"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        experts_config(**changes)


def test_memory_counts_both_networks():
    config = derive_config(tiny_pipeline(), encoder=None)
    config = derive_config(config, diffusion_model=dict(transformer=experts_config()))
    one, two = build(tiny_transformer()), build(experts_config())
    assert weight_nbytes(two) == 2 * weight_nbytes(one) > 0
    assert two.cache_nbytes(1) == 2 * one.cache_nbytes(1) > 0
    assert f"KV cache {2 * one.cache_nbytes(1) / 1e6:.1f} MB" in memory_estimate(config)
