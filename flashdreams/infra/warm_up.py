"""What a pipeline does before its first rollout, so that no rollout pays for it."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashdreams.infra.component import declared_context
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.runtime.compilation import Compilation, compiled_so_far

if TYPE_CHECKING:
    from flashdreams.infra.pipeline import StreamInferencePipeline


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What was built before the first rollout."""

    ms: float
    """Milliseconds that it took."""

    steps: int
    """AR steps that were run with dummy values."""

    captures: int
    """CUDA graphs that were captured."""

    compiled: Compilation
    """What torch.compile built."""

    compiled_so_far: Compilation
    """The same since the process began, to know later what is new."""

    def __str__(self) -> str:
        parts = [f"{self.ms / 1e3:.1f} s", f"{self.steps} AR steps with dummy values"]
        if self.captures:
            parts.append(f"{self.captures} CUDA graphs")
        if self.compiled.graphs:
            parts.append(f"{self.compiled.ms / 1e3:.1f} s of it torch.compile")
        return ", ".join(parts)


def warm_up(pipeline: "StreamInferencePipeline") -> WarmUp:
    """Run every form that a network call takes once; see `StreamInferencePipeline.warm_up`."""
    start = time.perf_counter()
    model, meter = pipeline.diffusion_model, pipeline.exchange.mesh.meter
    sent, compiled = meter.snapshot(), compiled_so_far()
    steps = model.warm_up(pipeline.config.max_rollouts)
    if steps:
        _decode_zeros(pipeline)
    if pipeline.target_device.type == "cuda":
        torch.cuda.synchronize(pipeline.target_device)
    meter.rewind(sent)
    calls = model.transformer.graphed_calls()
    for call in calls:
        call.reset()
    return WarmUp(
        ms=1e3 * (time.perf_counter() - start),
        steps=steps,
        captures=sum(call.captures for call in calls),
        compiled=compiled_so_far() - compiled,
        compiled_so_far=compiled_so_far(),
    )


def _decode_zeros(pipeline: "StreamInferencePipeline") -> None:
    """Decode two chunks, since the first one may take a path of its own."""
    decoder, transformer = pipeline.decoder, pipeline.diffusion_model.transformer
    latent = torch.zeros(transformer.latent_shape(1), device=pipeline.target_device)
    if isinstance(decoder, StreamingDecoder):
        if declared_context(decoder.initialize_cache):
            return  # it wants context, of which there is no dummy
        cache = decoder.initialize_cache()
        for index in range(2):
            decoder(latent, autoregressive_index=index, cache=cache)
    elif decoder is not None:
        decoder(latent)


def stats(pipeline: "StreamInferencePipeline") -> dict[str, Any]:
    """Figures of warm-up and of what came after it; see `StreamInferencePipeline.stats`."""
    done = pipeline.warmed_up
    calls = [c for c in pipeline.diffusion_model.transformer.graphed_calls() if c.can_capture]
    captures = done.captures if done is not None else 0
    graphs = {
        "captures_at_warm_up": captures,
        "captures_after_ready": sum(call.captures for call in calls) - captures,
        "replays": sum(call.replays for call in calls),
        "eager_calls": sum(call.eager_calls for call in calls),
    }
    built = None
    if done is not None and done.compiled.graphs:
        built = {
            "graphs_at_warm_up": done.compiled.graphs,
            "ms_at_warm_up": done.compiled.ms,
            "graphs_after_ready": (compiled_so_far() - done.compiled_so_far).graphs,
        }
    return {
        "warm_up_ms": done.ms if done is not None else None,
        "cuda_graphs": graphs if calls else None,
        "torch_compile": built,
    }
