"""The diffusion model: one AR step as noise, denoising loop and clean pass."""

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.infra.component import build_component, declared_context, select_context
from flashdreams.infra.config import InstantiateConfig
from flashdreams.infra.diffusion.given import (
    INITIAL_LATENT,
    check_image,
    check_initial_latent,
    given_chunk,
    sample_rest,
)
from flashdreams.infra.diffusion.pool import Storage, StoragePool
from flashdreams.infra.diffusion.rewrite import RewriteMode
from flashdreams.infra.diffusion.scheduler.base import SchedulerConfig
from flashdreams.infra.diffusion.transformer import ContextChunk, TransformerConfig
from flashdreams.infra.ranges import LARGEST_SIZE, check_range
from flashdreams.parallel.environment import all_ranks_agree
from flashdreams.parallel.guidance import Guidance
from flashdreams.parallel.plan import state
from flashdreams.runtime.cuda_graph import GraphedCallable
from flashdreams.runtime.noise import NoiseFunction, NoiseSource
from flashdreams.runtime.streams import SideStream
from flashdreams.runtime.transfer import to_device

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DiffusionModelConfig(InstantiateConfig):
    """A transformer and the scheduler of its denoising loop."""

    _target: type["DiffusionModel"] = field(default_factory=lambda: DiffusionModel)

    transformer: TransformerConfig
    """Predicts the flow."""

    scheduler: SchedulerConfig
    """Noise levels and the steps between them."""

    first_chunk_scheduler: SchedulerConfig | None = None
    """Schedule of the first generated chunk, which has no context, or only an image;
    None is ``scheduler``. Its timesteps have the type of the others."""

    guidance_scale: float | None = None
    """Weight s of classifier-free guidance, ``uncond + s * (cond - uncond)``; None runs the
    conditional branch only."""

    context_noise: float = 0.0
    """Timestep of the clean pass, 0 to 1000; a whole number if those of the schedule are. The
    chunk is used without added noise."""

    first_latent_from_image: bool = False
    """Use the encoded ``image`` as the latents of the first AR step instead of generating them. One
    image is one latent frame; with a larger ``len_t`` give latents of a video's first frames."""

    first_frames_from_image: bool = False
    """Fix the first latent frames of the first AR step to the encoded ``image``: they are set
    before the first denoising step and after every one, and their timestep is 0. For networks that
    are trained with one timestep per latent frame or token; without an image all are generated."""

    overlap_clean_pass: bool = True
    """On CUDA, run the clean pass of a chunk beside its decoding and its copies to the host. Takes
    memory for the activations of both; ranks that split the decoder among them do not overlap."""

    def __post_init__(self) -> None:
        check_range(self, "context_noise", least=0, most=1000)
        check_range(self, "guidance_scale", least=-LARGEST_SIZE)
        if self.guidance_scale is not None and getattr(self.transformer, "text_dim", None) == 0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: guidance is by the prompt, and this "
                "transformer takes none (text_dim=0); set it to None."
            )
        if self.first_latent_from_image and self.first_frames_from_image:
            raise ValueError(
                "first_latent_from_image and first_frames_from_image: an image is either all of "
                "the first AR step or its first frames; set one of them."
            )

    @property
    def begins_with_image(self) -> bool:
        """Whether an image may give latent frames."""
        return self.first_latent_from_image or self.first_frames_from_image


@dataclass(frozen=True)
class CleanChunk:
    """A finished AR step whose frames are still in the context, in part or in full."""

    autoregressive_index: int = state("host")
    latent: Tensor = state("whole")
    """``[B, C, T, H, W]`` float32."""
    control: Any = state("whole")
    """The control input of the step."""


@dataclass
class DiffusionCache:
    """All state that the diffusion model has in one rollout."""

    conditional: Any
    """The transformer's cache under the prompt; None on a rank that evaluates the other branch."""
    unconditional: Any | None
    """The same under the negative prompt; None without guidance, or on a rank of the other."""
    noise: NoiseFunction = state("rebuilt")
    batch_size: int = state("host")
    image: Tensor | None = state("rebuilt")
    """``[B, C, n, H, W]``, latent frames that an image or ``initial_latent`` gives: those of the
    first AR steps, or the first ones of the first."""
    latent: Tensor | None = state("whole", default=None)
    """``[B, C, T, H, W]`` float32, the last clean chunk."""
    control: Any = state("rebuilt", default=None)
    """The control input of the last chunk."""
    given_steps: int = state("host", default=0)
    """AR steps whose latents an image or a video gives."""
    pending: bool = state("rebuilt", default=False)
    """The last chunk has not had its clean pass yet."""
    history: list[CleanChunk] = state("whole", default_factory=list)
    """Clean latents of the frames in sink and window, oldest first."""
    carried: Tensor | None = state("whole", default=None)
    to_carry: Tensor | None = state("rebuilt", default=None)
    """``[B, ...]`` of the schedule for the next chunk, as of the last clean pass and chunk."""
    prompt_is_newer: bool = state("host", default=False)
    """The prompt has changed after the last clean pass."""
    give_back: Callable[[], Any] | None = state("rebuilt", default=None)
    """Returns leased storage, once; None for own storage. Also called for a rollout that is
    forgotten."""
    released: bool = state("rebuilt", default=False)
    """The rollout has been released."""

    @property
    def branches(self) -> list[Any]:
        """The transformer caches in use."""
        return [c for c in (self.conditional, self.unconditional) if c is not None]

    def release(self) -> None:
        """End the rollout; its storage is free for another one."""
        self.conditional = self.unconditional = self.control = self.carried = self.to_carry = None
        self.history, self.pending = [], False
        self.released = True
        if self.give_back is not None:
            self.give_back()


class DiffusionModel(nn.Module):
    """Runs the denoising loop of one chunk after the other; holds no rollout state."""

    config: DiffusionModelConfig

    def __init__(self, config: DiffusionModelConfig) -> None:
        super().__init__()
        self.config = config
        self.guidance = Guidance()
        self.transformer = build_component(config.transformer)
        self.scheduler = config.scheduler.setup()
        self.first_chunk_scheduler = self.scheduler
        if config.first_chunk_scheduler is not None:
            self.first_chunk_scheduler = config.first_chunk_scheduler.setup()
            dtypes = [s.timesteps.dtype for s in (self.scheduler, self.first_chunk_scheduler)]
            if dtypes[0] != dtypes[1]:
                raise ValueError(
                    f"scheduler has timesteps in {dtypes[0]}, first_chunk_scheduler in {dtypes[1]};"
                    " use the same kind for both."
                )
        if not self.scheduler.timesteps.is_floating_point() and config.context_noise % 1:
            raise ValueError(
                f"context_noise={config.context_noise}: this schedule has whole timesteps; give "
                f"{math.floor(config.context_noise)} or {math.ceil(config.context_noise)}."
            )
        self.pool: StoragePool | None = None
        self.may_overlap = config.overlap_clean_pass

    @cached_property
    def side(self) -> SideStream:
        """Stream of clean passes. Code that uses a rollout's state must join it first.

        This also applies across rollouts, because captured calls share memory.
        """
        return SideStream(self._device if self.may_overlap else torch.device("cpu"))

    @cached_property
    def _device(self) -> torch.device:
        """Of the loaded transformer."""
        return self.transformer.device

    @property
    def streams(self) -> bool:
        """Whether a rollout has more than one AR step; not if the model is bidirectional."""
        return getattr(self.transformer.config, "streaming", True)

    def known_context(self) -> frozenset[str]:
        """Names of the context that a rollout takes."""
        own = {INITIAL_LATENT} if self.streams else set()
        return declared_context(self.transformer.initialize_cache) | own

    def initialize_cache(
        self,
        context: Mapping[str, Any],
        negative_context: Mapping[str, Any] | None,
        noise: NoiseFunction,
        batch_size: int,
    ) -> DiffusionCache:
        """Start a rollout.

        Args:
            context: what the rollout is conditioned on, by name. ``initial_latent``, clean latents
                ``[B, C, n * T, H, W]`` of a streaming model's first n AR steps, is not generated
                but decoded and made part of the context; noise is numbered by the AR step.
            negative_context: the same for the unconditional branch; None without guidance.
            noise: noise of (AR index, denoising step, shape).
            batch_size: B.
        """
        self.side.join()
        given = self._given_latents(context, batch_size)
        guided = negative_context is not None
        with_prompt = not guided or self.guidance.evaluates_conditional
        with_negative = guided and self.guidance.evaluates_unconditional
        contexts = (context if with_prompt else None, negative_context if with_negative else None)
        leased = self.pool.lease(lambda s: self._begin_in(s, contexts)) if self.pool else None
        conditional, unconditional = leased or tuple(self._new_branch(c) for c in contexts)
        cache = DiffusionCache(conditional, unconditional, noise, batch_size, given)
        cache.given_steps = 0 if given is None else given.shape[2] // self.transformer.config.len_t
        if self.pool is not None and leased is not None:
            cache.give_back = weakref.finalize(cache, self.pool.give_back, leased)
            cache.give_back.atexit = False
        return cache

    def _new_branch(self, context: Mapping[str, Any] | None) -> Any:
        make = self.transformer.initialize_cache
        return None if context is None else make(**select_context(make, context))

    def _begin_in(self, storage: Storage, contexts: Sequence[Mapping[str, Any] | None]) -> bool:
        begin = self.transformer.reuse_cache
        return all(
            begin(branch, **select_context(begin, context))
            for branch, context in zip(storage, contexts, strict=True)
            if context is not None
        )

    def warm_up(self, max_rollouts: int = 1) -> int:
        """Run AR steps with dummy values until every network call has run with all its shapes.

        One denoising step each: the others differ only in values. Where calls are captured, every
        storage of the pool is stepped through, and nothing is captured afterwards. A collective
        call.

        Args:
            max_rollouts: size of the pool.

        Returns:
            The number of AR steps; 0 if first calls build nothing, or if the
            transformer names no dummy context.
        """
        transformer = self.transformer
        context = transformer.example_context(1)
        if context is None or not transformer.needs_warm_up:
            return 0
        captured = [call for call in transformer.graphed_calls() if call.can_capture]
        negative = None if self.config.guidance_scale is None else context
        storages: list[Storage] = []
        steps = 0
        for _ in range(max_rollouts if captured else 1):
            cache = self.initialize_cache(context, negative, NoiseSource(0), 1)
            storages.append((cache.conditional, cache.unconditional))
            steps += self.step_through(cache)
        if captured:
            self.pool = StoragePool(storages)
            states = [branch for storage in storages for branch in storage if branch is not None]
            for call in captured:
                call.seal(states)
            self._drop_inexact_graphs(captured, states)
        return steps

    def _drop_inexact_graphs(self, captured: Sequence[GraphedCallable], states: list[Any]) -> None:
        """Keep graphs only if a replay gave the bits of an eager call on every rank."""
        control = self.transformer.example_control(1)
        # No rank may stop at a difference: the others' calls contain collectives.
        exact = all([self.transformer.replay_is_exact(branch, control) for branch in states])
        failed = any(call.failure is not None for call in captured)  # which was already reported
        if all_ranks_agree(exact and not failed):
            return
        reason = "a replay differed from an eager call"
        if exact and not failed:
            reason = "a capture failed, or a replay differed from an eager call, on another rank"
        for call in captured:
            call.drop()
            call.failure = call.failure or reason
        if not failed:
            logger.warning("CUDA graphs are off: %s. Runs continue eagerly.", reason)

    def step_through(self, cache: DiffusionCache) -> int:
        """A rollout of dummy values until all AR steps are alike; returns their number."""
        transformer = self.transformer
        latent = torch.zeros(
            transformer.latent_shape(1), device=transformer.device, dtype=torch.float32
        )
        timestep = self.scheduler.timesteps[0]
        control = transformer.example_control(1)
        for index in range(transformer.warm_up_steps):
            self._begin_step(index, cache, control)
            cache.latent, cache.control = self._flow(cache)(latent, timestep), control
            cache.pending = True
            self.side.mark()
            with self.side.work(cache):  # the stream has its own handles and memory
                self.finalize(index, cache)
            self.side.join()
        return transformer.warm_up_steps

    def generate(self, autoregressive_index: int, cache: DiffusionCache, control: Any) -> Tensor:
        """Denoise one chunk.

        Args:
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state.
            control: output of the pipeline's encoder, handed to the transformer.

        Returns:
            ``[B, C, T, H, W]`` float32, also kept as ``cache.latent``.
        """
        self.side.join()
        self._begin_step(autoregressive_index, cache, control)
        given = cache.image
        if given is not None and autoregressive_index < cache.given_steps:
            latent = given_chunk(given, autoregressive_index, self.transformer.config.len_t)
        else:
            flow, noise = self._flow(cache), self._noise_of_step(autoregressive_index, cache)
            first = autoregressive_index == cache.given_steps
            scheduler = self.first_chunk_scheduler if first else self.scheduler
            if given is not None and autoregressive_index == 0:
                latent = sample_rest(scheduler, flow, noise, given)
            elif scheduler.carries:
                latent, cache.to_carry = scheduler.sample_chunk(flow, noise, cache.carried)
            else:
                latent = scheduler.sample(flow, noise)
        cache.latent, cache.control, cache.pending = latent, control, True
        self.side.mark()
        return latent

    def _begin_step(self, index: int, cache: DiffusionCache, control: Any) -> None:
        for branch in cache.branches:
            self.transformer.begin_step(index, branch, control)

    def finalize(self, autoregressive_index: int, cache: DiffusionCache) -> None:
        """The clean pass over the chunk that ``generate`` left in ``cache.latent``."""
        if cache.latent is None:
            raise ValueError("There is no chunk to finalize; call generate first.")
        timestep = self.context_timestep
        for branch in cache.branches:
            self.transformer.update_cache(cache.latent, timestep, branch)
        cache.pending = cache.prompt_is_newer = False
        cache.carried = cache.to_carry
        self._remember(CleanChunk(autoregressive_index, cache.latent, cache.control), cache)
        self.draw_ahead(autoregressive_index + 1, cache)

    def draw_ahead(self, autoregressive_index: int, cache: DiffusionCache) -> None:
        """Draw the first noise of a step, while the device is busy and the host is free."""
        if self._device.type == "cuda" and isinstance(cache.noise, NoiseSource):
            # A callable is called when its noise is needed.
            shape = self.transformer.latent_shape(cache.batch_size)
            cache.noise.draw_ahead(autoregressive_index, 0, shape)

    def _remember(self, chunk: CleanChunk, cache: DiffusionCache) -> None:
        """Record that a chunk is part of the context, and drop those that no longer are."""
        count = chunk.latent.shape[2]
        held = {frame // count for frame in self._held_frames(cache)}
        chunks = [*cache.history, chunk]
        cache.history = [c for c in chunks if c.autoregressive_index in held]

    def update_prompt(
        self,
        context: Mapping[str, Any],
        cache: DiffusionCache,
        *,
        pending_index: int | None = None,
        reencode: RewriteMode | None = None,
    ) -> None:
        """Change the prompt of the conditional branch.

        Args:
            context: encoded, by name.
            cache: this rollout's state.
            pending_index: the AR step that is generated and not yet finalized; None between steps.
            reencode: how sink and window are recomputed; None: they are not.
        """
        self.side.join()
        for either in cache.branches if reencode is not None else ():
            self.transformer.check_rewrite(either, reencode)  # alike on all ranks
        branch = cache.conditional
        if branch is None:
            return
        update = self.transformer.update_context
        update(branch, **select_context(update, context))
        if reencode is not None:
            arguments = (branch, self.held_chunks(cache), self.context_timestep)
            mode = {} if reencode == "chunks" else {"mode": reencode}
            self.transformer.rewrite_context(*arguments, **mode)
        if reencode is not None and pending_index is not None:
            self.transformer.begin_step(pending_index, branch, cache.control)
        cache.prompt_is_newer = True
        self.side.mark()

    def rebuild_context(self, cache: DiffusionCache) -> None:
        """Recompute sink and window from the clean latents of the context."""
        self.side.join()
        chunks = self.held_chunks(cache)
        for branch in cache.branches:
            self.transformer.check_rewrite(branch, "chunks")
            self.transformer.rewrite_context(branch, chunks, self.context_timestep)

    def held_chunks(self, cache: DiffusionCache) -> list[ContextChunk]:
        """The clean latents of the frames in the context."""
        held = set(self._held_frames(cache))
        chunks = []
        for chunk in cache.history:
            frames = self._frames_of(chunk)
            kept = tuple(t for t, frame in enumerate(frames) if frame in held)
            if kept:
                latent = chunk.latent[:, :, list(kept)]
                chunks.append(
                    ContextChunk(
                        frames=tuple(frames[t] for t in kept),
                        kept=kept,
                        latent=latent,
                        control=chunk.control,
                    )
                )
        return chunks

    @cached_property
    def context_timestep(self) -> Tensor:
        """Timestep of the clean pass, 0-dim on the CPU."""
        return torch.tensor(
            self.config.context_noise, dtype=self.scheduler.timesteps.dtype, device="cpu"
        )

    def _frames_of(self, chunk: CleanChunk) -> range:
        count = chunk.latent.shape[2]
        return range(chunk.autoregressive_index * count, (chunk.autoregressive_index + 1) * count)

    def _held_frames(self, cache: DiffusionCache) -> list[int]:
        return [f for branch in cache.branches[:1] for f in self.transformer.context_frames(branch)]

    def _flow(self, cache: DiffusionCache) -> Callable[[Tensor, Tensor], Tensor]:
        scale = self.config.guidance_scale
        if scale is None:
            return self._predict_in(cache.conditional)
        conditional = self._predict_in(cache.conditional)
        unconditional = self._predict_in(cache.unconditional)
        return lambda latent, timestep: self.guidance(
            lambda: conditional(latent, timestep), lambda: unconditional(latent, timestep), scale
        )

    def _predict_in(self, branch: Any) -> Callable[[Tensor, Tensor], Tensor]:
        predict = self.transformer.predict_flow
        if "cache" in declared_context(predict):
            return partial(predict, cache=branch)  # one call less between loop and kernel
        return lambda latent, timestep: predict(latent, timestep, branch)

    def _noise_of_step(
        self, autoregressive_index: int, cache: DiffusionCache
    ) -> Callable[[int], Tensor]:
        shape = self.transformer.latent_shape(cache.batch_size)
        device = self._device

        def noise(denoising_step: int) -> Tensor:
            drawn = cache.noise(autoregressive_index, denoising_step, shape)
            if not isinstance(drawn, Tensor) or drawn.is_meta or tuple(drawn.shape) != shape:
                got = f"a {type(drawn).__name__}"
                if isinstance(drawn, Tensor):
                    got = f"{list(drawn.shape)}{' without values' * drawn.is_meta}"
                raise ValueError(f"The noise must be a tensor {list(shape)}; got {got}.")
            return to_device(drawn, device)

        return noise

    def _given_latents(self, context: Mapping[str, Any], batch_size: int) -> Tensor | None:
        """Latents of the first AR steps given by the context, on the device in float32."""
        image = context.get("image") if self.config.begins_with_image else None
        initial = context.get(INITIAL_LATENT)
        shape = self.transformer.latent_shape(batch_size)
        if initial is not None and image is not None:
            raise ValueError(f"{INITIAL_LATENT} already has the first latent frames; omit image.")
        if initial is not None:
            given = check_initial_latent(initial, shape)
        elif image is not None:
            whole = self.config.first_latent_from_image
            given = check_image(image, shape, is_whole=whole)
        else:
            return None
        return given.to(self.transformer.device, torch.float32)
