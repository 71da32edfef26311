"""Tiny Wan rollouts, the same on every rank, for comparing numbers of ranks."""

from functools import cache

import torch
from torch import Tensor

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel.mesh import Mesh, ParallelConfig, build_mesh, resolve_degrees
from flashdreams.parallel.parallelize import parallelize

TINY = {
    "dim": 48,
    "ffn_dim": 72,
    "num_heads": 6,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "freq_dim": 16,
    "text_dim": 12,
    "text_len": 5,
    "len_t": 2,
    "latent_height": 6,
    "latent_width": 10,
    "window_size_t": 4,
}

CASES: dict[str, dict] = {
    "window": {},
    "sink": {"sink_size_t": 1},
    "relative_rope": {"sink_size_t": 3, "relative_rope": True},
    "control": {"control_dim": 7},
    "bidirectional": {"streaming": False},
    "image": {"image_dim": 10, "condition_channels": 3, "sink_size_t": 1},
    "per_frame_timesteps": {"per_frame": True},
    "twelve_heads": {"num_heads": 12, "dim": 72, "sink_size_t": 3, "relative_rope": True},
}
"""15 tokens per latent frame, so that 2 and 4 ranks have to pad."""


def build_model(dtype: str = "float32", **overrides) -> WanTransformer:
    """A model of the same random weights on every rank; no layer is left at zero."""
    config = WanTransformerConfig(**{**TINY, "dtype": dtype, **overrides})
    torch.manual_seed(0)
    model = WanTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.cast().requires_grad_(False).eval()


@torch.no_grad()
def roll_out(model: WanTransformer, steps: int, per_frame: bool = False) -> list[Tensor]:
    """Clean latents of every AR step, from two denoising steps each."""
    c = model.config
    draw = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    shape = (2, c.in_channels, c.len_t, c.latent_height, c.latent_width)
    context = {"text": randn(2, 4, c.text_dim)}
    if c.image_dim is not None:
        context["image_tokens"] = randn(2, 3, c.image_dim)
    if c.condition_channels:
        context["condition"] = randn(2, c.condition_channels, *shape[2:])
    cache = model.initialize_cache(**context)
    latents = []
    for step in range(steps if c.streaming else 1):
        tokens = c.len_t * c.tokens_per_frame
        control = None if c.control_dim is None else randn(2, tokens, c.control_dim)
        model.begin_step(step, cache, control)
        x = randn(*shape)
        for time in (900.0, 400.0):
            timestep = torch.tensor(time)
            if per_frame:
                timestep = time - 50.0 * torch.arange(c.len_t).expand(2, -1)
            x = x - 0.5 * model.predict_flow(x, timestep, cache)
        model.update_cache(x, torch.tensor(0.0), cache)
        latents.append(x)
    return latents


def make_mesh(config: ParallelConfig, world_size: int, num_heads: int = 6) -> Mesh:
    degrees = resolve_degrees(config, world_size, num_heads)
    return build_mesh(degrees, "cpu", config)


def run_case(mesh: Mesh, case: str, dtype: str = "float32", steps: int = 4) -> list[Tensor]:
    """The rollout of one case under one mesh."""
    overrides = dict(CASES[case])
    per_frame = overrides.pop("per_frame", False)
    model = build_model(dtype, **overrides)
    parallelize(model, model.parallel_plan(), mesh)
    return roll_out(model, steps, per_frame)


@cache
def single_rank(case: str, dtype: str = "float32", steps: int = 4) -> list[Tensor]:
    """The rollout of one case by the plain model, computed once per process."""
    return run_case(Mesh(), case, dtype, steps)


def step_errors(a: list[Tensor], b: list[Tensor]) -> list[float]:
    """``max|a - b| / max|b|`` of every AR step."""
    return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True)]


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest ``max|a - b| / max|b|`` over AR steps."""
    return max(step_errors(a, b))
