"""The pipeline: encoders, diffusion model and decoder, conducted through one rollout."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.infra.component import (
    Component,
    build_component,
    load_component,
    select_context,
)
from flashdreams.infra.conditioning import encode_context, encode_text, refuse_prompts
from flashdreams.infra.config import InstantiateConfig
from flashdreams.infra.decoder.base import DecoderConfig, StreamingDecoder
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.encoder.base import EncoderConfig, StreamingEncoder
from flashdreams.infra.ranges import check_range
from flashdreams.infra.rollout import StreamInferencePipelineCache
from flashdreams.infra.state import RolloutState, import_rollout
from flashdreams.infra.warm_up import WarmUp, stats, warm_up
from flashdreams.infra.weights import fetch_weights, require_weights
from flashdreams.parallel.environment import LOAD_TIMEOUT_S, group_rank
from flashdreams.parallel.guidance import build_guidance
from flashdreams.parallel.mesh import Mesh, ParallelConfig, build_mesh, resolve_degrees
from flashdreams.parallel.parallelize import ParallelReport, parallelize
from flashdreams.parallel.rollout import RolloutExchange
from flashdreams.parallel.spatial import resolve_decode
from flashdreams.parallel.watchdog import StageGuard, no_guard
from flashdreams.runtime.grad_mode import without_grad
from flashdreams.runtime.noise import NoiseFunction, NoiseSource
from flashdreams.runtime.profiler import StageTimer

INIT_SEED = 0
"""Seed of weights that no checkpoint gives, so that every rank draws the same ones."""


@dataclass(kw_only=True)
class StreamInferencePipelineConfig(InstantiateConfig):
    """The composition of a method."""

    _target: type["StreamInferencePipeline"] = field(
        default_factory=lambda: StreamInferencePipeline
    )

    name: str
    """Name of the method."""

    diffusion_model: DiffusionModelConfig
    """The transformer and its scheduler."""

    text_encoder: EncoderConfig | None = None
    """Turns prompts into embeddings, once per rollout; None hands ``text`` on as it is given."""

    release_text_encoder: bool = False
    """Free the text encoder once the first rollout has its prompt; later prompts are embeddings."""

    image_encoder: EncoderConfig | None = None
    """Turns an image into latents, or into a mapping of context names to tensors, once per rollout;
    None hands ``image`` on as it is given."""

    encoder: EncoderConfig | None = None
    """Encodes the control input of every AR step; None for methods without one."""

    decoder: DecoderConfig | None = None
    """Turns latents into frames; None makes ``generate`` return latents."""

    max_rollouts: int = 1
    """Rollouts of one prompt each that may run as CUDA graphs at the same time: storage for so many
    is allocated and captured at warm-up. Further ones run without graphs."""

    def __post_init__(self) -> None:
        check_range(self, "max_rollouts")


ChunkObserver = Callable[[StreamInferencePipelineCache, Tensor], None]
"""Called with the rollout's cache and the chunk, right after each ``generate``."""


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


class StreamInferencePipeline(nn.Module):
    """Streams a rollout chunk by chunk::

        cache = pipeline.initialize_cache(text=["A cat surfing."])
        for i in range(total_blocks):
            chunk = pipeline.generate(autoregressive_index=i, cache=cache)
            pipeline.finalize(autoregressive_index=i, cache=cache)

    Any number of rollouts may interleave: each lives in its own cache alone.
    """

    config: StreamInferencePipelineConfig

    def __init__(
        self,
        config: StreamInferencePipelineConfig,
        *,
        device: str | torch.device = "auto",
        load: bool = True,
    ) -> None:
        """Build the components and, unless told otherwise, load their weights.

        Args:
            config: the composition.
            device: where it shall run; ``"auto"`` is CUDA where there is one.
            load: False leaves components that name a checkpoint on the meta device until ``load``
                is called, so that others may cut them first.
        """
        super().__init__()
        self.config = config
        self.target_device = resolve_device(device)
        self.observers: list[ChunkObserver] = []
        self.guard: StageGuard = no_guard
        self._slices: dict[str, Mapping[str, Any]] = {}
        self.decodes_here = True
        self.text_from_rank_zero = False
        self.warmed_up: WarmUp | None = None
        self._latent_width = config.diffusion_model.transformer.latent_width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(INIT_SEED)
            self.text_encoder = build_component(config.text_encoder)
            self.image_encoder = build_component(config.image_encoder)
            self.encoder = build_component(config.encoder)
            self.diffusion_model = config.diffusion_model.setup()
            self.decoder = build_component(config.decoder)
        for part in self.components().values():
            part.check_device(self.target_device)
        self.exchange = RolloutExchange(Mesh(), self.diffusion_model.transformer.parallel_plan())
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
        """Settle the degrees for this model and arrange the ranks of the process group.

        Args:
            world_size: number of ranks.
            parallel: the wish; None leaves everything to "auto".

        Raises:
            ValueError: impossible degrees; the message names some that would work.
        """
        parallel = parallel or ParallelConfig()
        transformer = self.diffusion_model.transformer
        sizes = transformer.config
        planned = transformer.parallel_plan() is not None
        streaming = getattr(sizes, "streaming", False)
        degrees = resolve_degrees(
            parallel,
            world_size,
            num_heads=getattr(sizes, "num_heads", None) if planned else None,
            guided=self.config.diffusion_model.guidance_scale is not None,
            cached_frame_tokens=getattr(sizes, "tokens_per_frame", None) if streaming else None,
        )
        return build_mesh(degrees, self.target_device.type, parallel)

    def parallelize(self, mesh: Mesh) -> dict[str, ParallelReport]:
        """Cut every component as its plan allows; call before ``load``.

        Args:
            mesh: the ranks and the strategy; one rank leaves everything as it is, unless strict.

        Returns:
            What was done, by component.

        Raises:
            ValueError: a plan that does not fit its component, or an impossible way to decode.
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
        # Exchanges of two groups at once may wait for each other for ever.
        self.diffusion_model.may_overlap &= decode != "split"
        layout = reports["decoder"].width_layout if "decoder" in reports else None
        cut = self.diffusion_model.transformer.parallel_plan()
        self.exchange = RolloutExchange(mesh, cut, layout, self._latent_width)
        return reports

    def load(self, fetch_all: str | None = None, prompts: Mapping[str, str] | None = None) -> None:
        """Read the weights, once, and move every component to its device and type.

        Args:
            fetch_all: what to type to have all missing weights fetched, for the error; None names
                an option per file.
            prompts: texts that will be encoded, each by its name in an error; asked about before
                weights are fetched or read.

        Raises:
            ValueError: the device, or this rank's share, does not allow what the config asks for,
                or the text encoder refuses a prompt.
            CheckpointError: weights are missing or do not fit; see ``load_checkpoint``.
            OtherRankError: they are missing, which the first rank of a node says in full.
        """
        for component in self.components().values():
            component.check_device(self.target_device)
        encodes_text = self.text_encoder is not None
        shared = self.text_from_rank_zero
        require_weights(self.config, fetch_all=fetch_all, encodes_text=encodes_text, shared=shared)
        if prompts:
            refuse_prompts(self, prompts)
        fetch_weights(self.config, text_on_rank_zero=shared)
        for name, component in self.components().items():
            load_component(component, self.target_device, self._slices.get(name))
        self.requires_grad_(False).eval()
        for call in self.diffusion_model.transformer.graphed_calls():
            call.meter = self.exchange.mesh.meter

    @without_grad
    def warm_up(self) -> WarmUp:
        """Build whatever is built once, so that no rollout pays for it; a collective call.

        Afterwards nothing is compiled, captured or measured any more. Call after ``load``; a second
        call does nothing. On a CPU there is usually nothing to build.

        Returns:
            What was done, also kept as ``warmed_up``.
        """
        if self.warmed_up is None:
            self.warmed_up = warm_up(self)
        return self.warmed_up

    def stats(self) -> dict[str, Any]:
        """What was built at warm-up and what happened to it since, as JSON values.

        Figures of graphs are there only where calls are captured.
        """
        return stats(self)

    def drop_graphs(self) -> None:
        """Free all CUDA graphs; before the process group ends, since they hold its collectives.

        Rollouts can go on without them.
        """
        self.diffusion_model.side.join()
        for call in self.diffusion_model.transformer.graphed_calls():
            call.drop()

    @without_grad
    def initialize_cache(
        self,
        *,
        text: Sequence[str] | Tensor | None = None,
        negative_text: Sequence[str] | Tensor | None = None,
        image: Any = None,
        seed: int = 0,
        noise: NoiseFunction | None = None,
        **context: Any,
    ) -> StreamInferencePipelineCache:
        """Begin a rollout.

        Args:
            text: one prompt per batch entry, or embeddings ``[B, S, text_dim]``.
            negative_text: the same for the unconditional half of guidance; None is ``""``.
            image: what the image encoder, or without one the diffusion model, takes.
            seed: of the rollout's noise.
            noise: takes the place of the seeded noise: ``(AR index, denoising step, shape)`` to a
                float32 tensor of that shape.
            context: keyword context of the components, by the names that they declare.

        Returns:
            The rollout's state.

        Raises:
            TypeError: a keyword that no component declares, the message lists the known ones; or
                an image that none of them takes.
        """
        with self.guard("initialize", None, LOAD_TIMEOUT_S):
            encoded, negative = encode_context(self, text, negative_text, image, context)
            if self.config.release_text_encoder:
                self.text_encoder = None
            return self.new_cache(encoded, negative, noise or NoiseSource(seed))

    def new_cache(
        self, context: dict[str, Any], negative_text: Any, noise: NoiseFunction
    ) -> StreamInferencePipelineCache:
        """Fresh state under a context that is encoded already; see ``initialize_cache``.

        Args:
            context: by name, ``batch_size`` among it.
            negative_text: embeddings for the unconditional half; None without guidance.
            noise: of the rollout.
        """
        negative = None if negative_text is None else {**context, "text": negative_text}
        return StreamInferencePipelineCache(
            diffusion=self.diffusion_model.initialize_cache(
                context, negative, noise, context["batch_size"]
            ),
            encoder=_new_state(self.encoder, context),
            decoder=_new_state(self.decoder, context),
            timer=StageTimer(self.target_device),
            pipeline=self,
            context=context,
            negative_text=negative_text,
        )

    @without_grad
    def load_cache(
        self, state: RolloutState | None, noise: NoiseFunction | None = None
    ) -> StreamInferencePipelineCache:
        """Go on with a rollout that ``cache.state_dict()`` has exported; a collective call.

        Args:
            state: on rank zero the canonical form; elsewhere it is ignored.
            noise: as in ``initialize_cache``; needed if the rollout was begun with one.

        Returns:
            The rollout's state: the next call is ``generate`` for its next AR step.

        Raises:
            ValueError: a state of another format, pipeline, sink or window, or no ``noise`` for a
                rollout that was begun with one.
        """
        with self.guard("import", None, LOAD_TIMEOUT_S):
            return import_rollout(self, state, noise)

    @without_grad
    def generate(
        self,
        autoregressive_index: int,
        cache: StreamInferencePipelineCache,
        input: Any = None,
    ) -> Any:
        """Generate one chunk.

        Args:
            autoregressive_index: number of the AR step; steps come in order, from 0.
            cache: this rollout's state.
            input: the control input of the step, for methods that have an encoder.

        Returns:
            ``[B, F, 3, height, width]`` in [-1, 1]; without a decoder the latent
            ``[B, C, T, H, W]``. None on a rank that leaves decoding to rank zero.

        Raises:
            ValueError: a step out of order, or an input that no encoder takes.
        """
        cache.check_order("generate", autoregressive_index)
        if self.encoder is None and input is not None:
            raise ValueError(f"{self.config.name} has no encoder, so input must be None.")
        timer = cache.timer
        with self.guard("generate", autoregressive_index), timer.step(autoregressive_index):
            with timer.stage("encode"):
                control = self._encode(input, autoregressive_index, cache)
            with timer.stage("diffuse"):
                latent = self.diffusion_model.generate(
                    autoregressive_index, cache.diffusion, control
                )
            with timer.stage("decode"):
                chunk = self._decode(latent, autoregressive_index, cache)
        cache.next_index += 1
        if chunk is not None:
            for observe in self.observers:
                observe(cache, chunk)
        return chunk

    @without_grad
    def update_prompt(
        self,
        cache: StreamInferencePipelineCache,
        text: str | Sequence[str] | Tensor,
        reencode_window: bool = False,
    ) -> None:
        """Change the prompt of a rollout that is under way.

        May be called before any ``generate`` or ``finalize``. Cross-attention keys and values are
        computed anew in the storage that they have; what the context remembers of past frames stays
        as it was made under the old prompt, unless asked otherwise. Under guidance the negative
        prompt stays.

        Args:
            cache: this rollout's state.
            text: one prompt for the whole batch, one per batch entry, or embeddings
                ``[B, S, text_dim]``.
            reencode_window: run the clean passes of sink and window again under the new prompt,
                oldest frame first, from the clean latents that the rollout keeps. Follows a prompt
                sooner, at the cost of one network pass per chunk in the window.

        Raises:
            ValueError: another number of prompts than the rollout has, or a prompt that the text
                encoder refuses.
            TypeError: the transformer has no prompt that it could change.
        """
        cache.require_live()
        batch_size = cache.diffusion.batch_size
        prompts = [text] * batch_size if isinstance(text, str) else text
        if len(prompts) != batch_size:
            raise ValueError(
                f"The rollout has {batch_size} prompts, the update {len(prompts)}: "
                "give one for all, or one for each."
            )
        with self.guard("update_prompt", cache.next_index, LOAD_TIMEOUT_S):
            encoded = encode_text(self, prompts)
            self.diffusion_model.update_prompt(
                {"text": encoded},
                cache.diffusion,
                pending_index=cache.next_index - 1 if cache.pending else None,
                reencode=reencode_window,
            )
        cache.context["text"] = encoded

    @without_grad
    def finalize(self, autoregressive_index: int, cache: StreamInferencePipelineCache) -> None:
        """Make the chunk just generated part of the context; optional after the last chunk.

        Args:
            autoregressive_index: number of the AR step, as given to ``generate``.
            cache: this rollout's state.

        Raises:
            ValueError: the step is not the one just generated.
        """
        cache.check_order("finalize", autoregressive_index)
        beside = self.diffusion_model.side.work(cache.diffusion)
        with self.guard("finalize", autoregressive_index), beside, cache.timer.stage("finalize"):
            self.diffusion_model.finalize(autoregressive_index, cache.diffusion)

    def end_step(self, autoregressive_index: int, cache: StreamInferencePipelineCache) -> None:
        """Deprecated alias of ``finalize``, to be removed in 0.3; arguments as there."""
        message = "end_step is deprecated and goes in 0.3; call finalize"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        self.finalize(autoregressive_index, cache)

    def _encode(self, input: Any, index: int, cache: StreamInferencePipelineCache) -> Any:
        if self.encoder is None:
            return None
        if isinstance(self.encoder, StreamingEncoder):
            return self.encoder(input, autoregressive_index=index, cache=cache.encoder)
        return self.encoder(input)

    def _decode(
        self, latent: Tensor, index: int, cache: StreamInferencePipelineCache
    ) -> Tensor | None:
        if not self.decodes_here:
            return None
        if self.decoder is None:
            return latent
        if isinstance(self.decoder, StreamingDecoder):
            return self.decoder(latent, autoregressive_index=index, cache=cache.decoder)
        return self.decoder(latent)


def _new_state(part: Component | None, context: dict[str, Any]) -> Any:
    if not isinstance(part, StreamingEncoder | StreamingDecoder):
        return None
    return part.initialize_cache(**select_context(part.initialize_cache, context))
