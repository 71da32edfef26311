"""Matrix-Game against numbers of the official code (float32, atol 5e-5)."""

from functools import cache

import pytest
import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.rope import apply_rope
from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import Event
from flashdreams.integrations.matrix_game import action
from flashdreams.integrations.matrix_game.action import (
    ActionControl,
    ActionModule,
    time_rotations,
)
from flashdreams.integrations.matrix_game.config import PIPELINE, TEMPLE_RUN_PIPELINE
from flashdreams.integrations.matrix_game.controls import KEYS, ActionController
from flashdreams.integrations.matrix_game.encoder import (
    ActionCache,
    ActionEncoder,
    ActionEncoderConfig,
    Actions,
)
from flashdreams.integrations.matrix_game.transformer import (
    KEYBOARD_CACHE,
    MOUSE_CACHE,
    ActionBlock,
    MatrixGameTransformer,
    MatrixGameTransformerConfig,
)
from flashdreams.models.wan.config import TINY_VAE_IMAGE_ENCODER
from flashdreams.models.wan.transformer import SELF_ATTENTION
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.goldens import golden_path, load_golden
from tests.tiny import call_network

ATOL = 5e-5
WHOLE, MODULE = "c1_matrixgame_universal_tiny", "c1_matrixgame_action_module"
CPU = torch.device("cpu")
CHUNKS, LEN_T, CALLS = 6, 3, 4


def tiny_config(**changes) -> MatrixGameTransformerConfig:
    sizes = dict(dim=32, ffn_dim=72, num_heads=2, num_layers=3, freq_dim=24, image_dim=48)
    sizes |= dict(latent_height=4, latent_width=6, window_size_t=6)
    sizes |= dict(action_blocks=2, action_heads=2, action_dim=24, keyboard_embed_dim=6)
    return MatrixGameTransformerConfig(**{**sizes, **changes})


def golden_pipeline(**model):
    """The shipped literal at the golden's size; names as in the published checkpoint."""
    weights = CheckpointConfig(
        source=str(golden_path(WHOLE, "weights.safetensors")),
        strip_prefixes=PIPELINE.diffusion_model.transformer.checkpoint.strip_prefixes,
    )
    transformer = tiny_config(checkpoint=weights, **model.pop("transformer", {}))
    config = derive_config(
        PIPELINE,
        image_encoder=None,
        encoder=dict(vae=TINY_VAE_IMAGE_ENCODER),
        decoder=None,
        diffusion_model=dict(transformer=transformer, **model),
    )
    return config.setup(device="cpu")


def pixel_frames(chunk: int) -> slice:
    return slice(12 * chunk - 3 if chunk else 0, 12 * chunk + 9)


def golden_actions(chunk: int, inputs: dict[str, Tensor]) -> Actions:
    return Actions(inputs["keyboard_cond"], inputs["mouse_cond"]).part(pixel_frames(chunk))


def golden_rollout(pipeline, chunks: int = CHUNKS, clean_pass: bool = True, change=None):
    inputs = load_golden(WHOLE, "inputs.safetensors")

    def noise(index: int, step: int, shape) -> Tensor:
        if step == 0:
            return inputs["noise"][:, :, LEN_T * index : LEN_T * (index + 1)]
        return inputs[f"renoise/chunk{index}/after_step{step - 1}"].transpose(0, 1)[None]

    cache = pipeline.initialize_cache(
        image_tokens=inputs["visual_context"], condition=inputs["cond_concat"], noise=noise
    )
    latents = []
    for i in range(chunks):
        given = golden_actions(i, inputs)
        latents.append(pipeline.generate(i, cache, given if change is None else change(given)))
        if clean_pass:
            pipeline.finalize(i, cache)
        else:
            cache.diffusion.pending = False
            for cursor in cache.diffusion.conditional.cursors:
                cursor.advance()
    return torch.cat(latents, dim=2), cache


@cache
def official() -> dict[str, Tensor]:
    return load_golden(WHOLE, "rollout.safetensors")


def test_whole_rollout_matches_official():
    """Through the public pipeline: latents and, at the end, every cache."""
    calls = load_golden(WHOLE, "rollout.safetensors")
    output, cache = golden_rollout(golden_pipeline())
    torch.testing.assert_close(output, calls["output"], atol=ATOL, rtol=0)
    state = cache.diffusion.conditional
    for glob, name in ((SELF_ATTENTION, "final_kv"), (MOUSE_CACHE, "final_mouse_kv")):
        for layer, kv in enumerate(state.caches[glob]):
            found = dict(kv.canonical_tensors())
            for part in "kv":
                expected = calls[f"{name}/{layer}/{part}"]
                if glob == MOUSE_CACHE:  # officially [positions, frames, heads, channels]
                    expected = expected.transpose(0, 1).flatten(0, 1)[None]
                held = expected[:, -found[part].shape[1] :]
                torch.testing.assert_close(found[part], held, atol=ATOL, rtol=0)
    for layer, kv in enumerate(state.caches[KEYBOARD_CACHE]):
        for part, found in kv.canonical_tensors():
            expected = calls[f"keyboard_kv_after_chunk5/{layer}/{part}"]
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    for layer, ((k, v),) in enumerate(state.context.pairs):
        torch.testing.assert_close(k, calls[f"final_cross_kv/{layer}/k"], atol=ATOL, rtol=0)
        torch.testing.assert_close(v, calls[f"final_cross_kv/{layer}/v"], atol=ATOL, rtol=0)


def test_every_call_matches_official():
    """Each call on the official noisy latent: nothing adds up."""
    calls = load_golden(WHOLE, "rollout.safetensors")
    inputs = load_golden(WHOLE, "inputs.safetensors")
    pipeline = golden_pipeline()
    model = pipeline.diffusion_model.transformer
    assert torch.equal(
        pipeline.diffusion_model.scheduler.timesteps, calls["call_timestep"].flatten()[:3]
    )
    past, state = (
        ActionCache(image=None),
        model.initialize_cache(
            image_tokens=inputs["visual_context"], condition=inputs["cond_concat"]
        ),
    )
    for index in range(CHUNKS * CALLS):
        chunk, step = divmod(index, CALLS)
        if step == 0:
            control = pipeline.encoder(golden_actions(chunk, inputs), chunk, past)
            model.begin_step(chunk, state, control)
        noisy, timestep = calls[f"call{index:02d}/noisy"], calls["call_timestep"][index][0]
        if step == CALLS - 1:
            model.update_cache(noisy, timestep, state)
            continue
        flow = model.predict_flow(noisy, timestep, state)
        torch.testing.assert_close(flow, calls[f"call{index:02d}/flow"], atol=ATOL, rtol=0)


def window_later(self, past, actions, plain=ActionEncoder._windows):
    """One pixel frame later: a latent frame that sees its own last action."""
    windows, past = plain(self, past, actions)
    own = actions[:, actions.shape[1] - 9 :: 4]
    return torch.cat([windows[:, :, 1:], own.unsqueeze(2)], dim=2), past


def zeros_before(self, past, actions, plain=ActionEncoder._windows):
    windows, kept = plain(self, past, actions)
    if past is None:
        seen = torch.cat([torch.zeros_like(windows[:, 0]), actions], dim=1)
        windows = torch.stack([seen[:, 4 * t : 4 * t + 12] for t in range(LEN_T)], dim=1)
    return windows, kept


def channel_major(self, x, control, plain=ActionModule._mouse_heads):
    mouse = control.mouse.unflatten(-1, (12, 2)).transpose(-1, -2).flatten(-2)
    return plain(self, x, control._replace(mouse=mouse))


def norm_weights(self, x, rotation, plain=ActionModule._normed):
    weight = self.key_attn_q_norm.weight
    return apply_rope(plain(self, x, torch.tensor([[[1.0, 0.0]]])) * weight, rotation)


def keyboard_first(self, x, control):
    (q,) = self._heads(self.mouse_attn_q(x), 1)
    q = self._normed(q, control.rotation)
    x = x + self.proj_keyboard(
        self.keyboard_core(q, *control.keys, control.keyboard_cache).flatten(2)
    )
    return self.mouse_path(x, control)


MISTAKES = {
    "window one pixel frame later": (ActionEncoder, "_windows", window_later),
    "zeros before frame 0": (ActionEncoder, "_windows", zeros_before),
    "flattened channel-major": (ActionModule, "_mouse_heads", channel_major),
    "norm weights applied": (ActionModule, "_normed", norm_weights),
    "keyboard first": (ActionModule, "forward", keyboard_first),
    "action before cross-attention": (ActionBlock, "inject", ActionBlock.inject_late),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_easy_mistakes_are_seen(mistake, monkeypatch):
    """Negative control."""
    owner, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, wrong)
    if name == "inject":
        monkeypatch.setattr(owner, "inject_late", lambda self, x, control: x)
    assert relative_to_official(golden_pipeline()) > 1000 * ATOL


@pytest.mark.parametrize(
    "wrong",
    [
        dict(transformer=dict(action_rope_theta=10000.0)),
        dict(transformer=dict(action_rope_dim=12)),
        dict(transformer=dict(window_size_t=9)),
        dict(scheduler=dict(warp_denoising_step=False)),
        dict(scheduler=dict(shift=8.0)),
    ],
)
def test_other_numbers_are_seen(wrong):
    """Negative control: theta 256, eight channels that turn, a window of six frames."""
    assert relative_to_official(golden_pipeline(**wrong)) > 1000 * ATOL


def test_other_actions_and_a_skipped_clean_pass_are_seen():
    """Negative control."""
    pipeline = golden_pipeline()
    swapped = dict(change=lambda given: Actions(given.keyboard, given.mouse.flip(-1)))
    for wrong in (swapped, dict(clean_pass=False)):
        assert relative_to_official(pipeline, **wrong) > 1000 * ATOL


def relative_to_official(pipeline, **wrong) -> float:
    """The largest difference over the first three chunks; the window is full in the third."""
    output, _ = golden_rollout(pipeline, 3, **wrong)
    return float((output - official()["output"][:, :, :9]).abs().max())


@pytest.mark.parametrize("case", ["same", "per_frame"])
def test_one_chunk_matches_official(case):
    """Per-frame timesteps, and what comes out of the parts."""
    io = load_golden(WHOLE, "forward.safetensors")
    model = golden_pipeline().diffusion_model.transformer
    encoder = ActionEncoder(ActionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER))
    state = model.initialize_cache(image_tokens=io["visual_context"], condition=io["cond_concat"])
    actions = Actions(io["keyboard_cond"], io["mouse_cond"])
    model.begin_step(0, state, encoder(actions, 0, ActionCache(image=None)))
    outputs = {}
    for name in ("patch_embedding", "blocks.0", "blocks.1", "blocks.2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
    flow = model.predict_flow(io["x"], io[f"{case}/timestep"], state)
    torch.testing.assert_close(flow, io[f"{case}/output"], atol=ATOL, rtol=0)
    for name, found in outputs.items():
        expected = io[f"{case}/intermediate/{name}"]
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    other = model.predict_flow(io["x"], io[f"{case}/timestep"] - 50, state)
    assert (other - io[f"{case}/output"]).abs().max() > 10 * ATOL


def module_of(name: str, **changes) -> ActionModule:
    module = ActionModule(tiny_config(**changes))
    module.load_state_dict(load_golden(MODULE, f"weights_{name}.safetensors"), strict=True)
    return module.requires_grad_(False)


def control_of(module: ActionModule, chunk: int, io, past: ActionCache, caches=(None, None)):
    """What the module reads in a chunk of 2 x 3 tokens per frame, from the actions so far."""
    has_mouse = hasattr(module, "mouse_core")
    columns = io["keyboard_cond"].shape[-1]
    encoder = ActionEncoder(
        ActionEncoderConfig(
            vae=TINY_VAE_IMAGE_ENCODER, keyboard_dim=columns, mouse_dim=2 if has_mouse else None
        )
    )
    actions = Actions(io["keyboard_cond"], io["mouse_cond"] if has_mouse else None)
    control = encoder(actions.part(pixel_frames(chunk)), chunk, past)
    frames = torch.arange(3 * chunk, 3 * chunk + 3)
    rotation = time_rotations(frames, 12, 8, 256.0)
    per_token = rotation.repeat_interleave(6, 0)
    mouse = control["mouse"].flatten(2).repeat_interleave(6, 1) if has_mouse else None
    keys = module.read_keyboard(control["keyboard"], rotation)
    return ActionControl(keys, mouse, per_token, *caches)


def new_cache(tokens: int, cursor: Cursor, core) -> KVCache:
    spec = KVCacheSpec(
        batch_size=1, sink_size_t=0, window_size_t=6, tokens_per_frame=tokens, num_heads=2,
        head_dim=12, dtype=torch.float32, device=CPU,
    )  # fmt: skip
    return core.new_cache(spec, cursor)


@pytest.mark.parametrize("name", ["both", "keyboard_only"])
@torch.no_grad()
def test_action_module_matches_official(name):
    io = load_golden(MODULE, f"io_{name}.safetensors")
    mouse = dict(mouse_dim=None, keyboard_dim=7) if name == "keyboard_only" else {}
    module = module_of(name, **mouse)
    cursors = [Cursor(0, 6, tokens) for tokens in (1, 6)]
    caches = [
        new_cache(1, cursors[0], module.keyboard_core),
        None if mouse else new_cache(6, cursors[1], module.mouse_core),
    ]
    past = ActionCache(image=None)
    for chunk in range(4):
        for cursor in cursors:
            cursor.begin_step(3, CPU)
        control = control_of(module, chunk, io, past, caches)
        for turn in ("pass0", "pass1"):
            found = module(io[f"chunk{chunk}/{turn}/x"], control)
            torch.testing.assert_close(found, io[f"chunk{chunk}/{turn}/y"], atol=ATOL, rtol=0)
        for part, held in zip("kv", caches[0].visible(), strict=True):
            expected = io[f"chunk{chunk}/pass1/keyboard_kv/{part}"]
            order = [cursors[0].slot_of(f) for f in sorted(cursors[0].frames)]
            found = held[:, order]
            torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=ATOL, rtol=0)
        for cursor in cursors:
            cursor.advance()


@pytest.mark.parametrize(
    ("file", "eps"), [("io_both", 1e-6), ("io_eps_probe", 1e-6), ("io_eps_probe", 1e-5)]
)
@torch.no_grad()
def test_action_module_without_a_cache_matches_official(file, eps, monkeypatch):
    """Tiny activations show the eps of the norms."""
    monkeypatch.setattr(action, "NORM_EPS", eps)
    io = load_golden(MODULE, f"{file}.safetensors")
    prefix = "bidirectional/" if file == "io_both" else ""
    module = module_of("both")
    if file == "io_eps_probe":
        module.mouse_mlp[2].weight.mul_(0.01)
        module.mouse_mlp[2].bias.mul_(0.01)
        module.mouse_attn_q.weight.mul_(0.003)
        module.keyboard_attn_kv.weight[:24].mul_(0.003)
    given = {name: io[f"{prefix}{name}"] for name in ("keyboard_cond", "mouse_cond")}
    found = module(io[f"{prefix}x"], control_of(module, 0, given, ActionCache(image=None)))
    error = (found - io[f"{prefix}y"]).abs().max()
    assert error < ATOL if eps == 1e-6 else error > 1000 * ATOL


def test_rotations_match_official():
    """At the real head size, to the end of the official table."""
    io = load_golden(MODULE, "rope.safetensors")
    table = time_rotations(io["positions"], 64, 8, 256.0)
    for part, name in enumerate(("cos", "sin")):
        found = table[..., part].repeat_interleave(2, 1)
        torch.testing.assert_close(found, io[name], atol=1e-6, rtol=0)
    frames = torch.arange(7, 10)  # a chunk that begins there
    rotation = time_rotations(frames, 64, 8, 256.0)
    for name in "qk":
        found = apply_rope(io[name], rotation)
        torch.testing.assert_close(found, io[f"{name}_at_frame7"], atol=ATOL, rtol=0)
    wrong = apply_rope(io["q"], time_rotations(frames, 64, 8, 10000.0))
    assert (wrong - io["q_at_frame7"]).abs().max() > 100 * ATOL


def test_windows_match_official():
    """Which pixel frames each latent frame sees."""
    expected = load_golden(MODULE, "action_window_index.safetensors")
    expected = expected["latent_frame_to_pixel_frames"]
    encoder = ActionEncoder(ActionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER, keyboard_dim=1))
    past, found = ActionCache(image=None), []
    for chunk in range(3):
        where = pixel_frames(chunk)
        numbers = torch.arange(where.start, where.stop).float()[:, None]
        control = encoder(Actions(numbers, numbers.expand(-1, 2)), chunk, past)
        found.append(control["keyboard"][0, :, :, 0])
    assert torch.equal(torch.cat(found).long(), expected)


@pytest.mark.parametrize("variant", ["universal", "temple_run"])
def test_actions_of_a_session_match_official(variant):
    """A chosen action fills all pixel frames of its chunk."""
    name = variant.replace("_", "")
    io = load_golden(MODULE, "interactive_actions.safetensors")
    given = []
    for chunk in range(4):
        where = pixel_frames(chunk)
        frames = where.stop - where.start
        keyboard = torch.nn.functional.one_hot(torch.tensor(chunk), KEYS[variant].keyboard_dim)
        mouse = torch.tensor([0.1 * (chunk + 1), -0.1 * chunk])
        given.append((keyboard.float().expand(frames, -1), mouse.expand(frames, -1)))
        so_far = torch.cat([k for k, _ in given])[None]
        assert torch.equal(so_far, io[f"{name}/chunk{chunk}/keyboard_given"])
    controller = ActionController(KEYS[variant])
    state = controller.new_state()
    keys = {"universal": "wsad", "temple_run": ["", "w", "s", "z"]}[variant]
    for chunk in range(4):
        where = pixel_frames(chunk)
        values = {"keys": keys[chunk]}
        if KEYS[variant].has_mouse:
            values["mouse"] = [0.1 * (chunk + 1), -0.1 * chunk]
        made = controller.advance(state, [Event(0, values)], range(where.start, where.stop))
        assert torch.equal(made.keyboard, given[chunk][0])
        if KEYS[variant].has_mouse:
            torch.testing.assert_close(made.mouse, given[chunk][1])


def test_bfloat16_stays_as_near_to_float32_as_the_official_code_does():
    """The official bfloat16 rollout differs by at most 0.06, 0.009 on average, without growth."""
    calls = load_golden(WHOLE, "rollout.safetensors")
    output, _ = golden_rollout(golden_pipeline(transformer=dict(dtype="bfloat16")))
    error = (output - calls["output"]).abs()
    assert 100 * ATOL < error.max() < 1.5 * 0.06 and error.mean() < 1.5 * 0.009
    by_chunk = error.unflatten(2, (CHUNKS, LEN_T)).mean((0, 1, 3, 4, 5))
    assert by_chunk[-1] < 2 * by_chunk[0]


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        (PIPELINE, [1000.0, 908.84271240234375, 713.97943115234375]),
        (TEMPLE_RUN_PIPELINE, [1000.0, 937.5, 833.33331298828125, 625.0]),
    ],
)
def test_timesteps_are_those_of_the_release(pipeline, expected):
    assert pipeline.diffusion_model.scheduler.setup().timesteps.tolist() == expected


FP8 = {"dtype": "bfloat16", "ffn_dim": 80, "precision": "fp8_gemm", "fp8_gemm_min_width": 16}


@pytest.mark.parametrize("changes", [{}, FP8])
@torch.no_grad()
def test_a_write_leaves_what_a_whole_pass_leaves(changes):
    """Also where the last block has an action module."""
    torch.manual_seed(0)
    model = MatrixGameTransformer(tiny_config(action_blocks=3, **changes)).cast().eval()
    model.after_load()
    assert bool(model.fp8_layers) == ("precision" in changes)
    state = model.initialize_cache(image_tokens=torch.randn(1, 5, 48))
    control = {name: torch.randn(x.shape) for name, x in model.example_control(1).items()}
    model.begin_step(0, state, control)
    latent, found = torch.randn(model.latent_shape(1)), []
    for write_only in (False, True):
        for layer in state.layers():
            layer.clear_chunk()
        call_network(model, latent, torch.tensor(0.0), state, write_only)
        found.append([x for layer in state.layers() for x in layer.read_chunk()])
    assert len(found[0]) == 2 * 9 and all(x.abs().max() > 0 for x in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
