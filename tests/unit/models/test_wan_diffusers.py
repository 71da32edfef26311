"""The Wan transformer beside the public ``diffusers`` package (float32, atol 5e-5)."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.runtime.checkpoint import CheckpointConfig, load_checkpoint

ATOL = 5e-5
FRAMES, HEIGHT, WIDTH = 3, 6, 8

pytestmark = pytest.mark.slow  # the import of diffusers takes seconds


def build_peer(in_channels: int, image_dim: int | None):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    peer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 32,
    ).eval()
    for parameter in peer.parameters():  # every tensor must matter
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return peer


def load_ours(peer, folder, **overrides) -> WanTransformer:
    save_file(peer.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    model = WanTransformerConfig(
        dim=32,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        freq_dim=32,
        text_dim=24,
        len_t=FRAMES,
        latent_height=HEIGHT,
        latent_width=WIDTH,
        streaming=False,
        **overrides,
    ).setup()
    report = load_checkpoint(model, CheckpointConfig(source=str(folder)))
    assert report.key_map == "diffusers"
    return model.eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def test_text_to_video_matches_diffusers(tmp_path):
    peer = build_peer(16, None)
    model = load_ours(peer, tmp_path, text_len=12)
    latent, text = draw(2, 16, FRAMES, HEIGHT, WIDTH), draw(2, 12, 24)
    text[1, 7:] = 0
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    for timestep in (999.0, 417.0, 0.0):
        expected = peer(latent, torch.full((2,), timestep), text, return_dict=False)[0]
        found = model.predict_flow(latent, torch.tensor(timestep), cache)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)
        wrong = model.predict_flow(latent, torch.tensor(timestep + 9), cache)
        assert (wrong - expected).abs().max() > 50 * ATOL
        assert expected.std() > 0.1


@torch.no_grad()
def test_one_timestep_per_token_matches_diffusers(tmp_path):
    """As Wan 2.2's 5B model is given them: clean where the image stands, noisy elsewhere."""
    peer = build_peer(16, None)
    model = load_ours(peer, tmp_path, text_len=12)
    latent, text = draw(2, 16, FRAMES, HEIGHT, WIDTH), draw(2, 12, 24)
    tokens = FRAMES * HEIGHT * WIDTH // 4
    timesteps = torch.linspace(1, 200, 2 * tokens).reshape(2, tokens)  # the peer rounds angles
    timesteps[:, : tokens // FRAMES] = 0
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    expected = peer(latent, timesteps, text, return_dict=False)[0]
    found = model.predict_flow(latent, timesteps, cache)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)
    wrong = model.predict_flow(latent, timesteps.flip(1), cache)
    assert (wrong - expected).abs().max() > 50 * ATOL


@torch.no_grad()
def test_image_to_video_matches_diffusers(tmp_path):
    peer = build_peer(36, 20)
    model = load_ours(peer, tmp_path, condition_channels=20, image_dim=20)
    latent, text, image = draw(1, 16, FRAMES, HEIGHT, WIDTH), draw(1, 12, 24), draw(1, 257, 20)
    condition = draw(1, 20, FRAMES, HEIGHT, WIDTH)
    peer_input = torch.cat([latent, condition], dim=1)
    timestep = torch.tensor(500)

    def ours(tokens: torch.Tensor) -> torch.Tensor:
        cache = model.initialize_cache(text=text, image_tokens=tokens, condition=condition)
        model.begin_step(0, cache)
        return model.predict_flow(latent, timestep, cache)

    padded = F.pad(text, (0, 0, 0, 500))  # the peer takes the last 512 rows for the text
    expected = peer(peer_input, timestep[None], padded, image, return_dict=False)[0]
    torch.testing.assert_close(ours(image), expected, atol=ATOL, rtol=1e-5)
    assert (ours(image.flip(2)) - expected).abs().max() > 50 * ATOL
