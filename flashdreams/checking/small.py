"""Large methods at toy size: the same classes with other numbers."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashdreams.infra.component import ComponentConfig
from flashdreams.infra.config import config_fields, derive_config, is_config
from flashdreams.infra.decoder.base import DecoderConfig
from flashdreams.infra.diffusion.transformer import TransformerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.clip import CLIPImageEncoderConfig
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEConfig
from flashdreams.runtime.checkpoint import CheckpointConfig, find_local

MAX_PARAMETERS = 20_000_000
"""Components with at most this many parameters run unchanged."""

TRANSFORMER_SIZES = {
    "dim": 48,
    "num_heads": 4,
    "num_layers": 2,
    "action_blocks": 1,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": 32,
    "text_len": 8,
    "image_dim": 32,
    "image_len": 5,
    "latent_height": 8,
    "latent_width": 12,
}
"""Fields of transformers of any family; those that are None or 0 stay so."""

ENCODER_SIZES: tuple[tuple[type, dict[str, Any]], ...] = (
    (WanVAEConfig, {"dim": 4}),
    (TAEHVDecoderConfig, {"channels": (16, 8, 8, 8)}),
    (CLIPImageEncoderConfig, {
        "image_size": 28, "dim": 32, "out_dim": 16, "num_heads": 2, "num_layers": 2,
    }),
)  # fmt: skip
"""Fields of the networks in `flashdreams.models`; of a class and its subclasses."""

LATENT_FRAMES = 6
"""Latent frames of conditions and, without streaming, at most of the video."""


@dataclass(frozen=True)
class SmallPipeline:
    """A pipeline that runs on a CPU in milliseconds."""

    config: StreamInferencePipelineConfig
    shrunk: tuple[str, ...]
    """Components that were scaled down."""
    text_size: tuple[int, int] | None
    """Rows and channels of embeddings that replace prompts; None: the text encoder runs."""


def small_pipeline(config: StreamInferencePipelineConfig) -> SmallPipeline:
    """A pipeline of the same classes that needs no download, in float32.

    Components with more than :data:`MAX_PARAMETERS` are scaled down: by ``tiny()`` of their config
    if it has that method, which returns a small variant, else by known fields.
    Weights that are not on this machine are random. A text encoder that needs a file is omitted.

    Args:
        config: at full size.

    Raises:
        ValueError: a component stays large, or the fields that were changed do not fit together.
    """
    # Conditioning must fit the transformer, so either everything is small or nothing.
    transformer: Any = config.diffusion_model.transformer
    everything = parameter_count(transformer) > MAX_PARAMETERS
    shrunk: list[str] = []
    changes: dict[str, Any] = {}
    text_size = None
    for name in ("text_encoder", "image_encoder", "encoder", "decoder"):
        part = getattr(config, name)
        if part is None:
            continue
        if name == "text_encoder" and (not _is_here(part) or everything):
            changes[name] = None
            continue
        changes[name] = _small(part, name, everything, shrunk)
    small: Any = _small(transformer, "transformer", everything, shrunk)
    if config.text_encoder is not None and changes["text_encoder"] is None:
        text_size = (getattr(small, "text_len", 8), getattr(small, "text_dim", 32))
    model = derive_config(config.diffusion_model, transformer=small)
    if hasattr(model.scheduler, "num_inference_steps"):
        model = derive_config(model, scheduler={"num_inference_steps": 4})
    found = dataclasses.replace(config, **changes, diffusion_model=model, max_rollouts=1)
    return SmallPipeline(found, tuple(shrunk), text_size)


def parameter_count(config: ComponentConfig) -> int:
    """Parameters of a component, from a build on the meta device."""
    with torch.device("meta"):
        component: nn.Module = config.setup()
    return sum(parameter.numel() for parameter in component.parameters())


def _small(config: Any, name: str, everything: bool, shrunk: list[str]) -> Any:
    """A component's config in float32, scaled down if needed, without absent checkpoints."""
    large = parameter_count(config) > MAX_PARAMETERS
    if large or everything:
        tiny = getattr(config, "tiny", None)
        smaller = tiny() if callable(tiny) else _by_fields(config)
        if large and parameter_count(smaller) > MAX_PARAMETERS:
            raise ValueError(
                f"{name}: {type(config).__name__} has {parameter_count(config) / 1e6:.0f} million "
                "parameters and no known field to scale it down. Give the config a "
                "method tiny(self) that returns a small variant, for example with derive_config."
            )
        if smaller != config:
            shrunk.append(name)
        config = smaller
    return _on_this_machine(config)


def _by_fields(config: Any) -> Any:
    """A variant with small numbers, also of the components that a component is made of."""
    if isinstance(config, TransformerConfig):
        return _small_transformer(config)
    known = next((sizes for kind, sizes in ENCODER_SIZES if isinstance(config, kind)), {})
    changes: dict[str, Any] = {n: v for n, v in known.items() if n in config_fields(config)}
    for name in config_fields(config):
        value = getattr(config, name)
        if name == "latent_frames":
            changes[name] = LATENT_FRAMES
        elif is_config(value) and isinstance(value, ComponentConfig):
            changes[name] = _by_fields(value)
    return _without_checkpoint(config, changes)


def _small_transformer(config: Any) -> Any:
    changes: dict[str, Any] = {
        name: value for name, value in TRANSFORMER_SIZES.items() if getattr(config, name, None)
    }
    if not getattr(config, "streaming", True):
        frames = min(config.len_t, LATENT_FRAMES // 2)
        changes |= {"len_t": frames}
        changes |= {"window_size_t": frames} if hasattr(config, "window_size_t") else {}
    elif hasattr(config, "window_size_t"):
        changes["window_size_t"] = min(config.window_size_t, 2 * config.len_t + 1)
        changes["sink_size_t"] = min(config.sink_size_t, 2)
    return _without_checkpoint(config, changes)


def _without_checkpoint(config: Any, changes: dict[str, Any]) -> Any:
    names = [n for n in config_fields(config) if isinstance(getattr(config, n), CheckpointConfig)]
    return derive_config(config, **{**dict.fromkeys(names), **changes, "checkpoint": None})


def _on_this_machine(config: Any) -> Any:
    """The config in float32, eager, without checkpoints that are not here."""
    changes: dict[str, Any] = {"dtype": "float32"}
    wanted = {
        "use_cuda_graph": False,
        "fused_kernels": False,
        "precision": "native",
        "kv_cache_dtype": "native",
        "residual_dtype": None,
        "attention_backend": "auto",
    }
    changes |= {name: value for name, value in wanted.items() if name in config_fields(config)}
    for name in config_fields(config):
        value = getattr(config, name)
        if isinstance(value, CheckpointConfig) and find_local(value) is None:
            changes[name] = None
        elif isinstance(value, ComponentConfig) and not isinstance(value, DecoderConfig):
            changes[name] = _on_this_machine(value)
    return derive_config(config, **changes)


def _is_here(config: Any) -> bool:
    """Whether every file that a component names is on this machine."""
    values = [getattr(config, name) for name in config_fields(config)]
    return all(find_local(v) is not None for v in values if isinstance(v, CheckpointConfig))
