"""The causal engine: everything that networks which stream chunk by chunk have in common.

Shape letters: B batch, C channels, T latent frames, H W latent rows and columns, L query tokens,
S key tokens, N heads, D head dim. Tokens run frame by frame, row by row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.choose import AttentionShape, KVSplitsOf
from flashdreams.attention.core import bind_cores
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.fp8 import check_fp8
from flashdreams.attention.rope import RotaryEmbedding3D, time_rotation
from flashdreams.infra.diffusion import rewrite
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.diffusion.causal_state import (
    MAX_TIMESTEPS,
    CausalState,
    Shots,
    StepInputs,
    attention_over,
    checked_condition,
    copy_tensors,
    graph_key,
    graph_state,
    same_shapes,
    scales_by_glob,
    token_values_to_pixels,
)
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.finite import tensors_in
from flashdreams.parallel.plan import glob_pattern
from flashdreams.runtime.cuda_graph import GraphedCallable
from flashdreams.runtime.noise import NoiseSource
from flashdreams.runtime.transfer import to_device


class CausalTransformer(Transformer):
    """The streaming engine around a network: cursors, KV caches, step inputs, graphs, rewriting.

    A family has ``forward``, ``modulations`` and ``cache_specs``; ``project_context`` if it has
    a prompt or image tokens, and ``embed_control`` if it is steered. Cores are found by the globs
    of ``cache_specs``, so wrapped cores allocate their own caches.
    """

    config: CausalTransformerConfig
    streams_condition: ClassVar[bool] = False
    """The condition may come chunk by chunk with the control, see ``step_condition``, and not
    with ``initialize_cache``."""

    def __init__(self, config: CausalTransformerConfig) -> None:
        super().__init__(config)
        self.rope = RotaryEmbedding3D(config.head_dim)

    # Implemented by a family.

    def forward(
        self,
        latent: Tensor,
        modulation: Tensor,
        inputs: StepInputs,
        state: CausalState,
        write_only: bool = False,
    ) -> Tensor:
        """The network call; everything it reads that can change is in its arguments.

        Args:
            latent: ``[B, C, T, H, W]`` float32.
            modulation: what ``modulations`` made of the timestep.
            inputs: rotations, condition and control of the chunk.
            state: KV caches, whose slots of the chunk are overwritten, and the context.
            write_only: the output is not used: a network may stop once the keys and values of its
                last layer are written, and return an empty tensor.

        Returns:
            ``[B, C, T, H, W]`` float32: flow or x0, as ``config.prediction`` says.

        Raises:
            TypeError: the subclass does not define it.
        """
        raise TypeError(
            f"{type(self).__name__} does not define forward(latent, modulation, inputs, state)."
        )

    def modulations(self, timestep: Tensor) -> Tensor:
        """Modulation of the network by a timestep; computed once per timestep value and rollout.

        Args:
            timestep: ``[B]``, ``[B, T]`` (one per latent frame) or ``[B, L]`` (one per token).

        Returns:
            A tensor for ``forward``; the default returns the timestep.
        """
        return timestep

    def project_context(self, text: Tensor | None, image_tokens: Tensor | None) -> Any:
        """Keys and values of cross-attention, or anything else that depends on the prompt only.

        Args:
            text: ``[B, S, text_dim]``, None if the rollout has no text.
            image_tokens: ``[B, S, image_dim]``, None if the rollout has no image.

        Returns:
            None, or a dataclass whose fields declare their styles (`flashdreams.parallel.plan`).
        """
        return None

    def embed_control(self, control: Any) -> Any:
        """A chunk's control input in the form that ``forward`` reads, once per AR step.

        Args:
            control: output of the pipeline's encoder, ``[B, L, ...]``; None without control.

        Returns:
            Tensors, or lists, tuples and mappings of these; None.

        Raises:
            ValueError: control for a network that takes none.
        """
        if control is not None:
            raise ValueError(f"{type(self).__name__} takes no control input.")
        return None

    def step_condition(self, control: Any) -> Tensor | None:
        """The chunk's ``[B, condition_channels, T, H, W]``, if its control contains it.

        None: it is read by position from the condition of ``initialize_cache``.
        """
        return None

    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        """Glob of attention cores -> spec of the KV cache of each, for the whole model.

        A family whose layers have several caches names each; see `cache_spec` for one of them.
        """
        return {}

    def rotations(self, frames: Tensor) -> Any:
        """Rotary tables of latent frames ``[T]``; the default is ``[L, D/2, 2]`` of ``rope``."""
        return self.rope(frames, *self.config.token_grid, self.device)

    # Implemented by the engine.

    def cache_spec(self, batch_size: int, **changes: Any) -> KVCacheSpec:
        """Spec of the KV cache of one self-attention layer, from the config.

        Args:
            batch_size: B.
            changes: fields of the spec to override, such as the window of a second kind of cache.
        """
        c = self.config
        spec = KVCacheSpec(
            batch_size=batch_size,
            sink_size_t=c.sink_size_t,
            window_size_t=c.window_size_t,
            tokens_per_frame=c.tokens_per_frame,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
            device=self.device,
            storage=c.kv_storage,
        )
        spec = replace(spec, **changes)
        return replace(spec, relative_sink=c.relative_rope and spec.sink_size_t > 0)

    def initialize_cache(
        self,
        text: Tensor | None = None,
        image_tokens: Tensor | None = None,
        condition: Tensor | None = None,
        batch_size: int | None = None,
    ) -> CausalState:
        """Compute what depends on the context only and allocate the KV caches.

        Args:
            text: ``[B, S, text_dim]``, for networks with a prompt.
            image_tokens: ``[B, S, image_dim]``, for networks with image cross-attention.
            condition: ``[B, condition_channels, F, H, W]``, read by position; latent frames past
                the last one see that one.
            batch_size: B, if neither text nor image tokens are given; None means 1.

        Raises:
            ValueError: a shape that does not fit the config.
        """
        context = self.project_context(text, image_tokens)
        given = [x for x in (text, image_tokens) if x is not None]
        count = len(given[0]) if given else batch_size or 1
        condition = self._rollout_condition(condition, count)
        cursors: dict[tuple[int, int, int], Cursor] = {}
        caches: dict[str, list[KVCache | None]] = {}
        for glob, spec in self.cache_specs(count).items():
            cores = self._cores(glob)
            if not self.config.streaming:
                caches[glob] = [None] * len(cores)
                continue
            sizes = (spec.sink_size_t, spec.window_size_t, spec.tokens_per_frame)
            cursor = cursors.setdefault(sizes, Cursor(*sizes))
            caches[glob] = [core.new_cache(spec, cursor) for core in cores]
        if not cursors:  # positions are also needed without a cache
            sizes = (0, self.config.len_t, self.config.tokens_per_frame)
            cursors[sizes] = Cursor(*sizes)
        return CausalState(
            context=context,
            scales=scales_by_glob(caches),
            caches=caches,
            cursors=list(cursors.values()),
            condition=condition,
            batch_size=count,
        )

    def reuse_cache(
        self,
        cache: CausalState,
        text: Tensor | None = None,
        image_tokens: Tensor | None = None,
        condition: Tensor | None = None,
        batch_size: int | None = None,
    ) -> bool:
        """Start a rollout in the storage of an earlier one; see ``initialize_cache``."""
        given = [x for x in (text, image_tokens) if x is not None]
        if (len(given[0]) if given else batch_size or 1) != cache.batch_size:
            return False
        context = self.project_context(text, image_tokens)
        condition = self._rollout_condition(condition, cache.batch_size)
        if not same_shapes(cache.context, context):
            return False
        copy_tensors(cache.context, context)
        cache.condition = condition
        cache.shots = Shots()
        for cursor in cache.cursors:
            cursor.reset()
        cache.scales = scales_by_glob(cache.caches)
        for scales in tensors_in(cache.scales):
            scales.zero_()
        return True

    def update_context(
        self, cache: CausalState, text: Tensor, image_tokens: Tensor | None = None
    ) -> None:
        """Change the prompt: its keys and values replace the old ones in place.

        Args:
            cache: this rollout's state.
            text: ``[B, S, text_dim]``, as in ``initialize_cache``; B must stay the same.
            image_tokens: those of ``initialize_cache``.

        Raises:
            ValueError: a shape that does not fit the config or the rollout.
        """
        if len(text) != cache.batch_size:
            raise ValueError(f"The rollout has {cache.batch_size} prompts; got {len(text)}.")
        copy_tensors(cache.context, self.project_context(text, image_tokens))

    def begin_step(
        self, autoregressive_index: int, cache: CausalState, control: Any = None
    ) -> None:
        """Assign cache slots to the chunk and fill the step inputs."""
        for cursor in cache.cursors:
            cursor.begin_step(self.config.len_t, self.device)
        if self.config.kv_storage == "fp8" and not cache.scales:
            # The state was exported with precision="native" before its first chunk.
            cache.scales = scales_by_glob(cache.caches)
        self.rotate_sinks(cache)
        frames = torch.arange(cache.cursor.start, cache.cursor.end, dtype=torch.int64, device="cpu")
        cache.inputs.fill(self.inputs_at(cache, frames, control))

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: CausalState) -> Tensor:
        """Predict ``noise - x0``; see the contract."""
        network = self._network_for(cache, per_frame=timestep.ndim > 1)
        output = network(latent, self.modulation_of(timestep, cache), cache.inputs, cache)
        if self.config.prediction == "flow":
            return output
        sigma = to_device(timestep, latent.device).float() / 1000
        if sigma.ndim > 0:
            sigma = token_values_to_pixels(sigma, latent.shape[2:], self.config.patch_size)
        return (latent.float() - output) / sigma

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: CausalState) -> None:
        """Write the clean chunk's keys and values and advance to the next chunk.

        Nothing after the last of them is computed. A bidirectional model has no cache, so
        its network is not run.
        """
        c = self.config
        if c.streaming:
            if cache.shots.opening and c.shot_clean_recache:
                for cursor in cache.cursors:
                    cursor.drop_past(self.device)
            network = self._network_for(cache, write_only=True)
            network(latent, self.modulation_of(timestep, cache), cache.inputs, cache, True)
        for layer in cache.layers():
            layer.keep_sink()
        for cursor in cache.cursors:
            if cache.shots.opening and c.shot_sink_size_t:
                cursor.pin(range(cursor.start, min(cursor.start + c.shot_sink_size_t, cursor.end)))
            cursor.advance()
        cache.shots.opening = False

    context_frames = rewrite.context_frames
    check_rewrite = rewrite.check_rewrite
    rewrite_context = rewrite.rewrite_context

    def begin_shot(self, cache: CausalState) -> None:
        """Make the next chunk begin a shot: called between AR steps, once per shot.

        The first ``shot_sink_size_t`` frames of that chunk are pinned once they are clean, in place
        of those of the shot before; positions jump by ``shot_rope_offset``; with
        ``shot_clean_recache`` the clean pass of the chunk sees only the sink before it.
        """
        if not cache.shots.opening:
            cache.shots.opening = True
            cache.shots.begun += 1

    # Warm-up, graphs and memory.

    def check_device(self, device: torch.device) -> None:
        """Also refuse a ``precision`` that cannot run there; see the contract."""
        super().check_device(device)
        if self.config.kv_storage == "fp8":
            check_fp8(device, self.config.head_dim, self.config.precision)

    @cached_property
    def network(self) -> Callable[..., Tensor]:
        """``forward``; replayed as a CUDA graph in the steady state, if the config enables it.

        A window that is still filling is computed eagerly: its calls have other shapes.
        """
        if not self.config.use_cuda_graph:
            return self.__call__
        return GraphedCallable(self.__call__, self.device, key=graph_key, state_of=graph_state)

    def _network_for(
        self, state: CausalState, write_only: bool = False, per_frame: bool = False
    ) -> Callable[..., Tensor]:
        """The graph if one applies to this call, else the plain module, as for many timesteps."""
        network = self.network
        if not isinstance(network, GraphedCallable):
            return network
        if not network.can_capture:  # a CPU
            return self.__call__
        if per_frame or not network.serves(state.inputs, state, write_only):
            network.eager_calls += 1
            return self.__call__
        return network

    def graphed_calls(self) -> list[GraphedCallable]:
        """The network call, if the config enables graphs."""
        return [self.network] if isinstance(self.network, GraphedCallable) else []

    @property
    def warm_up_steps(self) -> int:
        """Until every window is full and has evicted once."""
        c = self.config
        longest = max(
            (spec.capacity_t for spec in self.cache_specs(1).values()), default=c.window_size_t
        )
        return -(-longest // c.len_t) + 1 if c.streaming else 1

    @torch.no_grad()
    def replay_is_exact(self, cache: CausalState, control: Any = None) -> bool:
        """Compare replays bitwise with eager passes on the same inputs: outputs and written keys.

        Args:
            cache: a state for which graphs were captured, between AR steps; the chunk that is
                placed for the comparison is left unfinished.
            control: as for ``begin_step``.
        """
        self.begin_step(0, cache, control)
        latent = NoiseSource(0)(0, 0, self.latent_shape(cache.batch_size)).to(self.device)
        modulation = self.modulation_of(
            torch.tensor(500.0, dtype=torch.float32, device="cpu"), cache
        )
        exact = True  # finish even if one differs: other ranks wait in collectives
        for write_only in (False, True) if self.config.streaming else (False,):
            found = []
            for call in (self.__call__, self._network_for(cache, write_only)):
                for layer in cache.layers():
                    layer.clear_chunk()
                output = call(latent, modulation, cache.inputs, cache, write_only).clone()
                written = [x for layer in cache.layers() for x in layer.read_chunk()]
                found.append([output, *written])
            exact &= all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return exact

    def attention_shape(self, batch_size: int) -> AttentionShape | None:
        """Self-attention over the full window, for the first cores in ``cache_specs``."""
        specs = list(self.cache_specs(batch_size).values())
        return attention_over(specs[0], self.config) if specs else None

    def bind_kv_splits(self, name: str, splits_of: KVSplitsOf) -> None:
        """For the cores with a cache, from their full window; cross-attention is not split."""
        for glob, spec in self.cache_specs(1).items():
            runs = "flash_attn_3" if spec.storage == "fp8" else name  # independent of the others
            splits = splits_of(runs, attention_over(spec, self.config))
            for core in self._cores(glob):
                bind_cores(core, runs, splits)

    def cache_nbytes(self, batch_size: int) -> int:
        """Bytes of the KV caches of all layers; 0 for a bidirectional model."""
        if not self.config.streaming:
            return 0
        specs = self.cache_specs(batch_size).items()
        return sum(len(self._cores(glob)) * spec.nbytes for glob, spec in specs)

    def _cores(self, glob: str) -> list[Any]:
        pattern = glob_pattern(glob)
        found = [module for name, module in self.named_modules() if pattern.fullmatch(name)]
        if not found:
            raise ValueError(f"cache_specs names {glob!r}, which matches no submodule.")
        return found

    def rotate_sinks(self, cache: CausalState) -> None:
        """With cache-relative RoPE: move the sink of every layer to directly before the window."""
        if not self.config.relative_rope:
            return
        rotations: dict[tuple[int, int], Tensor] = {}  # different windows evict independently
        for layer in cache.layers():
            moved = (layer.cursor.evicted, layer.spec.head_dim)
            if moved[0] == 0:
                continue
            if moved not in rotations:
                rotations[moved] = to_device(time_rotation(*moved), self.device)
            layer.rotate_sink(rotations[moved])

    def inputs_at(self, cache: CausalState, frames: Tensor, control: Any) -> StepInputs:
        """Rotations, condition and control of latent frames at the positions ``[T]``."""
        condition = self.step_condition(control)
        if condition is not None:
            condition = checked_condition(condition, self, cache.batch_size)
        elif self.config.condition_channels:
            condition = cache.condition_at(frames)
        if leap := self.config.shot_rope_offset * cache.shots.begun:
            frames = frames.double() + leap
        return StepInputs(self.rotations(frames), condition, self.embed_control(control))

    def modulation_of(self, timestep: Tensor, cache: CausalState) -> Tensor:
        """``modulations`` of a timestep; cached if its value is on the host.

        Args:
            timestep: 0-dim, or as for ``modulations``.
            cache: keeps the result of a 0-dim timestep on the CPU.
        """
        count = cache.batch_size
        if timestep.ndim or timestep.device.type != "cpu" or torch.is_grad_enabled():
            timestep = to_device(timestep, self.device)
            return self.modulations(timestep.expand(count) if timestep.ndim == 0 else timestep)
        value = float(timestep)
        if value not in cache.modulations:
            full = torch.full((count,), value, dtype=torch.float64, device=self.device)
            computed = self.modulations(full)
            if not self.config.streaming:  # its timesteps do not recur
                return computed
            if len(cache.modulations) >= MAX_TIMESTEPS:
                del cache.modulations[next(iter(cache.modulations))]
            cache.modulations[value] = computed
        return cache.modulations[value]

    def _rollout_condition(self, condition: Tensor | None, batch_size: int) -> Tensor | None:
        if condition is None and (self.config.condition_channels == 0 or self.streams_condition):
            return None
        return checked_condition(condition, self, batch_size)
