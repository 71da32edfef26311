"""Tiny pipelines that tests share."""

from dataclasses import dataclass, field

import torch

from flashdreams.infra.decoder.base import StreamingDecoder, StreamingDecoderConfig
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.encoder.base import StreamingEncoder, StreamingEncoderConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.transformer import WanTransformerConfig

TEXT_DIM, TEXT_LEN, CONTROL_DIM = 12, 6, 5


def tiny_transformer(**overrides) -> WanTransformerConfig:
    sizes = dict(
        dim=24,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        freq_dim=16,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
        in_channels=4,
        out_channels=4,
        len_t=2,
        latent_height=4,
        latent_width=4,
        window_size_t=5,
        sink_size_t=1,
    )
    return WanTransformerConfig(**{**sizes, **overrides})


@dataclass(kw_only=True)
class CountingEncoderConfig(StreamingEncoderConfig):
    _target: type["CountingEncoder"] = field(default_factory=lambda: CountingEncoder)
    tokens: int = 8


class CountingEncoder(StreamingEncoder):
    """Adds up its inputs, so that a state that leaks between rollouts shows."""

    def initialize_cache(self, offset: float = 0.0) -> list[float]:
        return [offset]

    def forward(self, input, autoregressive_index=0, cache=None):
        cache.append(float(input) + autoregressive_index)
        return torch.full((1, self.config.tokens, CONTROL_DIM), sum(cache))


@dataclass(kw_only=True)
class SmoothingDecoderConfig(StreamingDecoderConfig):
    _target: type["SmoothingDecoder"] = field(default_factory=lambda: SmoothingDecoder)


class SmoothingDecoder(StreamingDecoder):
    """Mixes every chunk with the one before it."""

    def initialize_cache(self) -> dict[str, torch.Tensor]:
        return {}

    def forward(self, latent, autoregressive_index=0, cache=None):
        mixed = latent + cache.get("last", torch.zeros_like(latent))
        cache["last"] = latent
        return mixed[:, :3].transpose(1, 2).clamp(-1, 1)


def call_network(model, latent, timestep, cache, write_only=False) -> torch.Tensor:
    """The bare network of a prepared chunk, eager."""
    modulation = model.modulation_of(timestep, cache)
    return model(latent, modulation, cache.inputs, cache, write_only)


def tiny_pipeline(**transformer) -> StreamInferencePipelineConfig:
    """A pipeline with every kind of rollout state: KV cache, encoder and decoder state, noise."""
    return StreamInferencePipelineConfig(
        name="tiny",
        encoder=CountingEncoderConfig(tokens=4 * transformer.get("len_t", 2)),
        diffusion_model=DiffusionModelConfig(
            transformer=tiny_transformer(**{"control_dim": CONTROL_DIM, **transformer}),
            scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0, 500.0)),
        ),
        decoder=SmoothingDecoderConfig(),
    )
