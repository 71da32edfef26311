"""A 16-bit Wan transformer whose residual is float32, against a float32 network under autocast.

Errors are root mean squares relative to those of what is compared with.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdreams.infra.component import build_component, load_component
from flashdreams.infra.weights import memory_estimate, weight_nbytes
from flashdreams.models.wan.blocks import timestep_embedding
from flashdreams.models.wan.transformer import (
    RESIDUAL_PARAMETERS,
    WanTransformer,
    WanTransformerConfig,
)
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_pipeline, tiny_transformer

BFLOAT16 = {"dtype": "bfloat16"}
WIDE = {"dtype": "bfloat16", "residual_dtype": "float32"}
SIZES = dict(
    dim=48,
    ffn_dim=96,
    num_heads=2,
    num_layers=4,
    latent_height=8,
    latent_width=8,
    streaming=False,
    window_size_t=2,
)
DEEP = {**SIZES, "dim": 192, "ffn_dim": 768, "num_heads": 3, "num_layers": 30}


def build(seed: int = 0, **overrides) -> WanTransformer:
    """Random weights that hand on the size of what they get."""
    model = WanTransformer(tiny_transformer(**overrides))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):
            parameter = nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=draw)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=draw)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, mean=1, std=0.1, generator=draw)
        else:
            nn.init.normal_(parameter, std=0.02, generator=draw)
    return model.cast().requires_grad_(False).eval()


def inputs(model: WanTransformer, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + seed)
    latent = torch.randn(model.latent_shape(1), generator=draw)
    return latent, torch.tensor(625.0), torch.randn(1, 4, TEXT_DIM, generator=draw)


def predict(model: WanTransformer, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    return model.predict_flow(latent, timestep, cache)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None):
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rotated(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turns = torch.view_as_complex(table.double())[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def under_autocast(
    model: WanTransformer, latent: Tensor, timestep: Tensor, text: Tensor, official: bool = True
) -> Tensor:
    """The flow of a bidirectional float32 model under autocast.

    Two roundings of the official code are not this project's: of the first block's norms, as the
    tokens that come in are bfloat16; and of queries and keys after their rotation alone, as the
    weights of their norms are float32.

    Args:
        model: with float32 weights.
        latent: see ``predict_flow``, as for the others.
        timestep: the same for all frames.
        text: of one prompt.
        official: False leaves the two out.

    Source: Wan-Video/Wan2.1, wan/modules/model.py.
    """
    c = model.config

    def heads(x: Tensor, norm: nn.Module) -> Tensor:
        weight = norm.weight if official else norm.weight.bfloat16()
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=c.eps).to(x.dtype) * weight
        return normed.unflatten(-1, (-1, c.head_dim))

    def block(x: Tensor, b: nn.Module) -> Tensor:
        e = (b.modulation + projected).unbind(1)
        y = layer_norm(x, c.eps).float() * (1 + e[1]) + e[0]
        own, other = b.self_attn, b.cross_attn
        q, k = rotated(heads(own.q(y), own.norm_q), table), heads(own.k(y), own.norm_k)
        v = own.v(y).unflatten(-1, (-1, c.head_dim))
        x = x + own.o(attend(q, rotated(k, table), v)) * e[2]
        q = heads(other.q(layer_norm(x, c.eps, b.norm3.weight, b.norm3.bias)), other.norm_q)
        k = heads(other.k(words), other.norm_k)
        x = x + other.o(attend(q, k, other.v(words).unflatten(-1, (-1, c.head_dim))))
        return x + b.ffn(layer_norm(x, c.eps).float() * (1 + e[4]) + e[3]) * e[5]

    with torch.autocast("cpu", torch.bfloat16):
        patches = model.patch_embedding(latent)
        words = model.text_embedding(F.pad(text, (0, 0, 0, c.text_len - text.shape[1])))
        table = model.rope(torch.arange(c.len_t), *patches.shape[3:], torch.device("cpu"))
        with torch.autocast("cpu", enabled=False):
            embedded = model.time_embedding(timestep_embedding(timestep, c.freq_dim))
            projected = model.time_projection(embedded).view(1, 6, c.dim)
        x = patches.flatten(2).transpose(1, 2).to(patches.dtype if official else torch.float32)
        for b in model.blocks:
            x = block(x, b)
        with torch.autocast("cpu", enabled=False):
            shift, scale = (model.head.modulation + embedded).unbind(1)
            x = model.head.head(layer_norm(x, c.eps) * (1 + scale) + shift)
    assert x.dtype == torch.float32
    return model.unpatchify(x, *patches.shape[2:])


def flows(sizes: dict, seeds: int) -> dict[str, Tensor]:
    """One step of networks of several seeds, by all who compute it."""
    found: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        model = build(seed, **sizes)
        given = inputs(model, seed)
        flows = {
            "exact": predict(model, *given),
            "official": under_autocast(model, *given),
            "autocast": under_autocast(model, *given, official=False),
            "wide": predict(build(seed, **sizes, **WIDE), *given),
            "narrow": predict(build(seed, **sizes, **BFLOAT16), *given),
        }
        for name, flow in flows.items():
            found.setdefault(name, []).append(flow)
    return {name: torch.stack(parts) for name, parts in found.items()}


@torch.no_grad()
def test_it_is_the_arithmetic_of_autocast():
    """Tolerances in units of the error that autocast makes; negative control: without it."""
    of = flows(SIZES, seeds=4)
    error = difference(of["official"], of["exact"])
    assert 2e-3 < error < 1e-2
    assert difference(of["wide"], of["autocast"]) < 0.3 * error
    assert difference(of["wide"], of["official"]) < 0.9 * error
    assert difference(of["wide"], of["exact"]) < 1.2 * error
    for other in ("autocast", "official", "exact"):
        assert difference(of["narrow"], of[other]) > 1.3 * error


@pytest.mark.slow
@torch.no_grad()
def test_at_depth_it_has_the_error_of_autocast():
    """30 blocks of width 192; tolerances and negative control as above."""
    of = flows(DEEP, seeds=2)
    names = ("official", "wide", "narrow")
    error, wide, narrow = (difference(of[name], of["exact"]) for name in names)
    print(f"to float32: official {error:.5f}, wide {wide:.5f}, narrow {narrow:.5f}")
    assert difference(of["wide"], of["official"]) < error
    assert wide < 1.2 * error
    assert narrow > 1.8 * error


@torch.no_grad()
def roll_out(model: WanTransformer, steps: int = 4) -> Tensor:
    """Latents of a streaming rollout past the end of its window."""
    draw = torch.Generator().manual_seed(1)
    cache = model.initialize_cache(text=torch.randn(1, 4, TEXT_DIM, generator=draw))
    latents: list[Tensor] = []
    for step in range(steps):
        control = torch.randn(1, 8, CONTROL_DIM, generator=draw)
        x = torch.randn(model.latent_shape(1), generator=draw)
        model.begin_step(step, cache, control)
        x = x - 0.5 * model.predict_flow(x, torch.tensor(900.0), cache)
        x = x - 0.5 * model.predict_flow(x, torch.tensor(450.0), cache)
        model.update_cache(x, torch.tensor(0.0), cache)
        latents.append(x)
    return torch.cat(latents, dim=2)


def test_with_float32_throughout_no_bit_changes():
    plain = roll_out(build(control_dim=CONTROL_DIM))
    assert torch.equal(roll_out(build(control_dim=CONTROL_DIM, residual_dtype="float32")), plain)
    narrow = roll_out(build(control_dim=CONTROL_DIM, **BFLOAT16))
    assert not torch.equal(roll_out(build(control_dim=CONTROL_DIM, **WIDE)), narrow)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_cache_dtype": "int8"},
        {"precision": "fp8"},
        {"relative_rope": True},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_a_rollout_errs_less_with_it(changes):
    """Relative to float32 with the same changes."""
    sizes = {**SIZES, "streaming": True, "window_size_t": 3, "control_dim": CONTROL_DIM}
    sizes |= {"latent_height": 4, "latent_width": 4, **changes}
    exact = roll_out(build(**{**sizes, "dtype": "float32"}))
    wide, narrow = (difference(roll_out(build(**{**o, **sizes})), exact) for o in (WIDE, BFLOAT16))
    assert 1e-5 < wide < 0.8 * narrow


WIDE_PARTS = {"time_embedding", "time_projection", "head", "modulation", "norm3"}


def is_wide(name: str) -> bool:
    return bool(WIDE_PARTS & set(name.split(".")))


def test_every_pattern_names_parameters_and_nothing_else_is_wide():
    model = build(control_dim=CONTROL_DIM, image_dim=6, **WIDE)
    names = [name for name, _ in model.named_parameters()]
    assert all(any(p.fullmatch(name) for name in names) for p in RESIDUAL_PARAMETERS)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    wanted = {n: torch.float32 if is_wide(n) else torch.bfloat16 for n in names}
    assert dtypes == wanted and len(set(wanted.values())) == 2


@pytest.mark.parametrize("overrides", [WIDE, BFLOAT16], ids=["wide", "narrow"])
def test_what_is_wide_is_read_as_it_stands_in_the_file(overrides, tmp_path):
    saved, path = build(), str(tmp_path / "model.safetensors")
    save_file(saved.state_dict(), path)
    config = replace(tiny_transformer(**overrides), checkpoint=CheckpointConfig(source=path))
    model = build_component(config)
    load_component(model, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        written = saved.get_parameter(name)
        as_in_file = torch.equal(parameter.float(), written)
        assert as_in_file == (is_wide(name) and overrides is WIDE)
        assert as_in_file or torch.equal(parameter, written.bfloat16())


def test_the_estimate_counts_what_is_wide():
    model = build(**WIDE)
    counted = weight_nbytes(model)
    assert counted == sum(p.nbytes for p in model.parameters())
    sizes = dict(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30, **BFLOAT16)
    narrow = memory_estimate(tiny_pipeline(**sizes))
    wide = memory_estimate(tiny_pipeline(residual_dtype="float32", **sizes))
    assert "transformer 2.8 GB in bfloat16, KV" in narrow
    assert "transformer 2.9 GB in bfloat16 and float32, KV" in wide


def test_a_narrower_residual_is_refused():
    with pytest.raises(ValueError, match="residual_dtype='bfloat16' is unknown; allowed are 'flo"):
        WanTransformerConfig(residual_dtype="bfloat16")
