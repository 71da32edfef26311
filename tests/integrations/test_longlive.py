"""LongLive against numbers of its official code (float32, atol 5e-5)."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.session import Command, Session
from flashdreams.integrations.longlive.config import (
    PIPELINE,
    SHOTS_IMAGE_PIPELINE,
    SHOTS_PIPELINE,
    TINY_PIPELINE,
    TINY_RUNNER,
)
from flashdreams.models.wan.transformer import SELF_ATTENTION, WanTransformerConfig
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.goldens import golden_config, golden_path, load_golden
from tests.manifests import load_manifest, write_sparse_safetensors

ATOL = 5e-5
ONE, TWO = "c3_longlive1_tiny", "c3_longlive2_tiny"


def tiny(pipeline, folder: str, sizes: dict, **overrides):
    """A shipped literal at the golden's size."""
    kept = ("len_t", "window_size_t", "sink_size_t", "rewritten_sink", "shot_sink_size_t")
    kept = (*kept, "shot_rope_offset", "shot_clean_recache", "relative_rope")
    shipped = pipeline.diffusion_model.transformer
    fields = {name: getattr(shipped, name) for name in kept}
    fields |= dict(latent_height=4, latent_width=4, **sizes)
    fields["checkpoint"] = CheckpointConfig(source=str(golden_path(folder, "weights.safetensors")))
    transformer = WanTransformerConfig(**{**fields, **overrides})
    config = derive_config(pipeline, text_encoder=None, image_encoder=None, decoder=None)
    config = derive_config(config, diffusion_model=dict(transformer=transformer))
    return config.setup(device="cpu")


SIZES_ONE = dict(
    dim=64, ffn_dim=144, num_heads=2, num_layers=3, freq_dim=32, text_dim=64, text_len=16
)


def long_live_one(reencode: str | None = None, **overrides):
    """Rollout of the golden's case 1.0: latents ``[B, F, C, H, W]`` and the cache."""
    pipeline = tiny(PIPELINE, "b2_self_forcing_tiny", SIZES_ONE, **overrides)
    inputs = load_golden(ONE, "inputs.safetensors")
    case = golden_config(ONE)["cases"]["rollout_switch_global_sink"]

    def noise(index: int, step: int, shape) -> torch.Tensor:
        if step == 0:
            return inputs["noise"][:, 3 * index : 3 * index + 3].transpose(1, 2)
        return inputs[f"renoise/chunk{index}/after_step{step - 1}"][None].transpose(1, 2)

    switches = dict(zip(case["switch_frame_indices"], case["prompts"][1:], strict=True))
    cache = pipeline.initialize_cache(text=inputs["prompt_embeds/a"], noise=noise)
    chunks = []
    for index in range(7):
        for frame in [frame for frame in switches if 3 * index >= frame]:
            text = inputs[f"prompt_embeds/{switches.pop(frame)}"]
            given = {} if reencode is None else {"reencode_window": reencode}
            pipeline.update_prompt(cache, text, **given)
        chunks.append(pipeline.generate(index, cache))
        pipeline.finalize(index, cache)
    return torch.cat(chunks, dim=2).transpose(1, 2), cache


def error_of(output: torch.Tensor, folder: str, case: str) -> float:
    return (output - load_golden(folder, f"{case}.safetensors")["output"]).abs().max().item()


def assert_final_keys(cache, golden: dict) -> None:
    """Keys and values by position: the official window is in their order."""
    for layer, kv in enumerate(cache.diffusion.conditional.caches[SELF_ATTENTION]):
        held = dict(kv.canonical_tensors())
        for name in "kv":
            expected = golden[f"final_kv/{layer}/{name}"]
            torch.testing.assert_close(held[name], expected, atol=ATOL, rtol=0)


def test_prompts_switch_as_in_long_live_1():
    output, cache = long_live_one()
    assert error_of(output, ONE, "rollout_switch_global_sink") < ATOL
    assert_final_keys(cache, load_golden(ONE, "rollout_switch_global_sink.safetensors"))


@pytest.mark.parametrize(
    ("mistake", "least"),
    [
        (dict(reencode="chunks"), 0.02),
        (dict(reencode=False), 0.1),
        (dict(rewritten_sink="rewritten"), 0.1),
        (dict(rewritten_sink="moved"), 0.05),
        (dict(relative_rope=True), 0.05),
    ],
    ids=str,
)
def test_another_way_to_switch_is_another_rollout(mistake, least):
    """Negative controls: the traps of the semantics."""
    output, _ = long_live_one(**mistake)
    assert error_of(output, ONE, "rollout_switch_global_sink") > least


def load_published(pipeline, manifest: str, folder) -> int:
    """Compare a literal's transformer with a sparse file of a manifest, strictly."""
    shipped = pipeline.diffusion_model.transformer
    with torch.device("meta"):
        transformer = shipped.setup()
    named = {f"model.{name}": entry for name, entry in load_manifest(manifest).items()}
    write_sparse_safetensors(folder / "zeros.safetensors", named)
    rules = {"strip_prefixes": shipped.checkpoint.strip_prefixes}
    config = CheckpointConfig(source=str(folder / "zeros.safetensors"), **rules)
    return load_checkpoint(transformer, config, device="meta").tensors


@pytest.mark.parametrize(
    ("pipeline", "manifest"),
    [(PIPELINE, "wan21_t2v_1.3B"), (SHOTS_PIPELINE, "wan22_ti2v_5B")],
    ids=lambda x: getattr(x, "name", x),
)
def test_literals_take_exactly_the_published_tensors(pipeline, manifest, tmp_path):
    assert load_published(pipeline, manifest, tmp_path) == 825
    with pytest.raises(CheckpointError, match="does not fit"):  # a model of another size
        load_published(pipeline, "wan21_t2v_14B", tmp_path)


def test_literals_are_the_published_ones():
    one, two = (p.diffusion_model.transformer for p in (PIPELINE, SHOTS_PIPELINE))
    assert (one.len_t, one.window_size_t + one.sink_size_t, one.sink_size_t) == (3, 12, 3)
    assert (two.len_t, two.window_size_t + two.sink_size_t, two.sink_size_t) == (8, 32, 8)
    assert (two.shot_sink_size_t, two.shot_rope_offset) == (8, 8.0)
    scheduler = SHOTS_PIPELINE.diffusion_model.scheduler.setup()
    assert scheduler.timesteps.tolist() == [999, 937, 833, 624]
    expected = torch.tensor([0.9997998, 0.9372655, 0.8330554, 0.6246874])
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=1e-6, atol=0)
    assert SHOTS_PIPELINE.diffusion_model.guidance_scale is None
    with torch.device("meta"):
        assert two.setup().cache_nbytes(1) == pytest.approx(10.4e9, rel=0.01)


def test_an_image_is_held_in_the_first_frame_of_the_first_chunk():
    inputs = load_golden(TWO, "inputs.safetensors")
    pipeline = tiny(SHOTS_IMAGE_PIPELINE, TWO, SIZES_TWO, len_t=2, window_size_t=6, sink_size_t=2)
    cache = pipeline.initialize_cache(
        text=inputs["prompt_embeds/a"][None],
        image=inputs["initial_latent"].transpose(1, 2),
        seed=0,
    )
    first = pipeline.generate(0, cache)
    assert torch.equal(first[:, :, :1], inputs["initial_latent"].transpose(1, 2))
    pipeline.finalize(0, cache)
    assert not torch.equal(pipeline.generate(1, cache)[:, :, :1], first[:, :, :1])


SIZES_TWO = dict(
    dim=32, ffn_dim=72, num_heads=2, num_layers=3, freq_dim=24, text_dim=20, text_len=12,
    in_channels=48, out_channels=48,
)  # fmt: skip

CASES_TWO = {
    "rollout_sink2_local8": dict(shot_sink_size_t=0, shot_rope_offset=0.0),
    "rollout_multishot": {},
}


def long_live_two(case: str, stale: bool = False, **overrides):
    """Rollout of a golden's case 2.0."""
    pipeline = tiny(TINY_PIPELINE, TWO, SIZES_TWO, **{**CASES_TWO[case], **overrides})
    inputs = load_golden(TWO, "inputs.safetensors")
    prompts = golden_config(TWO)["cases"][case]["prompts_per_chunk"]
    cache = pipeline.initialize_cache(
        text=inputs[f"prompt_embeds/{prompts[0]}"][None],
        noise=lambda index, step, shape: inputs["noise"][:, 2 * index : 2 * index + 2].transpose(
            1, 2
        ),
    )
    chunks = []
    for index, prompt in enumerate(prompts):
        if index and prompt != prompts[index - 1] and not stale:
            text = inputs[f"prompt_embeds/{prompt}"][None]
            pipeline.update_prompt(cache, text, begins_shot=prompt.startswith("cut_"))
        chunks.append(pipeline.generate(index, cache))
        pipeline.finalize(index, cache)
    return torch.cat(chunks, dim=2).transpose(1, 2), cache


@pytest.mark.parametrize("case", CASES_TWO)
def test_shots_follow_long_live_2(case):
    golden = load_golden(TWO, f"{case}.safetensors")
    output, cache = long_live_two(case)
    assert error_of(output, TWO, case) < ATOL
    assert_final_keys(cache, golden)
    scheduler = TINY_PIPELINE.diffusion_model.scheduler.setup()
    assert torch.equal(scheduler.timesteps, golden["unipc_timesteps"])
    torch.testing.assert_close(scheduler.sigmas, golden["unipc_sigmas"][:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("mistake", "least"),
    [
        (dict(shot_sink_size_t=0), 0.1),
        (dict(shot_rope_offset=0.0), 0.1),
        (dict(sink_size_t=0, window_size_t=8), 0.1),
        (dict(stale=True), 0.5),
        (dict(shot_clean_recache=True), 0.01),
    ],
    ids=str,
)
def test_other_shots_are_another_rollout(mistake, least):
    """Negative controls: the traps of the semantics."""
    output, _ = long_live_two("rollout_multishot", **mistake)
    assert error_of(output, TWO, "rollout_multishot") > least


CUT = "The scene transitions. a boat at sea"


def latents_of(pipeline, prompts: dict[int, str], blocks: int, save_at: int | None = None):
    """Latents of a tiny rollout by hand; saved and loaded before one of its steps."""
    cache = pipeline.initialize_cache(text=[prompts[0]], seed=0)
    latents = []
    for index in range(blocks):
        if index == save_at:
            cache = pipeline.load_cache(cache.state_dict())
        if index in prompts and index:
            pipeline.update_prompt(cache, prompts[index])
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
    return torch.stack(latents), cache


def test_shots_of_the_command_line_are_prompts_and_cuts(tmp_path):
    shots = ("2:a fox", f"3:{CUT}", "2:a boat at night", f"1:{CUT}")
    config = derive_config(TINY_RUNNER, output_dir=tmp_path, device="cpu", shot=shots)
    runner = config.setup()
    found = torch.stack([step.cache.latent.clone() for step in runner.stream(8)])
    prompts = {0: "a fox", 2: CUT, 3: "a boat at sea", 5: "a boat at night", 7: CUT}
    expected, cache = latents_of(runner.pipeline, prompts, 8)
    assert torch.equal(found, expected)
    assert cache.diffusion.conditional.shots.begun == 2
    assert cache.diffusion.conditional.cursor.pinned == (14, 15)
    told_once = latents_of(runner.pipeline, {0: "a fox", 2: CUT, 5: "a boat at night"}, 7)[0]
    assert torch.equal(told_once, expected[:7])
    kept = latents_of(runner.pipeline, {**prompts, 3: runner.pipeline.encode_prompts([CUT])}, 4)[0]
    assert not torch.equal(kept[3], expected[3])  # negative control: the prefix in a second chunk
    plain = latents_of(runner.pipeline, {**prompts, 2: "a boat at sea"}, 8)[0]
    assert torch.equal(plain[:2], expected[:2]) and not torch.equal(plain[2], expected[2])
    runner.close()


def test_a_client_sends_the_prompt_of_a_shot_once():
    """The second chunk has the prompt without the prefix, also after a save before the first."""
    pipeline = TINY_PIPELINE.setup(device="cpu")
    expected, _ = latents_of(pipeline, {0: "a fox", 1: CUT, 2: "a boat at sea"}, 4)
    session = Session(pipeline, {"text": ["a fox"]})
    session.step()
    session.submit(Command(kind="prompt", values={"text": CUT}))
    session.submit(Command(kind="fork", values={"name": "told"}))
    for _ in range(2):
        found = [session.step().cache.latent.clone() for _ in range(3)]
        assert torch.equal(torch.stack(found), expected[1:])
        session.submit(Command(kind="rewind", values={"name": "told"}))
    opening = latents_of(pipeline, {0: CUT}, 2)[0]
    assert torch.equal(opening, latents_of(pipeline, {0: CUT, 1: "a boat at sea"}, 2)[0])


@pytest.mark.parametrize("save_at", [3, 6, 7])
def test_a_saved_rollout_knows_its_shots(save_at):
    pipeline = TINY_PIPELINE.setup(device="cpu")
    prompts = {0: "a fox", 2: CUT, 5: CUT}
    stayed, _ = latents_of(pipeline, prompts, 8)
    moved, cache = latents_of(pipeline, prompts, 8, save_at)
    assert torch.equal(stayed, moved)
    held = sorted(cache.diffusion.conditional.cursor.frames)
    assert held == [0, 1, 10, 11, 12, 13, 14, 15]
    cache.diffusion.conditional.cursor.pinned = ()  # negative control: the pin is what holds 10, 11
    for index in (8, 9):
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
    assert 10 not in cache.diffusion.conditional.cursor.frames


def test_a_shot_begins_between_steps():
    pipeline = TINY_PIPELINE.setup(device="cpu")
    cache = pipeline.initialize_cache(text=["a fox"], seed=0)
    pipeline.generate(0, cache)
    with pytest.raises(ValueError, match="call finalize first"):
        pipeline.update_prompt(cache, CUT)


def test_windows_that_cannot_hold_a_shot_are_refused():
    transformer = TINY_PIPELINE.diffusion_model.transformer
    with pytest.raises(ValueError, match="use at least 4"):
        derive_config(transformer, window_size_t=3)
    with pytest.raises(ValueError, match="goes with neither"):
        derive_config(transformer, relative_rope=True)
    with pytest.raises(ValueError, match="is unknown; allowed are"):
        WanTransformerConfig(rewritten_sink="gone")


def test_the_sink_moves_where_it_is_not_kept():
    """Without ``global_sink`` the last frames are all that is left, the oldest of them the sink."""
    _, cache = long_live_one(rewritten_sink="moved")
    assert cache.diffusion.conditional.cursor.frames[:3] == [3, 4, 5]
    _, cache = long_live_one()
    assert cache.diffusion.conditional.cursor.frames[:3] == [0, 1, 2]


def test_the_endless_form_switches_in_one_pass_too():
    """Positions by slot are those of absolute keys with the sink moved up to the window."""
    output, cache = long_live_one(relative_rope=True, window_size_t=6)
    assert output.isfinite().all()
    assert sorted(cache.diffusion.conditional.cursor.frames) == [0, 1, 2, *range(15, 21)]
