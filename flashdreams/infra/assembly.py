"""Assembly of a pipeline: what happens once, before its first rollout."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashdreams.attention.splits import count_processors
from flashdreams.infra.component import (
    Component,
    build_component,
    check_weights,
    declared_context,
    load_component,
)
from flashdreams.infra.conditioning import ContextEncoder
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.fingerprint import fingerprint
from flashdreams.infra.same_options import refuse_other_weights
from flashdreams.infra.stored_choices import StoredAttention, find_attention
from flashdreams.infra.warm_up import WarmUp, choose_attention, decode_zeros, run_encoders, stats
from flashdreams.infra.weights import fetch_weights, require_weights, typed_options
from flashdreams.parallel.environment import group_rank, process_count
from flashdreams.parallel.guidance import build_guidance
from flashdreams.parallel.mesh import (
    Mesh,
    ParallelConfig,
    ParallelDegrees,
    build_mesh,
    resolve_degrees,
)
from flashdreams.parallel.parallelize import ParallelReport, parallelize
from flashdreams.parallel.ring import NO_FP8
from flashdreams.parallel.spatial import WidthLayout, resolve_decode
from flashdreams.parallel.state_layout import StateLayout
from flashdreams.parallel.watchdog import StageGuard, no_guard
from flashdreams.parallel.xfuser import refuse_padding
from flashdreams.runtime.compilation import compiled_so_far
from flashdreams.runtime.cuda_graph import GraphedCallable
from flashdreams.runtime.grad_mode import without_grad

HEAD_FIELDS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""Fields of a transformer's config that may give its attention heads; the first one counts."""

logger = logging.getLogger(__name__)

INIT_SEED = 0
"""Seed of weights without a checkpoint, so that every rank draws the same ones."""

_DRAWING = threading.RLock()


def resolve_device(device: str | torch.device) -> torch.device:
    """The device for a name; ``"auto"`` is CUDA if available, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def count_heads(transformer: Any) -> int | None:
    """Attention heads of a transformer, by the usual names of its config; None without any."""
    for name in HEAD_FIELDS:
        heads = getattr(transformer.config, name, None)
        if isinstance(heads, int):
            return heads
    plan = transformer.parallel_plan()
    if plan is not None and (plan.attention or plan.cores) and process_count() > 1:
        logger.warning(
            "%s has no field num_heads, so its heads are not split: no Ulysses, no tensor "
            "parallelism. Add the field, or a property of that name.",
            type(transformer.config).__name__,
        )
    return None


def degrees_of(
    transformer: Any, parallel: ParallelConfig, world_size: int, guided: bool
) -> ParallelDegrees:
    """Resolve the degrees for a transformer, before any weight is read.

    Args:
        transformer: not parallelized yet; it may be on the meta device.
        parallel: the request.
        world_size: number of ranks.
        guided: whether it is evaluated twice per denoising step.

    Raises:
        ValueError: degrees or a strategy that do not fit; the message suggests some that do.
    """
    sizes, plan = transformer.config, transformer.parallel_plan()
    streaming = getattr(sizes, "streaming", False)
    frame_tokens = getattr(sizes, "tokens_per_frame", None)
    degrees = resolve_degrees(
        parallel,
        world_size,
        num_heads=count_heads(transformer) if plan is not None else None,
        guided=guided,
        cached_frame_tokens=frame_tokens if streaming else None,
        any_degree=plan is not None and bool(plan.units),
    )
    if parallel.context_backend == "xfuser" and not streaming and frame_tokens is not None:
        refuse_padding(sizes.len_t * frame_tokens, degrees.sequence)
    rotates = degrees.ring > 1 and parallel.ring_method == "rotate"
    if rotates and getattr(sizes, "kv_storage", "native") == "fp8":
        raise ValueError(NO_FP8)
    if parallel.strict and getattr(sizes, "precision", "native") == "fp8_gemm":
        raise ValueError(
            "--parallel.strict True cannot be used with precision='fp8_gemm': the bits of a "
            "row of its matmuls depend on the number of rows. Use precision='fp8'."
        )
    return degrees


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Build with PyTorch's original default dtype and device, whatever the program has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _refuse_other_text(encoder: Any, transformer: Any) -> None:
    """Refuse embeddings of prompts that the transformer cannot take, before weights are read."""
    made, taken = (
        [getattr(c, n, 0) for n in ("text_dim", "text_len")] for c in (encoder, transformer)
    )
    if all(made + taken) and (made[0] != taken[0] or made[1] > taken[1]):
        raise ValueError(
            f"text_encoder makes embeddings of text_dim={made[0]}, text_len={made[1]}; the "
            f"transformer takes text_dim={taken[0]}, at most text_len={taken[1]}: set them alike."
        )


class Assembly(nn.Module):
    """The components of a pipeline, from construction to warm-up.

    Life: construction (on meta if a checkpoint provides the weights) -> ``parallelize`` -> ``load``
    -> ``warm_up``.
    """

    config: Any
    """A `StreamInferencePipelineConfig`."""

    def __init__(
        self, config: Any, *, device: str | torch.device = "auto", load: bool = True
    ) -> None:
        """Build the components and, unless told otherwise, load their weights.

        Args:
            config: the composition.
            device: where it will run; ``"auto"`` is CUDA if available.
            load: False leaves components that name a checkpoint on the meta device until ``load``
                is called, so that they can be split first.
        """
        super().__init__()
        self.config = config
        self.target_device = resolve_device(device)
        self.guard: StageGuard = no_guard
        self._slices: dict[str, Mapping[str, Any]] = {}
        self.decodes_here = True
        self.text_from_rank_zero = False
        self.warmed_up: WarmUp | None = None
        self._is_loaded = False
        self._stored_attention: StoredAttention | None = None
        model_config: DiffusionModelConfig = config.diffusion_model
        self._latent_width = model_config.transformer.latent_width
        # PyTorch draws weights from one generator per process: one thread builds at a time.
        with plain_defaults(), _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(INIT_SEED)
            self.text_encoder = build_component(config.text_encoder)
            self.image_encoder = build_component(config.image_encoder)
            self.encoder = build_component(config.encoder)
            self.diffusion_model = model_config.setup()
            self.decoder = build_component(config.decoder)
        _refuse_other_text(config.text_encoder, model_config.transformer)
        for part in self.components().values():
            part.check_device(self.target_device)
        self.layout = self._new_layout(Mesh())
        self.requires_grad_(False).eval()
        if load:
            self.load()

    def components(self) -> dict[str, Component]:
        """The components by their config's field name, in the order of the data."""
        found = {
            "text_encoder": self.text_encoder,
            "image_encoder": self.image_encoder,
            "encoder": self.encoder,
            "transformer": self.diffusion_model.transformer,
            "decoder": self.decoder,
        }
        return {name: part for name, part in found.items() if part is not None}

    def build_mesh(self, world_size: int, parallel: ParallelConfig | None = None) -> Mesh:
        """Resolve the degrees for this model and arrange the ranks of the process group.

        Args:
            world_size: number of ranks.
            parallel: the request; None leaves everything to "auto".

        Raises:
            ValueError: impossible degrees; the message suggests some that work.
        """
        parallel = parallel or ParallelConfig()
        guided = self.config.diffusion_model.guidance_scale is not None
        degrees = degrees_of(self.diffusion_model.transformer, parallel, world_size, guided)
        return build_mesh(degrees, self.target_device.type, parallel)

    def parallelize(self, mesh: Mesh) -> dict[str, ParallelReport]:
        """Split every component according to its plan; call before ``load``.

        Args:
            mesh: the ranks and the strategy; on one rank nothing changes, unless strict.

        Returns:
            What was done, by component.

        Raises:
            ValueError: a plan that does not fit its component, or an impossible ``decode``.
        """
        self.text_from_rank_zero = mesh.degrees.world_size > 1
        if self.text_from_rank_zero and group_rank() != 0:
            self.text_encoder = None
        reports = {
            name: parallelize(part, part.parallel_plan(), mesh)
            for name, part in self.components().items()
        }
        self._slices = {name: report.slices for name, report in reports.items()}
        self.diffusion_model.guidance = build_guidance(mesh)
        plan = self.decoder.parallel_plan() if self.decoder is not None else None
        decode = resolve_decode(mesh, plan, self._latent_width)
        self.decodes_here = decode != "rank0" or mesh.decode.rank == 0
        # Concurrent collectives of two groups may deadlock.
        self.diffusion_model.may_overlap &= decode != "split"
        width = reports["decoder"].width_layout if "decoder" in reports else None
        self.layout = self._new_layout(mesh, width)
        return reports

    def _new_layout(self, mesh: Mesh, width: WidthLayout | None = None) -> StateLayout:
        plan = self.diffusion_model.transformer.parallel_plan()
        return StateLayout(mesh, self.target_device, plan, width, self._latent_width)

    @property
    def context_encoder(self) -> ContextEncoder:
        """The object that checks and encodes the context of a rollout, in the current state."""
        known = set(self.diffusion_model.known_context())
        for part in (self.encoder, self.decoder):
            if part is not None and hasattr(part, "initialize_cache"):
                known |= declared_context(part.initialize_cache)
        return ContextEncoder(
            config=self.config,
            text_encoder=self.text_encoder,
            image_encoder=self.image_encoder,
            text_from_rank_zero=self.text_from_rank_zero,
            device=self.target_device,
            known=frozenset(known),
        )

    def load(self, fetch_all: str | None = None, prompts: Mapping[str, str] | None = None) -> None:
        """Read the weights, once, and move every component to its device and dtype.

        Args:
            fetch_all: the option that downloads all missing weights, for the error; None names
                an option per file.
            prompts: texts that will be encoded, each by its name in an error; checked before
                weights are downloaded or read.

        Raises:
            ValueError: the device, or this rank's share, does not allow what the config asks for,
                the text encoder refuses a prompt, or other ranks have other weights.
            MissingWeightsError: weights are missing.
            CheckpointError: they are damaged or do not fit; nothing has been loaded.
            OtherRankError: they are missing; the first rank of a node reports the details.
        """
        for component in self.components().values():
            component.check_device(self.target_device)
        encodes_text = self.text_encoder is not None
        shared = self.text_from_rank_zero
        with typed_options(self.config):
            require_weights(
                self.config, fetch_all=fetch_all, encodes_text=encodes_text, shared=shared
            )
            if prompts:
                self.context_encoder.refuse_prompts(prompts)
            fetch_weights(self.config, text_on_rank_zero=shared)
            if shared:
                refuse_other_weights(self.config)
            for name, component in self.components().items():
                check_weights(component, self._slices.get(name))
            for name, component in self.components().items():
                load_component(component, self.target_device, self._slices.get(name))
        self.requires_grad_(False).eval()
        for call in self.diffusion_model.transformer.graphed_calls():
            call.meter = self.layout.mesh.meter
        self._is_loaded = True

    def apply_choices(self, stored: Mapping[str, Any]) -> list[str]:
        """Use the numerics choices of an earlier run instead of measuring; a collective call.

        These are attention backend and KV splits, and whether small operations run as fused
        kernels, unless the config sets them. Call after ``parallelize`` and before
        ``load``; attention may also be chosen after that, up to ``warm_up``.

        Args:
            stored: numerics fingerprint of that run, equal on all ranks.

        Returns:
            A line for each choice that cannot be used, with the reason.
        """
        transformer, ours = self.diffusion_model.transformer, self.fingerprint()

        def too_late(names: Sequence[str], when: str) -> list[str]:
            return [
                f"{name} {stored[name]} is not used: the pipeline {when} already with {ours[name]}"
                for name in names
                if name in ours and stored.get(name) not in (None, ours[name])
            ]

        if self._is_loaded:
            lines = too_late(("fused_kernels",), "has been loaded")
        else:
            lines = transformer.apply_choices(stored, self.target_device)
        if self.warmed_up is not None:
            return lines + too_late(("attention_backend",), "has been warmed up")
        place = (transformer, self.layout.mesh, self.target_device)
        self._stored_attention, found = find_attention(stored, *place)
        return lines + found

    @without_grad
    def warm_up(self) -> WarmUp:
        """Do all one-time work now, so that no rollout has to; a collective call.

        Afterwards nothing is compiled, captured or measured. Call after ``load``; a second
        call does nothing. On a CPU there is usually nothing to build.

        Returns:
            What was done, also kept as ``warmed_up``.
        """
        if self.warmed_up is not None:
            return self.warmed_up
        start = time.perf_counter()
        model, mesh = self.diffusion_model, self.layout.mesh
        sent, compiled = mesh.meter.snapshot(), compiled_so_far()
        run_encoders((self.text_encoder, self.image_encoder))
        attention = choose_attention(
            model.transformer, mesh, self.target_device, self._stored_attention
        )
        steps = model.warm_up(self.config.max_rollouts)
        if steps and self.decodes_here:
            shape = model.transformer.latent_shape(1)
            graphs = any(call.can_capture for call in model.transformer.graphed_calls())
            # A split decoder communicates columns, which cannot be in a graph.
            decode_zeros(
                self.decoder, shape, self.target_device, graphs and not self.layout.splits_width
            )
        if self.target_device.type == "cuda":
            torch.cuda.synchronize(self.target_device)
        mesh.meter.rewind(sent)
        calls = model.transformer.graphed_calls()
        for call in (*calls, *self._decoder_calls()):
            call.reset()
        self.warmed_up = WarmUp(
            ms=1e3 * (time.perf_counter() - start),
            steps=steps,
            captures=sum(call.captures for call in calls),
            compiled=compiled_so_far() - compiled,
            compiled_so_far=compiled_so_far(),
            attention=attention,
        )
        return self.warmed_up

    def stats(self) -> dict[str, Any]:
        """What warm-up built and its use since then, as JSON values.

        Figures of graphs are included only if calls are captured.
        """
        calls = self.diffusion_model.transformer.graphed_calls()
        found = stats(self.warmed_up, calls, self._decoder_calls())
        return {**found, "fingerprint": self.fingerprint()}

    def _decoder_calls(self) -> Sequence[GraphedCallable]:
        """The decoder's calls that are replayed as CUDA graphs."""
        return self.decoder.graphed_calls() if isinstance(self.decoder, StreamingDecoder) else ()

    def fingerprint(self) -> dict[str, Any]:
        """What the bits of a rollout depend on besides config, weights and seed, as JSON values."""
        done = self.warmed_up
        backend = done.attention.name if done is not None and done.attention is not None else None
        transformer = self.diffusion_model.transformer
        resolved = transformer.resolved_choices()
        if done is not None and done.attention is not None and done.attention.kv_splits:
            stored = self._stored_attention
            count = stored.processors if stored is not None else None
            resolved |= {
                "attention_kv_splits": done.attention.kv_splits,
                "attention_processors": count or count_processors(self.target_device),
            }
        return fingerprint(
            transformer.config, resolved, backend, self.layout.mesh, self.target_device
        )

    def drop_graphs(self) -> None:
        """Free all CUDA graphs; before the process group ends, since they hold its collectives.

        Rollouts can continue without them.
        """
        self.diffusion_model.side.join()
        for call in self.diffusion_model.transformer.graphed_calls():
            call.drop()
        if isinstance(self.decoder, StreamingDecoder):
            self.decoder.drop_graphs()
