"""Rotary embedding: official numbers, and what rotations must satisfy."""

import pytest
import torch

from flashdreams.attention.rope import (
    RotaryEmbedding3D,
    apply_rope,
    axis_frequencies,
    time_rotation,
)
from flashdreams.models.wan.blocks import timestep_embedding
from tests.goldens import load_golden

ATOL = 1e-5  # float32; the official code rotates in float64 and casts


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_frequencies_match_official(head_dim):
    golden = load_golden("b6_rope", "freqs.safetensors")
    parts = axis_frequencies(head_dim)
    assert [len(part) for part in parts] == golden[f"d{head_dim}/split_complex"].tolist()
    angles = torch.cat(parts)
    torch.testing.assert_close(angles, golden[f"d{head_dim}/angle_pos1_f64"], rtol=1e-12, atol=0)
    for position in (20, 500, 1023):
        cosines = golden[f"d{head_dim}/cos_pos{position}_f64"]
        torch.testing.assert_close((angles * position).cos(), cosines, rtol=0, atol=1e-12)
        assert not torch.allclose((angles * (position + 1)).cos(), cosines, atol=1e-3)


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("case", ["f1h2w3/start7", "f2h3w5/start100", "f3h4w4/start21"])
def test_rotation_matches_official(head_dim, case):
    golden = load_golden("b6_rope", "apply.safetensors")
    x, expected = (golden[f"d{head_dim}/{case}/{name}"] for name in "xy")
    sizes, start = case.split("/start")
    frames, height, width = (int(sizes[i]) for i in (1, 3, 5))
    rope = RotaryEmbedding3D(head_dim)
    table = rope(torch.arange(frames) + int(start), height, width, x.device)
    torch.testing.assert_close(apply_rope(x, table), expected, atol=ATOL, rtol=0)
    shifted = rope(torch.arange(frames) + int(start) + 1, height, width, x.device)
    assert (apply_rope(x, shifted) - expected).abs().max() > 100 * ATOL


@pytest.mark.parametrize("dim", [32, 256])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_timestep_embedding_matches_official(dim, kind):
    golden = load_golden("b6_rope", "timestep_embedding.safetensors")
    found = timestep_embedding(golden[f"dim{dim}/{kind}/timestep"], dim)
    torch.testing.assert_close(found, golden[f"dim{dim}/{kind}/embedding"], atol=1e-6, rtol=0)


def test_moving_a_key_in_time_equals_rotating_it_there():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 2, 16)
    rope = RotaryEmbedding3D(16)
    at, later = (rope(torch.tensor([f, f + 1]), 2, 3, x.device) for f in (3, 40))
    moved = apply_rope(apply_rope(x, at), time_rotation(37, 16))
    torch.testing.assert_close(moved, apply_rope(x, later), atol=ATOL, rtol=0)
    assert (apply_rope(x, at) - moved).abs().max() > 100 * ATOL


def test_scores_depend_on_differences_of_positions_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at: int, other: int) -> torch.Tensor:
        q_table, k_table = (time_rotation(position, 16) for position in (at, other))
        return (apply_rope(q, q_table) * apply_rope(k, k_table)).sum()

    torch.testing.assert_close(score(5, 2), score(905, 902), atol=ATOL, rtol=0)
    assert (score(5, 2) - score(5, 3)).abs() > 100 * ATOL


@pytest.mark.parametrize("head_dim", [0, 7])
def test_odd_head_sizes_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be even"):
        axis_frequencies(head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_form_is_the_same_function(dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 16).to(dtype)
    table = RotaryEmbedding3D(16)(torch.tensor([3, 9]), 2, 3, x.device)
    eager = apply_rope(x, table)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    compiled = apply_rope(x, table)
    ulp = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(compiled, eager, atol=ulp, rtol=0)
    assert eager.dtype == compiled.dtype == dtype and eager.is_contiguous()
