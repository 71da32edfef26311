"""Rollouts of the variants against windows that are plain lists of frames (float32)."""

from functools import partial

import pytest
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.integrations.matrix_game.config import (
    GTA_DRIVE_PIPELINE,
    PIPELINE,
    TEMPLE_RUN_PIPELINE,
    TINY_PIPELINE,
)
from flashdreams.integrations.matrix_game.encoder import Actions
from flashdreams.integrations.matrix_game.transformer import KEYBOARD_CACHE, MOUSE_CACHE
from flashdreams.models.wan.config import TINY_VAE_IMAGE_ENCODER
from flashdreams.models.wan.transformer import SELF_ATTENTION
from tests.listed_window import Layer, Window

ATOL = 1e-5
CHUNKS, LEN_T = 5, 3
CASES = {
    "gta": (GTA_DRIVE_PIPELINE, {}),
    "temple run": (TEMPLE_RUN_PIPELINE, {}),
    "universal, a window that no chunk divides": (PIPELINE, dict(window_size_t=7)),
}
CLEAN = torch.zeros(1, dtype=torch.float64)


def build(case: str):
    """The literal of a variant at toy size, with weights that tell."""
    shipped, changes = CASES[case]
    variant = shipped.diffusion_model.transformer
    kept = ("keyboard_dim", "mouse_dim", "window_size_t")
    fields = {name: getattr(variant, name) for name in kept} | changes
    transformer = derive_config(TINY_PIPELINE.diffusion_model.transformer, **fields)
    config = derive_config(
        shipped,
        image_encoder=None,
        decoder=None,
        encoder=dict(vae=TINY_VAE_IMAGE_ENCODER),
        diffusion_model=dict(transformer=transformer),
    )
    built = config.setup(device="cpu")
    torch.manual_seed(1)
    for parameter in built.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(index: int, step: int, shape) -> Tensor:
    return draw(100 * index + step, *shape)


def given(config) -> dict[str, Tensor]:
    """Tokens, condition and actions of a whole rollout."""
    c, frames = config, CHUNKS * LEN_T
    size = (c.condition_channels, frames, c.latent_height, c.latent_width)
    found = {"tokens": draw(1, 1, c.image_len, c.image_dim), "condition": draw(2, 1, *size)}
    found["keyboard"] = draw(3, 4 * frames, c.keyboard_dim).gt(0).float()
    if c.mouse_dim is not None:
        found["mouse"] = 0.3 * draw(4, 4 * frames, c.mouse_dim)
    return found


def streamed(pipeline) -> Tensor:
    told = given(pipeline.diffusion_model.transformer.config)
    cache = pipeline.initialize_cache(
        image_tokens=told["tokens"], condition=told["condition"], noise=noise
    )
    actions, latents = Actions(told["keyboard"], told.get("mouse")), []
    for index in range(CHUNKS):
        first = 12 * index - 3 if index else 0
        chunk = actions.part(slice(first, 12 * index + 9))
        latents.append(pipeline.generate(index, cache, chunk))
        pipeline.finalize(index, cache)
    return torch.cat(latents, 2)


def by_hand(pipeline, local: int | None = None, lag: int = 0) -> Tensor:
    """Every cache is a list; latent frame f sees the actions of pixel frames 4f - 12 to 4f - 1."""
    net, scheduler = pipeline.diffusion_model.transformer, pipeline.diffusion_model.scheduler
    c, told = net.config, given(net.config)
    state = net.initialize_cache(image_tokens=told["tokens"], condition=told["condition"])
    window = Window(0, local or c.window_size_t)

    def layers(count: int, tokens: int) -> list[Layer]:
        return [Layer(window, tokens, relative=False) for _ in range(count)]

    state.caches = {
        SELF_ATTENTION: layers(c.num_layers, c.tokens_per_frame),
        KEYBOARD_CACHE: layers(c.action_blocks, 1),
    }
    if c.mouse_dim is not None:
        state.caches[MOUSE_CACHE] = layers(c.action_blocks, c.tokens_per_frame)
    latents = []
    for index in range(CHUNKS):
        frames = list(range(LEN_T * index, LEN_T * index + LEN_T))
        window.admit(frames)
        seen = torch.tensor([[4 * f - 12 + i + lag for i in range(12)] for f in frames])
        control = {
            name: told[name][seen.clamp(min=0)][None]
            for name in ("keyboard", "mouse")
            if name in told
        }
        inputs = net.inputs_at(state, torch.tensor(frames), control)

        def call(latent: Tensor, timestep: Tensor, inputs=inputs) -> Tensor:
            return net(latent, net.modulations(timestep.double().reshape(1)), inputs, state)

        drawn = partial(noise, index, shape=net.latent_shape(1))
        latents.append(scheduler.sample(call, drawn))
        call(latents[-1], CLEAN)
    return torch.cat(latents, 2)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_variants_equal_lists_of_frames(case):
    pipeline = build(case)
    found = streamed(pipeline)
    torch.testing.assert_close(found, by_hand(pipeline), atol=ATOL, rtol=0)
    for wrong in (dict(local=pipeline.diffusion_model.transformer.config.window_size_t + 1),
                  dict(lag=1)):  # fmt: skip
        assert (by_hand(pipeline, **wrong) - found).abs().max() > 100 * ATOL  # negative control


def test_a_batch_of_image_tokens_is_a_batch_of_rollouts():
    """Also where neither a prompt nor an image states the number of videos."""
    pipeline, count = build("gta"), 2
    c = pipeline.diffusion_model.transformer.config
    tokens = draw(1, count, c.image_len, c.image_dim)
    condition = draw(2, count, c.condition_channels, LEN_T, c.latent_height, c.latent_width)
    drawn = draw(3, count, *pipeline.diffusion_model.transformer.latent_shape(1)[1:])
    actions = Actions(torch.ones(9, c.keyboard_dim), torch.zeros(9, 2))

    def latents(part: slice) -> Tensor:
        cache = pipeline.initialize_cache(
            image_tokens=tokens[part], condition=condition[part], noise=lambda *_: drawn[part]
        )
        return pipeline.generate(0, cache, actions)

    both, first, second = latents(slice(None)), latents(slice(1)), latents(slice(1, None))
    torch.testing.assert_close(both, torch.cat([first, second]), atol=ATOL, rtol=0)
    assert (first - second).abs().max() > 100 * ATOL  # negative control
