"""One-time work of a pipeline before its first rollout."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from flashdreams.attention.backends import BACKENDS, PREFERENCE, bind_kv_splits
from flashdreams.attention.choose import (
    AUTO,
    AttentionShape,
    BackendChoice,
    choose_backend,
    kv_splits_of,
)
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.invariance import check_fp8_invariance, choose_invariant_backend
from flashdreams.infra.component import declared_context
from flashdreams.infra.decoder.base import Decoder, StreamingDecoder
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.encoder.base import Encoder
from flashdreams.infra.stored_choices import StoredAttention
from flashdreams.parallel.environment import from_rank_zero
from flashdreams.parallel.mesh import Mesh, local_attention
from flashdreams.parallel.strict import tile_attention
from flashdreams.runtime.checkpoint import CheckpointError
from flashdreams.runtime.compilation import Compilation, compiled_so_far
from flashdreams.runtime.cuda_graph import GraphedCallable


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Report of the warm-up."""

    ms: float
    """Its duration."""

    steps: int
    """AR steps that were run with dummy values."""

    captures: int
    """CUDA graphs that were captured."""

    compiled: Compilation
    """What torch.compile built."""

    compiled_so_far: Compilation
    """The same since the process started, to detect later compilation."""

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
            parts.append(f"attention {self.attention}")
        return ", ".join(parts)


def run_encoders(encoders: Iterable[Any]) -> None:
    """Call once what every rollout calls once.

    Missing packages or files are ignored here: rollouts may use embeddings.

    Args:
        encoders: of text and image; None on ranks that have none.
    """
    for encoder in encoders:
        example = encoder.example_input() if isinstance(encoder, Encoder) else None
        if example is not None:
            with suppress(ImportError, CheckpointError):
                encoder(example)


def choose_attention(
    transformer: Transformer,
    mesh: Mesh,
    device: torch.device,
    stored: StoredAttention | None = None,
) -> BackendChoice | None:
    """Select the attention backend of all ranks and its KV splits; a collective call.

    Splits follow from the sizes of this rank's calls, under strict from those of the whole model.
    "auto" is measured on a GPU. A CPU has one fused kernel, so a measurement would only make runs
    differ; strict ranks must not depend on timing: they use the first backend with the same
    bits for any number of heads and rows; xfuser's attention has no core.

    Args:
        transformer: whose attention cores are set.
        mesh: the ranks.
        device: where they run.
        stored: choices of an earlier run, used without a measurement.

    Returns:
        The choice, without rows if nothing was measured; None without attention cores.
    """
    shape, name = transformer.attention_shape(1), transformer.config.attention_backend
    if shape is None:
        return None
    if mesh.config.strict and device.type == "cuda":
        return _choose_strict(transformer, shape, name, device)
    processors = None
    if stored is not None:
        name, processors = stored.name, stored.processors
        transformer.set_attention_backend(name)
    foreign = mesh.config.context_backend == "xfuser" and mesh.sequence.size > 1
    if name == AUTO and (device.type != "cuda" or foreign):
        name = "sdpa"
    local = local_attention(shape, mesh)
    if name == AUTO:
        choice = from_rank_zero(lambda: choose_backend(local, device, transformer.dtype))
        transformer.set_attention_backend(choice.name)
    else:
        choice = BackendChoice(name, (), kv_splits_of(name, local, device, processors=processors))
    transformer.bind_kv_splits(
        choice.name,
        lambda runs, of: kv_splits_of(
            runs, local_attention(of, mesh), device, processors=processors
        ),
    )
    return choice


def _choose_strict(
    transformer: Transformer, shape: AttentionShape, name: str, device: torch.device
) -> BackendChoice:
    """Select the backend of strict ranks on a GPU, and whether it must be tiled."""
    names, dtype = PREFERENCE if name == AUTO else (name,), transformer.dtype
    if getattr(transformer.config, "kv_storage", "native") == "fp8":
        from_rank_zero(lambda: check_fp8_invariance(shape, device, dtype))
    choice = from_rank_zero(lambda: choose_invariant_backend(shape, device, dtype, names))
    transformer.set_attention_backend(choice.name)
    transformer.bind_kv_splits(
        choice.name, lambda runs, of: kv_splits_of(runs, of, device, strict=True)
    )
    for core in transformer.modules():  # those without a cache have none yet
        if isinstance(core, AttentionCore) and core.backend is BACKENDS[choice.name]:
            core.backend = bind_kv_splits(choice.name, 1)
    if choice.tiled:
        tile_attention(transformer, device.type)
    return choice


def decode_zeros(
    decoder: Decoder | None,
    latent_shape: Sequence[int],
    device: torch.device,
    capture: bool = False,
) -> None:
    """Decode two chunks of zeros, because the first one may take a different path.

    Args:
        decoder: None does nothing.
        latent_shape: of a chunk.
        device: where the pipeline runs.
        capture: let the decoder capture what it can replay.
    """
    if decoder is None:
        return
    latent = torch.zeros(tuple(latent_shape), device=device, dtype=torch.float32)
    if not isinstance(decoder, StreamingDecoder):
        decoder(latent)
        return
    if declared_context(decoder.initialize_cache):
        return  # it needs context for which there is no dummy
    cache = decoder.initialize_cache()
    for index in range(2):
        decoder(latent, autoregressive_index=index, cache=cache)
    if capture:
        decoder.capture(latent)


def stats(
    done: WarmUp | None,
    calls: Sequence[GraphedCallable],
    decoder_calls: Sequence[GraphedCallable] = (),
) -> dict[str, Any]:
    """Figures of warm-up and of later captures, as JSON values.

    Args:
        done: None before warm-up.
        calls: those of the transformer that are replayed as graphs.
        decoder_calls: those of the decoder, of which none is captured after warm-up.
    """
    found: dict[str, Any] = {}
    if done is not None:
        found["warm_up_ms"] = done.ms
        found |= done.attention.stats() if done.attention is not None else {}
    calls = [call for call in calls if call.can_capture]
    if calls:
        at_warm_up, counts = done.captures if done is not None else 0, _counts(calls)
        after = counts.pop("captures") - at_warm_up
        captures = {"captures_at_warm_up": at_warm_up, "captures_after_ready": after}
        found["cuda_graphs"] = captures | counts
        failures = [call.failure for call in calls if call.failure is not None]
        if failures:
            found["cuda_graphs"]["off"] = failures[0]
    decoder_calls = [call for call in decoder_calls if call.can_capture]
    if decoder_calls:
        found["decoder_cuda_graph"] = _counts(decoder_calls)
    if done is not None and done.compiled.graphs:
        found["torch_compile"] = {
            "graphs_at_warm_up": done.compiled.graphs,
            "ms_at_warm_up": done.compiled.ms,
            "graphs_after_ready": (compiled_so_far() - done.compiled_so_far).graphs,
        }
    return found


def _counts(calls: Sequence[GraphedCallable]) -> dict[str, Any]:
    names = ("captures", "replays", "eager_calls")
    return {name: sum(getattr(call, name) for call in calls) for name in names}
