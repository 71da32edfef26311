"""The streaming Wan transformer against one masked forward over the whole sequence.

float32; atol 1e-5 on outputs of order one.
"""

import pytest
import torch
import torch.nn.functional as F

from flashdreams.infra.config import derive_config
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from tests.goldens import load_golden
from tests.tiny import call_network

ATOL = 1e-5
FRAMES = 12

# (window without sink, sink, chunk); -1 is a window that nothing leaves.
COMBINATIONS = [
    (-1, 0, 3), (6, 0, 3), (5, 0, 3), (3, 3, 3), (5, 1, 3), (4, 2, 3), (3, 4, 3),
    (4, 0, 2), (5, 1, 2), (2, 3, 2), (5, 0, 1), (3, 2, 1), (1, 0, 1), (4, 1, 4), (5, 3, 4),
]  # fmt: skip


def build(**overrides) -> WanTransformer:
    torch.manual_seed(5)
    sizes = dict(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=3,
        freq_dim=16,
        text_dim=8,
        text_len=4,
        in_channels=4,
        out_channels=4,
        latent_height=4,
        latent_width=4,
    )
    model = WanTransformerConfig(**{**sizes, **overrides}).setup().requires_grad_(False)
    for parameter in model.parameters():  # attention must matter
        if parameter.ndim > 1:
            parameter.mul_(1.5)
    return model


def frame_mask(frames: int, chunk: int, window: int, sink: int) -> torch.Tensor:
    """``[frames, frames]``: which keys (columns) a query (row) sees, all counted in frames."""
    end = (torch.arange(frames) // chunk + 1)[:, None] * chunk
    key = torch.arange(frames)[None]
    mask = key < end
    if window >= 0:
        mask = mask & ((key < sink) | (key >= end - window))
    return mask


def masked_forward(model: WanTransformer, latent, text, timestep, mask) -> torch.Tensor:
    """All frames at once, through the same weights and a mask over tokens."""
    frames = latent.shape[2]
    config = derive_config(
        model.config, streaming=False, len_t=frames, sink_size_t=0, window_size_t=frames
    )
    whole = config.setup()
    whole.load_state_dict(model.state_dict())
    tokens = config.tokens_per_frame
    token_mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def backend(q, k, v, *, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, token_mask, scale=scale).transpose(1, 2)

    for block in whole.blocks:
        block.self_attn.core.backend = backend
    cache = whole.initialize_cache(text=text)
    whole.begin_step(0, cache)
    with torch.no_grad():
        return call_network(whole, latent, timestep, cache)


def streamed(model: WanTransformer, latent, text, timestep) -> torch.Tensor:
    cache = model.initialize_cache(text=text)
    outputs = []
    for index, chunk in enumerate(latent.split(model.config.len_t, dim=2)):
        model.begin_step(index, cache)
        noisy = chunk + index + 1  # overwritten by the clean pass, so it must not show
        model.predict_flow(noisy, torch.tensor(900.0), cache)
        outputs.append(call_network(model, chunk, timestep, cache))
        model.update_cache(chunk, timestep, cache)
    return torch.cat(outputs, dim=2)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    latent = torch.randn(2, 4, FRAMES, 4, 4, generator=generator)
    return latent, torch.randn(2, 3, 8, generator=generator), torch.tensor(0.0)


@pytest.mark.parametrize(("window", "sink", "chunk"), COMBINATIONS)
@torch.no_grad()
def test_streaming_equals_one_masked_forward(window, sink, chunk):
    size = FRAMES if window < 0 else window
    model = build(len_t=chunk, window_size_t=size, sink_size_t=sink)
    mask = frame_mask(FRAMES, chunk, window, sink)
    found = streamed(model, *inputs())
    torch.testing.assert_close(found, masked_forward(model, *inputs(), mask), atol=ATOL, rtol=0)
    assert found.std() > 0.1


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (5, 2), (4, 1)])
@torch.no_grad()
def test_another_mask_is_another_function(window, sink):
    """Negative control: one frame more or less in window or sink shows."""
    model = build(len_t=3, window_size_t=5, sink_size_t=1)
    found = streamed(model, *inputs())
    other = masked_forward(model, *inputs(), frame_mask(FRAMES, 3, window, sink))
    assert (found - other).abs().max() > 50 * ATOL


@pytest.mark.parametrize(
    ("name", "frames", "chunk", "window", "sink"),
    [
        ("blockwise_F6_S4_B1", 6, 1, -1, 0),
        ("blockwise_F6_S4_B3", 6, 3, -1, 0),
        ("blockwise_F9_S4_B3_local6", 9, 3, 6, 0),
    ],
)
def test_the_mask_is_the_official_one(name, frames, chunk, window, sink):
    golden = load_golden("b2_self_forcing_tiny", "masks.safetensors")[name].bool()
    tokens = len(golden) // frames
    mask = frame_mask(frames, chunk, window, sink)
    assert torch.equal(mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1), golden)


@torch.no_grad()
def test_one_timestep_per_frame_equals_one_for_all():
    model = build(len_t=3, window_size_t=6)
    latent, text, _ = inputs()
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    one = model.predict_flow(latent[:, :, :3], torch.tensor(500.0), cache)
    each = model.predict_flow(latent[:, :, :3], torch.full((2, 3), 500.0), cache)
    torch.testing.assert_close(one, each, atol=ATOL, rtol=0)
    mixed = model.predict_flow(latent[:, :, :3], torch.tensor([[0.0, 500.0, 500.0]] * 2), cache)
    assert (mixed - each).abs().max() > 50 * ATOL


@torch.no_grad()
def test_one_timestep_per_token_equals_one_per_frame():
    model = build(len_t=3, window_size_t=6)
    latent, text, _ = inputs()
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    frames = torch.tensor([[0.0, 500.0, 900.0], [900.0, 0.0, 300.0]])
    expected = model.predict_flow(latent[:, :, :3], frames, cache)
    tokens = frames.repeat_interleave(4, dim=1)
    found = model.predict_flow(latent[:, :, :3], tokens, cache)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    tokens[0, 5] += 200  # one token of the second frame
    mixed = model.predict_flow(latent[:, :, :3], tokens, cache)
    assert (mixed - expected).abs().max() > 50 * ATOL
    for count in (5, 6):  # 6 divides the tokens, and is neither of frames nor of tokens
        with pytest.raises(ValueError, match=f"{count} timesteps do not fit a chunk of 12 tokens"):
            model.predict_flow(latent[:, :, :3], torch.zeros(2, count), cache)


@torch.no_grad()
def test_the_condition_follows_the_position_and_its_last_frame_is_held():
    model = build(len_t=2, window_size_t=4, condition_channels=3)
    condition = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    cache = model.initialize_cache(text=inputs()[1], condition=condition)
    for index, expected in enumerate([(0, 1), (2, 2), (2, 2)]):
        model.begin_step(index, cache)
        assert torch.equal(cache.inputs.condition, condition[:, :, list(expected)])
        model.update_cache(inputs()[0][:, :, :2], torch.tensor(0.0), cache)


@torch.no_grad()
def test_x0_networks_give_the_flow_of_their_prediction():
    model = build(len_t=2, window_size_t=4, prediction="x0")
    latent, text, _ = inputs()
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    noisy = latent[:, :, :2]
    for shape in ((), (2,), (2, 2), (2, 8)):  # for all, per entry, per frame, per token
        timestep = torch.linspace(100, 900, max(1, torch.Size(shape).numel())).reshape(shape)
        x0 = call_network(model, noisy, timestep, cache)
        flow = model.predict_flow(noisy, timestep, cache)
        sigma = timestep.reshape(*shape, *[1] * (2 - len(shape))) / 1000
        of_tokens = sigma.expand(2, 8) if sigma.shape[1] != 2 else sigma.repeat_interleave(4, 1)
        pixels = of_tokens.reshape(2, 1, 2, 2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        torch.testing.assert_close(noisy - pixels * flow, x0, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(dim=25), "dim=25 over num_heads=2 must give an even head size"),
        (dict(latent_height=5), "latent_height=5 is not a multiple of the patch size 2.*4, 6"),
        (dict(patch_size=(2, 2, 2)), "patch_size=.*a token covers one latent frame"),
        (dict(latent_width=1), "latent_width=1 is not a multiple of the patch size 2.*2, 4"),
        (dict(len_t=4, window_size_t=3), "window_size_t=3 must hold the current chunk of len_t=4"),
        (dict(len_t=4, window_size_t=3, shot_sink_size_t=2), "pinned .*; use at least 6"),
        (dict(sink_size_t=-1), "sink_size_t=-1 must be at least 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_prompts_of_the_wrong_size_are_refused():
    model = build(len_t=3, window_size_t=6)
    for shape in ((1, 3, 9), (1, 5, 8), (3, 8)):
        with pytest.raises(ValueError, match=r"at most 4, 8\]; got"):
            model.initialize_cache(text=torch.zeros(shape))
    with pytest.raises(ValueError, match="takes no image tokens"):
        model.initialize_cache(text=torch.zeros(1, 3, 8), image_tokens=torch.zeros(1, 2, 8))
    cache = model.initialize_cache(text=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="takes no control input"):
        model.begin_step(0, cache, torch.zeros(1, 12, 4))
    with pytest.raises(ValueError, match="call begin_step first"):
        call_network(model, torch.zeros(1, 4, 3, 4, 4), torch.tensor(0.0), cache)
