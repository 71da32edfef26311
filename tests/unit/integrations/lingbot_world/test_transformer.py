"""The camera branch of the transformer; float32."""

from collections import Counter
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from flashdreams.infra.config import config_fields, derive_config
from flashdreams.integrations.lingbot_world.config import (
    PIPELINE,
    TAEHV_PIPELINE,
    TINY_PIPELINE,
    TRANSFORMER,
)
from flashdreams.integrations.lingbot_world.transformer import LingBotBlock, LingBotTransformer
from flashdreams.models.wan import fused
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from tests.kernels.conftest import switch_to_interpreter
from tests.manifests import load_manifest

ATOL = 1e-5
CAMERA_LAYERS = ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")
STEPS = 3


class BlockWithoutMemory(LingBotBlock):
    """Reads the camera again in every pass, as the formula is written down."""

    def read_camera(self, camera):
        return camera

    def inject(self, x, control):
        hidden = F.linear(control, self.cam_injector_layer1.weight, self.cam_injector_layer1.bias)
        hidden = self.cam_injector_layer2(hidden * hidden.sigmoid()) + control
        return (1 + self.cam_scale_layer(hidden)) * x + self.cam_shift_layer(hidden)


class TransformerWithoutMemory(LingBotTransformer):
    block_class = BlockWithoutMemory


def build(kind=LingBotTransformer, **overrides) -> LingBotTransformer:
    config = derive_config(TINY_PIPELINE.diffusion_model.transformer, **overrides)
    torch.manual_seed(3)
    return kind(config).requires_grad_(False).eval()


def inputs(config, batch: int = 1):
    draw = torch.Generator().manual_seed(4)
    shape = (batch, 16, config.len_t, config.latent_height, config.latent_width)
    return {
        "text": torch.randn(batch, 5, config.text_dim, generator=draw),
        "condition": torch.randn(batch, 20, 7, *shape[3:], generator=draw),
        "noise": [torch.randn(shape, generator=draw) for _ in range(STEPS)],
        "cameras": [
            torch.randn(
                1, config.len_t * config.tokens_per_frame, config.camera_dim, generator=draw
            )
            for _ in range(STEPS)
        ],
    }


def roll_out(model, given, passes: int = 4) -> list[torch.Tensor]:
    cache = model.initialize_cache(given["text"], condition=given["condition"])
    latents = []
    for i, (x, camera) in enumerate(zip(given["noise"], given["cameras"], strict=True)):
        model.begin_step(i, cache, camera)
        for step in range(passes):
            x = x - 0.2 * model.predict_flow(x, torch.tensor(900 - 200 * step), cache)
        model.update_cache(x, torch.tensor(0), cache)
        latents.append(x)
    return latents


@pytest.mark.parametrize(
    ("channels", "name"), [(6, "lingbot_world_fast"), (7, "lingbot_world_act")]
)
def test_parameters_are_exactly_those_of_the_manifest(channels, name):
    with torch.device("meta"):
        model = derive_config(TRANSFORMER, camera_channels=channels).setup()
    expected = {key: shape for key, (shape, _) in load_manifest(name).items()}
    assert {key: tuple(p.shape) for key, p in model.state_dict().items()} == expected
    size = 4 * sum(p.numel() for p in model.parameters())
    assert (TRANSFORMER.checkpoint.size_bytes == size) == (channels == 6)


def test_the_two_variants_differ():
    """Negative control of the comparison with manifests."""
    assert load_manifest("lingbot_world_fast") != load_manifest("lingbot_world_act")


@pytest.mark.parametrize("passes", [1, 4])
def test_camera_branch_runs_once_per_chunk_and_layer(passes):
    model, calls = build(), Counter()
    for name, module in model.named_modules():
        if name.endswith((*CAMERA_LAYERS, "wancamctrl")) or "c2ws" in name:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    roll_out(model, inputs(model.config), passes)
    assert len(calls) == 3 + len(CAMERA_LAYERS) * model.config.num_layers
    assert set(calls.values()) == {STEPS}


def test_result_equals_running_the_camera_branch_in_every_pass():
    given = inputs(build().config)
    expected = roll_out(build(TransformerWithoutMemory), given)
    for found, wanted in zip(roll_out(build(), given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


def test_camera_matters_to_its_own_chunk_and_later_ones():
    """Negative control of the equality above."""
    model, given = build(), inputs(build().config)
    before = roll_out(model, given)
    given["cameras"][1] = given["cameras"][1] + 0.1
    after = roll_out(model, given)
    changed = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    assert changed[0] == 0 and min(changed[1:]) > 10 * ATOL


def test_embedding_follows_its_formula():
    model = build()
    camera = inputs(model.config)["cameras"][0]
    read = []
    for block in model.blocks:
        block.read_camera = lambda tokens: read.append(tokens)
    control = model.embed_control(camera)
    embedded = model.patch_embedding_wancamctrl(camera)
    first = model.c2ws_hidden_states_layer1(embedded)
    expected = embedded + model.c2ws_hidden_states_layer2(first * first.sigmoid())
    assert control == [None] * model.config.num_layers and len(read) == model.config.num_layers
    for tokens in read:
        torch.testing.assert_close(tokens, expected, rtol=0, atol=ATOL)


def test_one_camera_serves_a_batch():
    model = build()
    given = inputs(model.config, batch=2)
    together = roll_out(model, given)
    second = {key: value[1:] for key, value in given.items() if key in ("text", "condition")}
    second |= {"noise": [x[1:] for x in given["noise"]], "cameras": given["cameras"]}
    for found, wanted in zip(together, roll_out(model, second), strict=True):
        torch.testing.assert_close(found[1:], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("camera", [None, torch.zeros(1, 84, 1535), torch.zeros(1, 83, 1536)])
def test_a_camera_that_does_not_fit_is_refused(camera):
    model = build()
    given = inputs(model.config)
    cache = model.initialize_cache(given["text"], condition=given["condition"])
    with pytest.raises(ValueError, match=r"must be \[B, latent frames \* 28, 1536\]"):
        model.begin_step(0, cache, camera)


BIDIRECTIONAL = dict(streaming=False, len_t=6, window_size_t=6, sink_size_t=0)


def test_bidirectional_blocks_read_the_camera_in_every_pass():
    """The same numbers as with scales and shifts that are kept; only the memory differs."""
    model = build(**BIDIRECTIONAL)
    given = inputs(model.config)
    cache = model.initialize_cache(given["text"], condition=given["condition"])
    model.begin_step(0, cache, given["cameras"][0])
    x, timestep = given["noise"][0], torch.tensor(900)
    found = model.predict_flow(x, timestep, cache)
    assert cache.inputs.control.shape == (1, 6 * 28, 48)
    kept = [block.read_camera(cache.inputs.control) for block in model.blocks]
    model.block_controls = lambda *_: kept
    assert torch.equal(model.predict_flow(x, timestep, cache), found)
    model.block_controls = lambda *_: kept[::-1]  # negative control
    assert (model.predict_flow(x, timestep, cache) - found).abs().max() > 10 * ATOL


def test_without_a_camera_a_bidirectional_model_is_wans():
    model = build(**BIDIRECTIONAL)
    values = {name: getattr(model.config, name) for name in config_fields(WanTransformerConfig)}
    wan = WanTransformer(WanTransformerConfig(**values)).requires_grad_(False).eval()
    wan.load_state_dict(model.state_dict(), strict=False)
    given, flows = inputs(model.config), []
    for network, camera in ((model, None), (wan, None), (model, given["cameras"][0])):
        cache = network.initialize_cache(given["text"], condition=given["condition"])
        network.begin_step(0, cache, camera)
        flows.append(network.predict_flow(given["noise"][0], torch.tensor(900), cache))
    assert torch.equal(flows[0], flows[1])
    assert (flows[2] - flows[1]).abs().max() > 10 * ATOL  # negative control


def test_wans_own_control_is_refused():
    with pytest.raises(ValueError, match="leave it None and set camera_channels"):
        derive_config(TRANSFORMER, control_dim=4)


def test_schedule_has_two_tables():
    scheduler = PIPELINE.diffusion_model.scheduler.setup()
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [999, 978, 947, 825]
    for found, expected in (
        (scheduler.sigmas, [0.999900, 0.978971, 0.947909, 0.825853]),
        (scheduler.renoise_sigmas, [0.999800, 0.978830, 0.947693, 0.825193]),
    ):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_windows_and_sizes_are_the_published_ones():
    for pipeline, window, sink in ((PIPELINE, 63, 0), (TAEHV_PIPELINE, 15, 3)):
        c = pipeline.diffusion_model.transformer
        assert (c.window_size_t, c.sink_size_t, c.len_t, c.relative_rope) == (
            window,
            sink,
            3,
            False,
        )
        assert (8 * c.latent_height, 8 * c.latent_width) == (464, 832)
        assert pipeline.diffusion_model.guidance_scale is None
        assert pipeline.encoder.len_t == c.len_t and pipeline.encoder.patch_size == 2


def test_bfloat16_stays_near_float32():
    """Storage as in the full model; errors of the latents of three AR steps, the largest relative
    to the largest latent, and in the mean: nearer than without the float32 residual."""
    given = inputs(build().config)
    exact = torch.stack(roll_out(build(), given))

    def rollout(**overrides) -> torch.Tensor:
        return torch.stack(roll_out(build(dtype="bfloat16", **overrides).cast(), given)) - exact

    wide, narrow = rollout(), rollout(residual_dtype=None)
    assert wide.abs().max() < 0.02 * exact.abs().max()
    assert 0 < wide.norm() < 0.9 * narrow.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({}, 1e-5), ({"dtype": "bfloat16", "residual_dtype": "float32"}, 2e-2)],
)
def test_fused_kernels_take_the_camera_in(changes, tolerance, monkeypatch):
    """Interpreted. Largest difference as a share of the largest latent; bf16 is truncated there."""
    pytest.importorskip("triton")
    changes = {"latent_height": 4, "latent_width": 6, **changes}
    plain = build(**changes)
    given = inputs(plain.config)
    plain.cast()
    (expected,) = roll_out(plain, given, 1)[-1:]
    model = build(fused_kernels=True, **changes)
    model.cast()
    model.after_load()
    switch_to_interpreter(monkeypatch)
    kernel = MagicMock(wraps=fused.gate_residual)
    monkeypatch.setattr(fused, "gate_residual", kernel)
    (result,) = roll_out(model, given, 1)[-1:]
    with_camera = [call for call in kernel.call_args_list if len(call.args) == 5]
    blocks = STEPS * (2 * model.config.num_layers - 1)  # the clean pass ends within the last block
    assert len(with_camera) == blocks
    bound = tolerance * expected.abs().max()
    assert (result - expected).abs().max() < bound
    for block in model.blocks:
        block.cam_shift_layer.bias.add_(1.0)
    (moved,) = roll_out(model, given, 1)[-1:]
    assert (moved - expected).abs().max() > bound
