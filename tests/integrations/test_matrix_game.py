"""Matrix-Game 2.0 end to end at toy size, what it refuses, and loading at full size."""

import json
import re
from pathlib import Path

import mediapy
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import Event
from flashdreams.infra.session import Command, Session, key_commands
from flashdreams.infra.weights import memory_estimate
from flashdreams.integrations.matrix_game.config import (
    FULL_SIZE,
    GTA_DRIVE_PIPELINE,
    PIPELINE,
    RUNNER_CONFIGS,
    TEMPLE_RUN_PIPELINE,
    TINY_PIPELINE,
    TINY_RUNNER,
)
from flashdreams.integrations.matrix_game.controls import (
    KEYS,
    ActionController,
    RecordedActions,
)
from flashdreams.integrations.matrix_game.encoder import Actions
from flashdreams.integrations.matrix_game.transformer import KEYBOARD_CACHE, MOUSE_CACHE
from flashdreams.models.wan.transformer import SELF_ATTENTION
from flashdreams.registry import discover
from flashdreams.run import main
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.image_file import gradient_image
from tests.manifests import load_manifest, write_sparse_safetensors
from tests.unit.runtime.test_cuda_graph import trace_graphs

ROOT = Path(__file__).parents[2]
SLUG, UNIVERSAL = TINY_RUNNER.runner_name, "matrix-game-2-universal"
MANIFESTS = {
    "matrix-game-2-universal": "matrix_game_2_universal",
    "matrix-game-2-gta-drive": "matrix_game_2_gta_drive",
    "matrix-game-2-temple-run": "matrix_game_2_temple_run",
}


@pytest.fixture(scope="module")
def pipeline():
    return TINY_PIPELINE.setup(device="cpu")


def actions_of(seed: int, frames: int = 69) -> Actions:
    draw = torch.Generator().manual_seed(seed)
    keyboard = torch.randint(2, (frames, 4), generator=draw).float()
    return Actions(keyboard, torch.randn(frames, 2, generator=draw))


def begin(pipeline, seed: int = 0):
    return pipeline.initialize_cache(image=gradient_image(48, 80), seed=seed)


def advance(pipeline, cache, actions: Actions, first: int, last: int) -> list[torch.Tensor]:
    chunks = []
    for index in range(first, last):
        frames = pipeline.pixel_frames(index)
        part = actions.part(slice(frames.start, frames.stop))
        chunks.append(pipeline.generate(index, cache, part))
        pipeline.finalize(index, cache)
    return chunks


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Literals.


def test_every_slug_is_registered():
    plain = [*MANIFESTS, *(f"{slug}-taehv" for slug in MANIFESTS), SLUG]
    assert list(RUNNER_CONFIGS) == plain
    found = discover()
    assert all(slug in found for slug in plain)
    assert all(slug == c.runner_name == c.pipeline.name for slug, c in RUNNER_CONFIGS.items())


def on_meta(slug: str):
    with torch.device("meta"):
        return RUNNER_CONFIGS[slug].pipeline.diffusion_model.transformer.setup()


def load_sparse(model, manifest: str, folder: Path) -> int:
    path = folder / "zeros.safetensors"
    write_sparse_safetensors(path, load_manifest(manifest))
    config = CheckpointConfig(
        source=str(path), strip_prefixes=model.config.checkpoint.strip_prefixes
    )
    return load_checkpoint(model, config, device="meta").tensors


@pytest.mark.parametrize("slug", MANIFESTS)
def test_transformer_takes_exactly_the_published_tensors(slug, tmp_path):
    model = on_meta(slug)
    expected = load_manifest(MANIFESTS[slug])
    assert load_sparse(model, MANIFESTS[slug], tmp_path) == len(expected)
    assert model.config.checkpoint.size_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_a_checkpoint_of_another_variant_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"keyboard_embed\.0\.weight.*\[128, 2\] in the file"):
        load_sparse(on_meta(UNIVERSAL), "matrix_game_2_gta_drive", tmp_path)
    with pytest.raises(CheckpointError, match=r"mouse_mlp"):
        load_sparse(on_meta(UNIVERSAL), "matrix_game_2_temple_run", tmp_path)


def test_literals_are_those_of_the_release():
    for runner, window, columns, mouse, steps in zip(
        FULL_SIZE, (6, 4, 6), (4, 2, 7), (2, 2, None), (3, 3, 4), strict=True
    ):
        model = runner.pipeline.diffusion_model
        c = model.transformer
        assert (c.window_size_t, c.sink_size_t, c.keyboard_dim, c.mouse_dim) == (
            window, 0, columns, mouse,
        )  # fmt: skip
        assert (c.len_t, c.tokens_per_frame, c.action_head_dim) == (3, 880, 64)
        assert len(model.scheduler.denoising_timesteps) == steps and model.guidance_scale is None
        encoder = runner.pipeline.encoder
        assert (encoder.keyboard_dim, encoder.mouse_dim) == (columns, mouse)


def test_memory_is_predicted_from_shapes():
    """As the facts have it: 0.97 GB of self-attention and 0.32 GB of mouse."""
    model = on_meta(UNIVERSAL)
    sizes = {glob: spec.nbytes for glob, spec in model.cache_specs(1).items()}
    assert sizes[SELF_ATTENTION] * 30 / 1e9 == pytest.approx(0.97, abs=0.01)
    assert sizes[MOUSE_CACHE] * 15 / 1e9 == pytest.approx(0.32, abs=0.01)
    assert sizes[KEYBOARD_CACHE] * 15 < 1e6
    assert "KV cache 1.3 GB" in memory_estimate(PIPELINE)


def test_action_modules_take_the_share_that_the_page_states():
    """A denoising pass with a full window, counted by PyTorch from shapes alone.

    All blocks with an action module are alike, and so are all others: one of each is run.
    """
    full = PIPELINE.diffusion_model.transformer
    with torch.device("meta"):
        model = derive_config(full, num_layers=2, action_blocks=1).setup()
    model.cast()
    example = {name: x.to("meta") for name, x in model.example_context(1).items()}
    control = {name: x.to("meta") for name, x in model.example_control(1).items()}
    cache = model.initialize_cache(**example)
    for cursor in cache.cursors:
        cursor.reset(full.window_size_t)
    latent = torch.empty(model.latent_shape(1), device="meta")
    with torch.no_grad():
        model.begin_step(full.window_size_t // full.len_t, cache, control)
        with FlopCounterMode(display=False, depth=8) as counter:
            model.predict_flow(latent, torch.tensor(500.0), cache)
    name = type(model).__name__
    flops = {n.removeprefix(f"{name}."): sum(f.values()) for n, f in counter.flop_counts.items()}
    acting, plain = flops["blocks.0"], flops["blocks.1"]
    total = flops[name] + (full.action_blocks - 1) * acting
    total += (full.num_layers - full.action_blocks - 1) * plain
    module, parts = "blocks.0.action_model", ("mouse_mlp", "t_qkv", "mouse_core", "proj_mouse")
    action = full.action_blocks * flops[module]
    mouse = full.action_blocks * sum(flops[f"{module}.{part}"] for part in parts)
    page = (ROOT / "docs/source/models/matrix_game.md").read_text().replace("\n", " ")
    assert f"a full window is {total / 1e12:.1f} TFLOP" in page
    assert f"action modules account for {action / total:.1%}".replace("%", " %") in page
    assert f"mouse path alone for {mouse / total:.1%}".replace("%", " %") in page
    assert total == 10_132_636_631_040, "as all layers in one run"


# Rollouts.


def test_key_presses_become_a_video(tmp_path):
    argv = [SLUG, "--device", "cpu", "--output-dir", str(tmp_path), "--save-latents", "True"]
    assert main([*argv, "--total-blocks", "3"]) == 0
    assert np.asarray(mediapy.read_video(tmp_path / f"{SLUG}.mp4")).shape == (33, 48, 80, 3)
    assert len(json.loads((tmp_path / f"stats_{SLUG}.json").read_text())["records"]) == 3
    latents = load_file(tmp_path / f"latents_{SLUG}.safetensors")["latents"]
    assert latents.shape == (1, 16, 9, 6, 10)


def save_actions(path: Path, frames: int = 33, **changes) -> Path:
    arrays = {"keyboard": np.zeros((frames, 4), np.float32), "mouse": np.zeros((frames, 2))}
    arrays |= changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def held(frames: int, **keys: slice) -> np.ndarray:
    keyboard = np.zeros((frames, 4), np.float32)
    for key, where in keys.items():
        keyboard[where, "wsad".index(key)] = 1
    return keyboard


def test_presses_a_file_and_a_session_lead_to_the_same_world(tmp_path, pipeline):
    """The same slug, the same bits; a pointer moves the view as the camera keys do."""
    mouse = np.zeros((33, 2), np.float32)
    mouse[9:21, 1] = 0.1
    keyboard = held(33, w=slice(0, 21), d=slice(21, 33))
    save_actions(tmp_path / "actions.npz", keyboard=keyboard, mouse=mouse)
    latents = []
    for name, flags in {
        "presses": ["--actions", "w9 wl12 d12"],
        "file": ["--action-path", str(tmp_path / "actions.npz"), "--actions", "None"],
    }.items():
        folder = tmp_path / name
        argv = [SLUG, *flags, "--total-blocks", "3", "--device", "cpu", "--save-latents", "True"]
        assert main([*argv, "--output-dir", str(folder)]) == 0
        latents.append(load_file(folder / f"latents_{SLUG}.safetensors")["latents"])
    controller = ActionController(KEYS["universal"])
    session = Session(pipeline, {"image": gradient_image(48, 80)}, controller=controller)
    steps = []
    for values in ({"keys": "w"}, {"mouse": [0, 0.1]}, {"keys": "d"}):
        session.submit(Command(kind="control", values=values))
        steps.append(session.step())
    latents.append(torch.cat([chunk.latent for chunk in steps[-1].cache.diffusion.history], dim=2))
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[2], latents[0][:, :, -latents[2].shape[2] :])
    idle = Session(pipeline, {"image": gradient_image(48, 80)}, controller=controller)
    for _ in range(3):
        other = idle.step()
    assert not torch.equal(other.cache.latent, steps[-1].cache.latent)


@pytest.mark.parametrize("variant", ["gta_drive", "temple_run"])
def test_other_variants_run(variant, tmp_path):
    """The literals of the variants, at the size of the tiny one."""
    source = {"gta_drive": GTA_DRIVE_PIPELINE, "temple_run": TEMPLE_RUN_PIPELINE}[variant]
    big, tiny = source.diffusion_model.transformer, TINY_PIPELINE.diffusion_model.transformer
    changes = {n: getattr(big, n) for n in ("keyboard_dim", "mouse_dim", "window_size_t")}
    config = derive_config(
        source,
        image_encoder=TINY_PIPELINE.image_encoder,
        encoder=dict(vae=TINY_PIPELINE.encoder.vae),
        diffusion_model=dict(transformer=derive_config(tiny, **changes)),
        decoder=TINY_PIPELINE.decoder,
    )
    runner = derive_config(
        TINY_RUNNER, runner_name="other", variant=variant, pipeline=config,
        actions="w9 a12 w12", total_blocks=3, device="cpu", output_dir=tmp_path,
    )  # fmt: skip
    runner = runner.setup()
    steps = list(runner.stream(3))
    state = steps[-1].cache.diffusion.conditional
    assert (MOUSE_CACHE in state.caches) == (variant == "gta_drive")
    held_frames = {cursor.capacity_t for cursor in state.cursors}
    assert held_frames == {big.window_size_t}
    pressed = torch.cat([step.control.keyboard for step in steps])
    assert pressed.sum(1).tolist() == ([1] * 9 + [0] * 12 + [1] * 12 if variant == "gta_drive"
                                       else [1] * 33)  # fmt: skip
    assert all(step.chunk.isfinite().all() for step in steps)
    runner.close()


def test_actions_steer_from_the_next_latent_frame_on(pipeline):
    """The last pixel frame of a chunk is seen by the next chunk alone."""
    plain = actions_of(0)
    late = Actions(plain.keyboard.clone(), plain.mouse)
    late.keyboard[20] = 1 - late.keyboard[20]
    a = advance(pipeline, begin(pipeline), plain, 0, 3)
    b = advance(pipeline, begin(pipeline), late, 0, 3)
    assert same(a[:2], b[:2]) and not torch.equal(a[2], b[2])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_saved_and_cloned_worlds_go_on(pipeline, steps):
    actions = actions_of(2)
    cache = begin(pipeline)
    advance(pipeline, cache, actions, 0, steps)
    copies = [cache.clone(), pipeline.load_cache(cache.state_dict())]
    expected = advance(pipeline, cache, actions, steps, steps + 2)
    for copy in copies:
        assert same(advance(pipeline, copy, actions, steps, steps + 2), expected)
    if steps:
        names = list(cache.state_dict()["tensors"])
        for part in (MOUSE_CACHE, KEYBOARD_CACHE, "encoder/mouse", "encoder/video/slots"):
            assert any(part in name for name in names), part
    other = pipeline.load_cache(cache.state_dict())
    other.encoder.keyboard = 1 - other.encoder.keyboard
    later = steps + 2, steps + 3
    assert not same(  # negative control: the earlier actions count
        advance(pipeline, other, actions, *later), advance(pipeline, cache, actions, *later)
    )


def test_forks_in_a_batch_have_actions_of_their_own(pipeline):
    given = [actions_of(3), actions_of(4)]
    cache = begin(pipeline)
    advance(pipeline, cache, given[0], 0, 2)
    forks, batch = cache.fork(2), cache.fork_batch(2)
    for index in (2, 3):
        frames = pipeline.pixel_frames(index)
        parts = [actions.part(slice(frames.start, frames.stop)) for actions in given]
        pipeline.generate(index, batch, parts)
        pipeline.finalize(index, batch)
        for fork, actions in zip(forks, given, strict=True):
            advance(pipeline, fork, actions, index, index + 1)
        expected = torch.cat([fork.latent for fork in forks])
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(batch.latent, expected, rtol=0, atol=bound)
        assert not torch.allclose(expected[0], expected[1], atol=bound)  # negative control


def test_held_keys_are_saved(pipeline):
    controller = ActionController(KEYS["universal"])
    session = Session(pipeline, {"image": gradient_image(48, 80)}, controller=controller)
    session.submit(Command(kind="control", values={"keys": "wa"}))
    session.step()
    state = session.cache.state_dict()
    assert pipeline.load_cache(state, controller=controller).controller.keys == "wa"


def test_the_condition_is_that_of_a_whole_clip(pipeline):
    """Image and grey frames encoded chunk by chunk, to the bit, and held once they settle."""
    encoder, image = pipeline.encoder, gradient_image(48, 80)
    clip = torch.cat([image[:, :, None], torch.zeros(1, 3, 4 * 35, 48, 80)], dim=2)
    whole = encoder.vae(clip)
    cache, actions = encoder.initialize_cache(first_frame=image), actions_of(0, 12)
    parts = []
    for index in range(12):
        given = actions.part(slice(0, 9)) if index == 0 else actions
        parts.append(encoder(given, index, cache)["condition"])
    found = torch.cat(parts, dim=2)
    assert torch.equal(found[:, 4:], whole)
    assert (found[:, :4, 0] == 1).all() and (found[:, :4, 1:] == 0).all()
    assert not cache.video.slots  # nothing is encoded any more
    assert not torch.equal(whole[:, :, 20], whole[:, :, 21])  # not earlier than needed


def test_a_condition_may_be_given_whole_or_with_the_control_but_not_at_all(pipeline):
    model = pipeline.diffusion_model.transformer
    control = model.example_control(1)
    state = model.initialize_cache(image_tokens=torch.zeros(1, 5, 32))
    model.begin_step(0, state, control)
    assert state.inputs.condition.shape == (1, 20, 3, 6, 10)
    del control["condition"]
    with pytest.raises(ValueError, match="was given a condition"):
        model.begin_step(0, state, control)
    given = torch.randn(1, 20, 2, 6, 10)
    state = model.initialize_cache(image_tokens=torch.zeros(1, 5, 32), condition=given)
    model.begin_step(0, state, control)
    assert torch.equal(state.inputs.condition, given[:, :, [0, 1, 1]])
    with pytest.raises(ValueError, match=r"'keyboard' must be \[B or 1, latent frames, 12, 4\]"):
        model.begin_step(0, state, {"keyboard": torch.zeros(1, 3, 12, 5)})


def test_a_batch_shares_or_has_actions_of_its_own(pipeline):
    image, own = gradient_image(48, 80).expand(2, -1, -1, -1), [actions_of(0), actions_of(1)]
    stacked = Actions(*(torch.stack([getattr(a, n) for a in own]) for n in ("keyboard", "mouse")))
    noise = torch.randn(2, 16, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    draw = lambda index, step, shape: noise[: shape[0]]  # noqa: E731
    both = pipeline.initialize_cache(image=image, noise=draw)
    found = advance(pipeline, both, stacked, 0, 3)
    alone = pipeline.initialize_cache(image=image[:1], noise=draw)
    for chunk, expected in zip(found, advance(pipeline, alone, own[0], 0, 3), strict=True):
        torch.testing.assert_close(chunk[:1], expected, atol=1e-4, rtol=0)
    assert not torch.equal(found[2][0], found[2][1])


@torch.no_grad()
def test_replays_equal_eager_rollouts():
    """Two graphs once the window is full; nothing of a chunk is left in the last one's tensors."""
    config = derive_config(
        TINY_PIPELINE, diffusion_model=dict(transformer=dict(use_cuda_graph=True)), decoder=None
    )
    actions, eager = actions_of(3), None
    for traced in (False, True):
        pipeline = config.setup(device="cpu")
        model = pipeline.diffusion_model.transformer
        if traced:
            trace_graphs(model)
            model.network.reset()
        cache = pipeline.initialize_cache(image=gradient_image(48, 80))
        found = []
        for index in range(5):
            frames = (0, 9) if index == 0 else (12 * index - 3, 12 * index + 9)
            found.append(pipeline.generate(index, cache, actions.part(slice(*frames))))
            pipeline.finalize(index, cache)
        if not traced:
            eager = found
            continue
        assert same(found, eager)
        assert (model.network.captures, model.network.eager_calls) == (2, 4)
        branch = cache.diffusion.conditional
        assert model.replay_is_exact(branch, model.example_control(1))
        branch.inputs.control["mouse"] = branch.inputs.control["mouse"].clone()
        model.begin_step(5, branch, model.example_control(1))
        before = branch.inputs.control["mouse"]
        model.begin_step(5, branch, {k: x + 1 for k, x in model.example_control(1).items()})
        assert branch.inputs.control["mouse"] is before  # filled in place


def test_there_is_no_prompt(pipeline):
    cache = begin(pipeline)
    advance(pipeline, cache, actions_of(0), 0, 1)
    with pytest.raises(ValueError, match="takes no text"):
        pipeline.update_prompt(cache, torch.zeros(1, 3, 8), reencode_window=True)
    with pytest.raises(ValueError, match="takes no text"):
        pipeline.initialize_cache(text=torch.zeros(1, 3, 8), image=gradient_image(48, 80))
    with pytest.raises(ValueError, match="starts from an image"):
        pipeline.encoder.initialize_cache()


# Keys and pointer.


def test_held_keys_and_pointer_motion_become_actions():
    controller = ActionController(KEYS["universal"])
    state = controller.new_state()
    events = [Event(2, {"keys": "wl"}), Event(4, {"mouse": [0.5, -0.2]}), Event(6, {"keys": ""})]
    first = controller.advance(state, events, range(9))
    assert first.keyboard[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    yaw = [0, 0, 0.1, 0.1, -0.1, -0.1, -0.2, -0.2, -0.2]
    torch.testing.assert_close(first.mouse[:, 1], torch.tensor(yaw))
    assert first.mouse[:, 0].tolist() == [0, 0, 0, 0, *[0.5] * 5]
    controller.advance(state, [Event(0, {"keys": "jl"})], range(9, 21))
    later = controller.advance(state, [], range(21, 33))
    assert later.mouse.abs().max() == 0 and state.keys == "jl"  # a pointer that rests; opposites


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("universal", {"keys": "q"}, "unknown key 'q'.*w .forward"),
        ("universal", {"keys": 3}, "takes"),
        ("universal", {}, "takes"),
        ("universal", {"wheel": 1}, "takes"),
        ("universal", {"mouse": [0.1]}, r"\[pitch, yaw\]"),
        ("universal", {"mouse": [0.1, float("nan")]}, r"\[pitch, yaw\]"),
        ("universal", {"mouse": [40, 0]}, "from -1 to 1"),
        ("universal", {"mouse": [True, 0]}, r"\[pitch, yaw\]"),
        ("gta_drive", {"keys": "l"}, "unknown key 'l'"),
        ("temple_run", {"mouse": [0, 0]}, "there is no mouse"),
        ("temple_run", {"keys": "wa"}, "one key at a time"),
    ],
)
def test_other_events_are_refused(variant, values, message):
    with pytest.raises(ValueError, match=message):
        ActionController(KEYS[variant]).check(values)


@pytest.mark.parametrize("variant", KEYS)
def test_what_a_controller_accepts_is_what_it_says(variant):
    controller = ActionController(KEYS[variant])
    schema = controller.accepts()
    assert ("mouse" in schema["properties"]) == KEYS[variant].has_mouse
    for key in KEYS[variant].names:
        controller.check({"keys": key})
        assert re.match(schema["properties"]["keys"]["pattern"], key)
    assert not re.match(schema["properties"]["keys"]["pattern"], "q")
    commands = key_commands("w2", KEYS[variant].names, first_frame=0)
    assert [(c.at_frame, c.values) for c in commands] == [(0, {"keys": "w"}), (2, {"keys": ""})]


def test_recorded_actions_take_no_control_and_end():
    controller = RecordedActions(actions_of(0, 20))
    with pytest.raises(ValueError, match="takes no control"):
        controller.check({"keys": "w"})
    assert controller.advance(None, [], range(9)).keyboard.shape == (9, 4)
    with pytest.raises(ValueError, match="ends at frame 20"):
        controller.advance(None, [], range(9, 21))
