"""The Wan transformer against numbers of the official code (float32, atol 5e-5)."""

import pytest
import torch

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from tests.goldens import load_golden

ATOL = 5e-5


def tiny_config(**overrides) -> WanTransformerConfig:
    sizes = dict(
        dim=64, ffn_dim=144, num_heads=2, num_layers=3, freq_dim=32, text_dim=64, text_len=16
    )
    return WanTransformerConfig(**{**sizes, **overrides})


def load_tiny(folder: str, **overrides) -> WanTransformer:
    model = WanTransformer(tiny_config(**overrides))
    model.load_state_dict(load_golden(folder, "weights.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_bidirectional_forward_matches_official(case):
    io = load_golden("b1_wan21_t2v_tiny", "io.safetensors")
    x = io[f"{case}/x"]
    _, _, frames, rows, columns = x.shape
    model = load_tiny(
        "b1_wan21_t2v_tiny",
        len_t=frames,
        latent_height=rows,
        latent_width=columns,
        streaming=False,
    )
    cache = model.initialize_cache(text=io[f"{case}/context"])
    model.begin_step(0, cache)
    flow = model.predict_flow(x, io[f"{case}/timestep"][0], cache)
    torch.testing.assert_close(flow, io[f"{case}/output"], atol=ATOL, rtol=0)

    wrong = model.predict_flow(x, io[f"{case}/timestep"][0] - 50, cache)
    assert (wrong - io[f"{case}/output"]).abs().max() > 10 * ATOL


@torch.no_grad()
def test_streaming_rollout_matches_official_self_forcing():
    inputs = load_golden("b2_self_forcing_tiny", "inputs.safetensors")
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    model = load_tiny("b2_self_forcing_tiny", len_t=3, latent_height=8, latent_width=8)
    cache = model.initialize_cache(text=inputs["prompt_embeds"])
    for index in range(20):
        chunk, step = divmod(index, 5)
        noisy = calls[f"call{index:02d}/noisy"].transpose(1, 2)
        timestep = calls["call_timestep"][index].float()
        if step == 0:
            model.begin_step(chunk, cache)
        if step < 4:
            flow = model.predict_flow(noisy, timestep, cache).transpose(1, 2)
            torch.testing.assert_close(flow, calls[f"call{index:02d}/flow"], atol=ATOL, rtol=0)
        else:
            model.update_cache(noisy, timestep, cache)
