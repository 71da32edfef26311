"""The pipeline, which runs encoders, diffusion model and decoder through rollouts."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashdreams.infra.conditioning import AFTER_CUT
from flashdreams.infra.config import InstantiateConfig
from flashdreams.infra.decoder.base import Decoder, DecoderConfig, StreamingDecoder
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.rewrite import RewriteMode
from flashdreams.infra.encoder.base import EncoderConfig, StreamingEncoder
from flashdreams.infra.finite import FiniteCheck, NotFiniteError, name_bad_weights
from flashdreams.infra.fork import encode_each
from flashdreams.infra.ranges import check_range
from flashdreams.infra.rollout import StreamInferencePipelineCache, check_state
from flashdreams.infra.saved_rollouts import SavedRollouts, new_state
from flashdreams.parallel.environment import LOAD_TIMEOUT_S, OtherRankError, together
from flashdreams.runtime.grad_mode import grad_off, without_grad
from flashdreams.runtime.noise import NoiseFunction, NoiseSource
from flashdreams.runtime.profiler import StageTimer

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    """Turns prompts into embeddings, once per rollout; None passes ``text`` through."""

    release_text_encoder: bool = False
    """Free the text encoder once the first rollout has its prompt; later prompts are embeddings."""

    image_encoder: EncoderConfig | None = None
    """Turns an image into latents, or into a mapping of context names to tensors, once per rollout;
    None passes ``image`` through."""

    encoder: EncoderConfig | None = None
    """Encodes the control input of every AR step; None for methods without one."""

    decoder: DecoderConfig | None = None
    """Turns latents into frames; None makes ``generate`` return latents."""

    reencode_window: RewriteMode | None = None
    """Sink and window when the prompt changes mid-rollout: None keeps them, ``"chunks"`` and
    ``"once"`` recompute them; see ``update_prompt``."""

    scene_cut_prefix: str | None = None
    """Prefix of a prompt that cuts to another scene, for models with shots; it stays in the
    prompt of the first chunk, and later chunks of the shot have the prompt without it."""

    max_rollouts: int = 1
    """Rollouts of one prompt each that can run as CUDA graphs at a time: storage for that many
    is allocated and captured at warm-up. Further ones run without graphs."""

    def __post_init__(self) -> None:
        check_range(self, "max_rollouts")


ChunkObserver = Callable[[StreamInferencePipelineCache, Tensor], None]
"""Called with the rollout's cache and the chunk, right after each ``generate``."""


class StreamInferencePipeline(SavedRollouts):
    """Streams a rollout chunk by chunk::

        cache = pipeline.initialize_cache(text=["A cat surfing."])
        for i in range(total_blocks):
            chunk = pipeline.generate(autoregressive_index=i, cache=cache)
            pipeline.finalize(autoregressive_index=i, cache=cache)

    Any number of rollouts may interleave: each has its own cache.
    """

    config: StreamInferencePipelineConfig

    def __init__(
        self,
        config: StreamInferencePipelineConfig,
        *,
        device: str | torch.device = "auto",
        load: bool = True,
    ) -> None:
        """Build the components and, unless told otherwise, load their weights; see `Assembly`."""
        super().__init__(config, device=device, load=load)
        self.observers: list[ChunkObserver] = []
        self.default_seed = 0
        """Seed of rollouts that are started without one; a runner sets it to its own."""
        self._unread: list[FiniteCheck] = []
        self._state_is_checked = False

    @without_grad
    def initialize_cache(
        self,
        *,
        text: Sequence[str] | Tensor | None = None,
        negative_text: Sequence[str] | Tensor | None = None,
        image: Any = None,
        seed: int | None = None,
        noise: NoiseFunction | None = None,
        **context: Any,
    ) -> StreamInferencePipelineCache:
        """Start a rollout.

        Args:
            text: one prompt per batch entry, or embeddings ``[B, S, text_dim]``.
            negative_text: the same for the unconditional branch of guidance; None is ``""``.
            image: input of the image encoder or, without one, of the diffusion model.
            seed: of the rollout's noise; None is ``default_seed``.
            noise: replaces the seeded noise: maps ``(AR index, denoising step, shape)`` to a
                float32 tensor of that shape.
            context: keyword context of the components, by the names that they declare.

        Returns:
            The rollout's state.

        Raises:
            TypeError: a keyword that no component declares, the message lists the known ones; or
                an image that none of them takes.
        """
        with self.guard("initialize", None, LOAD_TIMEOUT_S):
            encoder = self.context_encoder
            encoded, negative = encoder.encode(text, negative_text, image, context)
            if self.config.release_text_encoder:
                self.text_encoder = None
            seed = self.default_seed if seed is None else seed
            return self._for_both_branches(
                lambda: self.new_cache(encoded, negative, noise or NoiseSource(seed))
            )

    def new_cache(
        self, context: dict[str, Any], negative_text: Any, noise: NoiseFunction
    ) -> StreamInferencePipelineCache:
        """Fresh state for an encoded context; see ``initialize_cache``.

        Args:
            context: by name, ``batch_size`` among it.
            negative_text: embeddings for the unconditional branch; None without guidance.
            noise: of the rollout.
        """
        negative = None if negative_text is None else {**context, "text": negative_text}
        cache = StreamInferencePipelineCache(
            diffusion=self.diffusion_model.initialize_cache(
                context, negative, noise, context["batch_size"]
            ),
            encoder=new_state(self.encoder, context),
            decoder=new_state(self.decoder, context),
            timer=StageTimer(self.target_device),
            pipeline=self,
            context=context,
            negative_text=negative_text,
        )
        if not self._state_is_checked:
            check_state(cache, self.diffusion_model.transformer.parallel_plan())
            self._state_is_checked = True
        return cache

    def pixel_frames(self, autoregressive_index: int) -> range:
        """Pixel frames of the chunk of an AR step, counted from the beginning of the rollout.

        Without a decoder, latent frames.
        """
        len_t = self.diffusion_model.transformer.config.len_t
        count = self.decoder.frame_count if isinstance(self.decoder, Decoder) else int
        start, stop = autoregressive_index * len_t, (autoregressive_index + 1) * len_t
        return range(count(start) if start else 0, count(stop))

    def encode_prompts(self, text: Sequence[str]) -> Tensor:
        """Embeddings ``[B, S, text_dim]`` of prompts, by this rank's text encoder.

        Not a collective call; only for ranks with a text encoder.
        """
        return self.context_encoder.encode_here(text)

    def prompt_tensors(self, text: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of prompts on the CPU, as the tensors of a prompt's `Command`.

        Beside ``text`` the ``text_after_cut`` of prompts that cut to another scene. Not a
        collective call; only for ranks with a text encoder.
        """
        prompts: dict[str, Any] = self.context_encoder.prompts_of_shot(text)
        return {name: self.encode_prompts(x).detach().cpu() for name, x in prompts.items()}

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
            input: the control input of the step, for methods that have an encoder; of a batch of
                forks a list of one for each.

        Returns:
            ``[B, F, 3, height, width]`` in [-1, 1]; without a decoder the latent
            ``[B, C, T, H, W]``. None on a rank that does not decode.

        Raises:
            ValueError: a step out of order, an input that the encoder refuses, or one without an
                encoder; the rollout is then unchanged. After another error the step may be made
                again, or is refused if encoder or decoder had begun to change their state.
            NotFiniteError: the AR step before this one has made NaN or infinite values; on a GPU,
                where checks are read late, also the one before that.
        """
        cache.check_order("generate", autoregressive_index)
        self._refuse_bad_values([cache.finite], wait=False)
        if self.encoder is None and input is not None:
            raise ValueError(f"{self.config.name} has no encoder, so input must be None.")
        timer = cache.timer
        # What the diffusion model has begun it overwrites; a streaming encoder has moved on.
        again = () if isinstance(self.encoder, StreamingEncoder) else (BaseException,)
        watched = self.guard("generate", autoregressive_index)
        with grad_off(), watched, timer.step(autoregressive_index):
            with timer.stage("encode"), cache.changing(*again, ValueError, TypeError):
                control = self._encode(input, autoregressive_index, cache)
            with timer.stage("diffuse"), cache.changing(*again):
                latent = self.diffusion_model.generate(
                    autoregressive_index, cache.diffusion, control
                )
            with timer.stage("decode"), cache.changing():
                chunk = self._decode(latent, autoregressive_index, cache)
                cache.next_index += 1
        stages = {"encode": control, "diffuse": latent, "decode": chunk}
        cache.finite.submit(autoregressive_index, stages)
        others = (check for check in self._unread if check is not cache.finite)
        self._unread = [cache.finite, *(check for check in others if not check.is_settled)]
        if chunk is not None:
            for observe in self.observers:
                observe(cache, chunk)
        return chunk

    def check_values(self, cache: StreamInferencePipelineCache | None = None) -> None:
        """Refuse to continue from NaN or infinite values.

        ``generate`` checks the AR steps before; call this after the last one. May wait for
        that step.

        Args:
            cache: the rollout; None asks about the last AR steps of all rollouts.

        Raises:
            NotFiniteError: names AR step, stage and any non-finite weights.
        """
        asked = self._unread if cache is None else [cache.finite]
        self._unread = [check for check in self._unread if check not in asked]
        self._refuse_bad_values(asked, wait=True)

    def _refuse_bad_values(self, checks: Sequence[FiniteCheck], *, wait: bool) -> None:
        for check in checks:
            if found := check.read(wait=wait):
                raise NotFiniteError(f"{found} {name_bad_weights(self)}")

    @without_grad
    def update_prompt(
        self,
        cache: StreamInferencePipelineCache,
        text: str | Sequence[str] | Tensor,
        reencode_window: bool | RewriteMode | None = None,
        begins_shot: bool | None = None,
        text_after_cut: Tensor | None = None,
    ) -> None:
        """Change the prompt of a running rollout.

        May be called before any ``generate`` or ``finalize``. Cross-attention keys and values are
        recomputed in place; the cached keys and values of earlier frames
        stay those of the old prompt, unless requested otherwise. Under guidance the
        negative prompt stays.

        Args:
            cache: this rollout's state.
            text: one prompt for the whole batch, one per batch entry, or embeddings
                ``[B, S, text_dim]``.
            reencode_window: recompute sink and window under the new prompt, from the clean
                latents that the rollout keeps. True or ``"chunks"``: one clean pass per chunk,
                oldest first; ``"once"``: one pass over all frames. Follows a prompt sooner. None:
                the config's choice.
            begins_shot: whether the next chunk begins a shot, for models with shots;
                None: whether the text begins with the config's ``scene_cut_prefix``.
            text_after_cut: embeddings for the chunks of the shot after the first. None: those of
                the text without the prefix, if it has one.

        Raises:
            ValueError: a number of prompts that does not fit the rollout, a prompt that the text
                encoder refuses, or a shot that begins while a chunk is not finalized.
            TypeError: the transformer cannot change its prompt.
        """
        cache.require_live()
        batch_size = cache.diffusion.batch_size
        prompts = [text] * batch_size if isinstance(text, str) else text
        if len(prompts) != batch_size:
            raise ValueError(
                f"The rollout has {batch_size} prompts, the update {len(prompts)}: "
                "give one for all, or one for each."
            )
        if begins_shot is None:
            begins_shot = isinstance(prompts[0], str) and self.begins_shot(prompts[0])
        if begins_shot and cache.pending:
            raise ValueError("A shot begins between AR steps: call finalize first.")
        if begins_shot and not self.diffusion_model.streams:
            raise ValueError("A bidirectional model makes one clip and has no shots.")
        if reencode_window is None:
            reencode_window = self.config.reencode_window
        with self.guard("update_prompt", cache.next_index, LOAD_TIMEOUT_S):
            encoder = self.context_encoder
            shot = {n: encoder.encode_text(x) for n, x in encoder.prompts_of_shot(prompts).items()}

            def update() -> None:
                self.diffusion_model.update_prompt(
                    {**cache.context, "text": shot["text"]},
                    cache.diffusion,
                    pending_index=cache.next_index - 1 if cache.pending else None,
                    reencode="chunks" if reencode_window is True else reencode_window or None,
                )

            with cache.changing(ValueError, TypeError, OtherRankError):
                self._for_both_branches(update)
                for branch in cache.diffusion.branches if begins_shot else ():
                    self.diffusion_model.transformer.begin_shot(branch)
                cache.context.pop(AFTER_CUT, None)
                cache.context |= shot
                if text_after_cut is not None:
                    cache.context[AFTER_CUT] = text_after_cut

    def _for_both_branches(self, work: Callable[[], T]) -> T:
        """Do something with a prompt; if the ranks of one branch of guidance refuse it, all do."""
        if self.layout.branches_apart:
            return together(work, "refused the prompt")
        return work()

    def begins_shot(self, text: str | None) -> bool:
        """Whether a prompt cuts to another scene, by the prefix in the config."""
        prefix = self.config.scene_cut_prefix
        return text is not None and prefix is not None and text.startswith(prefix)

    @without_grad
    def finalize(self, autoregressive_index: int, cache: StreamInferencePipelineCache) -> None:
        """Make the generated chunk part of the context; optional after the last chunk.

        Args:
            autoregressive_index: number of the AR step, as given to ``generate``.
            cache: this rollout's state.

        Raises:
            ValueError: the step is not the one that was generated last.
        """
        cache.check_order("finalize", autoregressive_index)
        beside = self.diffusion_model.side.work(cache.diffusion)
        watched = self.guard("finalize", autoregressive_index)
        with watched, beside, cache.timer.stage("finalize"), cache.changing():
            self.diffusion_model.finalize(autoregressive_index, cache.diffusion)
        if AFTER_CUT in cache.context:
            self.update_prompt(cache, cache.context[AFTER_CUT])

    def end_step(self, autoregressive_index: int, cache: StreamInferencePipelineCache) -> None:
        """Deprecated alias of ``finalize``, to be removed in 0.3; arguments as there."""
        message = "end_step is deprecated and will be removed in 0.3; call finalize"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        self.finalize(autoregressive_index, cache)

    def _encode(self, input: Any, index: int, cache: StreamInferencePipelineCache) -> Any:
        if self.encoder is None:
            return None
        if cache.forks is not None:
            return encode_each(lambda x, own: self._encode_one(x, index, own), input, cache)
        return self._encode_one(input, index, cache.encoder)

    def _encode_one(self, input: Any, index: int, state: Any) -> Any:
        try:
            if isinstance(self.encoder, StreamingEncoder):
                return self.encoder(input, autoregressive_index=index, cache=state)
            return self.encoder(input)
        except (TypeError, AttributeError) as error:
            if input is not None:
                raise
            raise ValueError(
                f"AR step {index}: {type(self.encoder).__name__} cannot encode None ({error}). "
                f"{self.config.name} has an encoder: generate needs input=..., its control input."
            ) from error

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
