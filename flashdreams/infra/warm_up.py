"""What a pipeline does before its first rollout, so that no rollout pays for it."""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashdreams.attention.choose import AUTO, BackendChoice, choose_backend
from flashdreams.infra.component import declared_context
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.encoder.base import Encoder
from flashdreams.parallel.environment import from_rank_zero
from flashdreams.parallel.mesh import Mesh, local_attention
from flashdreams.runtime.checkpoint import CheckpointError
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

    attention: BackendChoice | None
    """The attention backend, and how it was chosen; None without attention cores."""

    @property
    def measured(self) -> str:
        """The table of attention backends, if they were measured."""
        choice = self.attention
        return f"{choice.table()}\n" if choice is not None and choice.rows else ""

    def __str__(self) -> str:
        parts = [f"{self.ms / 1e3:.1f} s", f"{self.steps} AR steps with dummy values"]
        if self.captures:
            parts.append(f"{self.captures} CUDA graphs")
        if self.compiled.graphs:
            parts.append(f"{self.compiled.ms / 1e3:.1f} s of it torch.compile")
        if self.attention is not None:
            parts.append(f"attention {self.attention.name}")
        return ", ".join(parts)


def warm_up(pipeline: "StreamInferencePipeline") -> WarmUp:
    """Run every form that a network call takes once; see `StreamInferencePipeline.warm_up`."""
    start = time.perf_counter()
    model, meter = pipeline.diffusion_model, pipeline.exchange.mesh.meter
    sent, compiled = meter.snapshot(), compiled_so_far()
    _run_encoders(pipeline)
    attention = choose_attention(model.transformer, pipeline.exchange.mesh, pipeline.target_device)
    steps = model.warm_up(pipeline.config.max_rollouts)
    if steps and pipeline.decodes_here:
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
        attention=attention,
    )


def _run_encoders(pipeline: "StreamInferencePipeline") -> None:
    """Call once what is called once per rollout; ranks without the text encoder have none to call.

    What is missing for it is not missed yet: rollouts may be given embeddings.
    """
    for encoder in (pipeline.text_encoder, pipeline.image_encoder):
        example = encoder.example_input() if isinstance(encoder, Encoder) else None
        if example is not None:
            with suppress(ImportError, CheckpointError):
                encoder(example)


def choose_attention(
    transformer: Transformer, mesh: Mesh, device: torch.device
) -> BackendChoice | None:
    """Settle the attention backend of all ranks; a collective call.

    "auto" is measured on a GPU. A CPU has one fused kernel, so a measurement would only make runs
    differ; strict ranks must not depend on the clock; xfuser's attention has no core.

    Returns:
        The choice, without rows where nothing was measured; None without attention cores.
    """
    shape, name = transformer.attention_shape(1), transformer.config.attention_backend
    if shape is None:
        return None
    foreign = mesh.config.context_backend == "xfuser" and mesh.sequence.size > 1
    if name == AUTO and (device.type != "cuda" or mesh.config.strict or foreign):
        name = "sdpa"
    if name != AUTO:
        return BackendChoice(name, ())
    local = local_attention(shape, mesh)
    choice = from_rank_zero(lambda: choose_backend(local, device, transformer.dtype))
    transformer.set_attention_backend(choice.name)
    return choice


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
    found: dict[str, Any] = {}
    if done is not None:
        found["warm_up_ms"] = done.ms
        found |= done.attention.stats() if done.attention is not None else {}
    calls = [c for c in pipeline.diffusion_model.transformer.graphed_calls() if c.can_capture]
    if calls:
        captures = done.captures if done is not None else 0
        found["cuda_graphs"] = {
            "captures_at_warm_up": captures,
            "captures_after_ready": sum(call.captures for call in calls) - captures,
            "replays": sum(call.replays for call in calls),
            "eager_calls": sum(call.eager_calls for call in calls),
        }
    if done is not None and done.compiled.graphs:
        found["torch_compile"] = {
            "graphs_at_warm_up": done.compiled.graphs,
            "ms_at_warm_up": done.compiled.ms,
            "graphs_after_ready": (compiled_so_far() - done.compiled_so_far).graphs,
        }
    return found
