"""Rollouts of the Wan family's toy-size slugs, from the config to the frames."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.prompt import save_prompt_embeds
from flashdreams.integrations.causal_forcing.config import TINY_RUNNER as CAUSAL_FORCING
from flashdreams.integrations.causal_forcing.config import TWO_STEP_MODEL
from flashdreams.integrations.self_forcing.config import CHECKPOINT, TINY_PIPELINE
from flashdreams.integrations.self_forcing.config import TINY_RUNNER as SELF_FORCING
from flashdreams.integrations.wan21.config import I2V_TINY_RUNNER, T2V_TINY_RUNNER
from flashdreams.runtime.image_file import gradient_image

RUNNERS = [SELF_FORCING, CAUSAL_FORCING, T2V_TINY_RUNNER, I2V_TINY_RUNNER]


@pytest.fixture(scope="module")
def self_forcing():
    return TINY_PIPELINE.setup(device="cpu")


def rollout(pipeline, steps: int, **context) -> list[torch.Tensor]:
    cache = pipeline.initialize_cache(**context)
    chunks = []
    for i in range(steps):
        chunks.append(pipeline.generate(autoregressive_index=i, cache=cache))
        pipeline.finalize(autoregressive_index=i, cache=cache)
    return chunks


@pytest.mark.parametrize("config", RUNNERS, ids=lambda c: c.runner_name)
def test_every_tiny_slug_runs_to_its_video(config, tmp_path, capsys):
    runner = derive_config(config, output_dir=tmp_path, device="cpu").setup()
    runner.run()
    for _ in range(2):  # a runner that is closed stays closed
        runner.close()
    assert capsys.readouterr().out.count("written:") == 1
    slug = config.runner_name
    assert (tmp_path / f"{slug}.mp4").stat().st_size > 500
    records = json.loads((tmp_path / f"stats_{slug}.json").read_text())["records"]
    assert len(records) == config.total_blocks


def test_chunks_have_the_exact_frame_counts(self_forcing):
    chunks = rollout(self_forcing, 3, text=["a fox"])
    assert [chunk.shape for chunk in chunks] == [(1, n, 3, 32, 48) for n in (9, 12, 12)]
    assert all(chunk.abs().max() <= 1 and chunk.std() > 0 for chunk in chunks)
    framewise = CAUSAL_FORCING.pipeline.setup(device="cpu")
    chunks = rollout(framewise, 3, text=["a fox"], image=gradient_image(32, 48))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4]


def test_the_first_latent_is_that_of_the_image():
    pipeline = CAUSAL_FORCING.pipeline.setup(device="cpu")
    image = gradient_image(32, 48)
    cache = pipeline.initialize_cache(text=["a fox"], image=image)
    pipeline.generate(autoregressive_index=0, cache=cache)
    assert torch.equal(cache.latent, pipeline.image_encoder(image))
    pipeline.finalize(autoregressive_index=0, cache=cache)
    second = pipeline.generate(autoregressive_index=1, cache=cache)
    other = rollout(pipeline, 2, text=["a fox"], image=-image)[1]
    assert not torch.equal(second, other)


def test_image_to_video_depends_on_latent_mask_and_tokens():
    pipeline = I2V_TINY_RUNNER.pipeline.setup(device="cpu")
    image = gradient_image(32, 48)
    plain = rollout(pipeline, 1, text=["a fox"], image=image)[0]
    assert plain.shape == (1, 9, 3, 32, 48)
    encoded = pipeline.image_encoder(image)
    encoder, pipeline.image_encoder = pipeline.image_encoder, None
    same = rollout(pipeline, 1, text=["a fox"], image=encoded)[0]
    assert torch.equal(same, plain)
    for name, part in (("condition", slice(4)), ("condition", slice(4, 20)), ("image_tokens", ...)):
        changed = {key: value.clone() for key, value in encoded.items()}
        index = part if part is ... else (slice(None), part)
        changed[name][index] += 0.5
        assert not torch.equal(rollout(pipeline, 1, text=["a fox"], image=changed)[0], plain), name
    pipeline.image_encoder = encoder


def storage_bytes(value, seen: set[int]) -> int:
    """Bytes of all tensor storages that can be reached from a value."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(storage_bytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple | set):
        return sum(storage_bytes(item, seen) for item in value)
    if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        if id(value) in seen or isinstance(value, torch.nn.Module | type):
            return 0
        seen.add(id(value))
        return storage_bytes(vars(value), seen)
    return 0


@pytest.mark.parametrize("relative", [False, True])
def test_two_hundred_steps_need_no_more_memory_or_work_than_the_first_full_ones(relative):
    config = derive_config(
        TINY_PIPELINE,
        diffusion_model=dict(
            transformer=dict(relative_rope=relative, num_layers=2),
            scheduler=dict(denoising_timesteps=(1000.0,)),
        ),
        decoder=None,
    )
    pipeline = config.setup(device="cpu")
    transformer = pipeline.diffusion_model.transformer
    seen_keys: list[int] = []
    core = transformer.blocks[0].self_attn.core
    plain = core.backend

    def backend(q, k, v, *, scale):
        seen_keys.append(k.shape[1])
        return plain(q, k, v, scale=scale)

    core.backend = backend
    cache = pipeline.initialize_cache(text=["a fox"])
    pointers, sizes, work = set(), [], []
    for i in range(200):
        seen_keys.clear()
        latent = pipeline.generate(autoregressive_index=i, cache=cache)
        pipeline.finalize(autoregressive_index=i, cache=cache)
        sizes.append(storage_bytes(cache.diffusion, set()))
        work.append(list(seen_keys))
        pointers.add(next(cache.diffusion.conditional.layers()).k.data_ptr())
    full = (2 + 7 + 2) // 3
    assert set(sizes[full:]) == {sizes[full]} and sizes[0] <= sizes[full]
    assert all(step == [9 * 6] * 2 for step in work[full:])  # 9 frames of 6 tokens, 2 passes
    assert len(pointers) == 1
    assert latent.isfinite().all() and latent.std() > 0.1


def test_weights_in_the_published_form_are_read_through_the_literal(tmp_path, self_forcing):
    weights = self_forcing.diffusion_model.transformer.state_dict()
    wrapped = {f"model._fsdp_wrapped_module.{k}": v for k, v in weights.items()}
    noise = {k: torch.zeros_like(v) for k, v in wrapped.items()}
    torch.save({"generator": noise, "generator_ema": wrapped}, tmp_path / "weights.pt")
    local = dataclasses.replace(
        CHECKPOINT, source=str(tmp_path / "weights.pt"), file=None, revision=None
    )
    model = derive_config(TINY_PIPELINE.diffusion_model, transformer=dict(checkpoint=local))
    loaded = derive_config(TINY_PIPELINE, diffusion_model=model).setup(device="cpu")
    for name, value in loaded.diffusion_model.transformer.state_dict().items():
        assert torch.equal(value, weights[name])
    raw = dataclasses.replace(local, select=("generator",))
    model = derive_config(TINY_PIPELINE.diffusion_model, transformer=dict(checkpoint=raw))
    other = derive_config(TINY_PIPELINE, diffusion_model=model).setup(device="cpu")
    head = other.diffusion_model.transformer.state_dict()["head.head.weight"]
    assert not head.any()  # negative control: the other half of the file


def test_parts_of_a_composed_encoder_read_their_own_files(tmp_path):
    config = I2V_TINY_RUNNER.pipeline
    source = config.setup(device="cpu").image_encoder
    for name in ("vae", "clip"):
        save_file(getattr(source, name).state_dict(), tmp_path / f"{name}.safetensors")
    parts = {
        name: dict(checkpoint=dataclasses.replace(CHECKPOINT, source=str(path), file=None))
        for name in ("vae", "clip")
        for path in [tmp_path / f"{name}.safetensors"]
    }
    parts["clip"]["dtype"] = "bfloat16"
    loaded = derive_config(config, image_encoder=parts).setup(device="cpu").image_encoder
    assert loaded.clip.visual.head.dtype == torch.bfloat16
    for name, value in source.vae.state_dict().items():
        assert torch.equal(value, loaded.vae.state_dict()[name])


def test_embeddings_take_the_place_of_the_prompt(tmp_path, self_forcing):
    embeds = self_forcing.text_encoder(["a fox in the snow"])
    save_prompt_embeds(tmp_path / "prompt.safetensors", embeds)
    config = derive_config(
        SELF_FORCING,
        output_dir=tmp_path,
        device="cpu",
        total_blocks=1,
        prompt_embeds=tmp_path / "prompt.safetensors",
    )
    runner = config.setup()
    assert runner.pipeline.text_encoder is None
    conditions = runner.conditions()
    assert torch.equal(conditions["text"], embeds)
    runner.close()


def test_height_and_width_size_the_video(tmp_path):
    config = derive_config(
        SELF_FORCING, output_dir=tmp_path, device="cpu", height=48, width=32, total_blocks=1
    )
    runner = config.setup()
    chunk = rollout(runner.pipeline, 1, text=["a fox"])[0]
    assert chunk.shape[-2:] == (48, 32)
    runner.close()


@pytest.mark.parametrize(("image", "expected"), [(False, [4, 2, 2]), (True, [0, 4, 2])])
def test_the_first_generated_chunk_has_its_own_schedule(image, expected, tmp_path):
    config = derive_config(
        CAUSAL_FORCING.pipeline,
        diffusion_model=dict(
            scheduler=TWO_STEP_MODEL.scheduler,
            first_chunk_scheduler=TWO_STEP_MODEL.first_chunk_scheduler,
        ),
    )
    pipeline = config.setup(device="cpu")
    seen: list[float] = []
    predict = pipeline.diffusion_model.transformer.predict_flow

    def counted(latent, timestep, cache):
        seen.append(float(timestep))
        return predict(latent, timestep, cache)

    pipeline.diffusion_model.transformer.predict_flow = counted
    context = {"image": gradient_image(32, 48)} if image else {}
    cache = pipeline.initialize_cache(text=["a fox"], **context)
    counts = []
    for i in range(3):
        pipeline.generate(autoregressive_index=i, cache=cache)
        pipeline.finalize(autoregressive_index=i, cache=cache)
        counts.append(len(seen) - sum(counts))
        if i == 0:
            cache = pipeline.load_cache(cache.state_dict())  # a saved rollout knows, too
    assert counts == expected
    assert seen[-2:] == pytest.approx([1000.0, 833.3333])
    assert seen[:4] == pytest.approx([1000.0, 937.5, 833.3333, 625.0])


def test_schedules_of_two_kinds_of_timesteps_are_refused():
    model = derive_config(
        CAUSAL_FORCING.pipeline.diffusion_model,
        first_chunk_scheduler=FlowUniPCSchedulerConfig(num_inference_steps=4),
    )
    with pytest.raises(ValueError, match="float32, first_chunk_scheduler in"):
        model.setup()
