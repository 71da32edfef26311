"""The Wan diffusion transformer, streaming and bidirectional.

Shape letters: B batch, T latent frames, H W latent rows and columns, C channels, L query tokens,
S key tokens, N heads, D head dim. Tokens run frame by frame, row by row. Parameter names are those
of the official checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.cache import CacheCursor, KVCacheSpec
from flashdreams.attention.choose import AUTO, AttentionShape
from flashdreams.attention.quantized import KVStorage
from flashdreams.attention.rope import RotaryEmbedding3D, time_rotation
from flashdreams.infra.diffusion.transformer import (
    ContextChunk,
    Transformer,
    TransformerConfig,
)
from flashdreams.models.wan.blocks import (
    ExpandFrames,
    FlattenTokens,
    Head,
    ImageEmbedding,
    WanBlock,
    per_pixel,
    timestep_embedding,
)
from flashdreams.models.wan.checks import check_config
from flashdreams.models.wan.fused import check_fused_kernels
from flashdreams.models.wan.keys import WAN_KEY_MAPS
from flashdreams.models.wan.plan import wan_plan
from flashdreams.models.wan.state import Control, WanCache, graph_key
from flashdreams.parallel.plan import ParallelPlan, glob_pattern
from flashdreams.runtime.cuda_graph import GraphedCallable, copy_in_place
from flashdreams.runtime.transfer import to_device

MAX_TIMESTEPS = 64
"""Timesteps whose modulations a streaming rollout keeps; schedules have fewer."""

RESIDUAL_PARAMETERS = tuple(
    glob_pattern(glob)
    for glob in (
        *("time_embedding.*.*", "time_projection.*.*", "head.modulation", "head.head.*"),
        *("blocks.*.modulation", "blocks.*.norm3.*"),
    )
)
"""Names of the parameters that follow ``residual_dtype``."""


@dataclass(kw_only=True)
class WanTransformerConfig(TransformerConfig):
    """Config of a Wan transformer; the defaults are the 1.3B text-to-video model."""

    _target: type["WanTransformer"] = field(default_factory=lambda: WanTransformer)

    dim: int = 1536
    """Width of the token stream."""
    ffn_dim: int = 8960
    """Inner width of the feed-forward layers."""
    num_heads: int = 12
    """Attention heads; must divide ``dim``."""
    num_layers: int = 30
    """Transformer blocks."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames (always 1), rows and columns that make up one token."""
    out_channels: int = 16
    """Channels of the predicted flow."""
    condition_channels: int = 0
    """Channels concatenated to the latent (image-to-video: 4 mask + 16 image latent)."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    """Width of the text embeddings that come in."""
    text_len: int = 512
    """Text tokens; shorter prompts are padded with zero rows, which are attended."""
    image_dim: int | None = None
    """Width of the image tokens for cross-attention; None for models without them."""
    image_len: int = 257
    """Image tokens that warm-up prepares for: CLIP's 16 x 16 patches and its class token."""
    control_dim: int | None = None
    """Width of a per-token control signal that is embedded and added to the tokens; None for
    models without control."""
    eps: float = 1e-6
    """Added to variances."""
    prediction: Literal["flow", "x0"] = "flow"
    """What the network puts out; an ``"x0"`` output is turned into the flow."""
    streaming: bool = True
    """Keep a KV cache from chunk to chunk; False for a bidirectional model, which has one chunk."""
    window_size_t: int = 21
    """Latent frames of the sliding window, the current chunk included, the sink not."""
    sink_size_t: int = 0
    """First latent frames of the rollout that are never evicted."""
    relative_rope: bool = False
    """Cache-relative positions: the sink always stands right before the window."""
    residual_dtype: Literal["float32"] | None = None
    """Type of the sum that runs through the blocks, of the norms and modulations applied to it, of
    the time embedding and of the head, parameters included. None is ``dtype``; "float32" beside a
    16-bit ``dtype`` is the arithmetic of a float32 network under autocast."""
    fused_kernels: bool = False
    """Run modulated norms, gated sums, and norm, rotation and cache write of queries and keys as
    Triton kernels. Needs CUDA (for tests, TRITON_INTERPRET=1)."""
    kv_cache_dtype: KVStorage = "native"
    """How past keys and values are stored: ``"native"`` is ``dtype``; ``"int8"`` and ``"fp8"`` take
    a byte each, which costs accuracy and the time to widen them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        _, rows, columns = self.patch_size
        return (self.latent_height // rows) * (self.latent_width // columns)


class WanTransformer(Transformer):
    """One plain network for text-to-video, image-to-video, bidirectional and streaming use."""

    config: WanTransformerConfig
    block_class: type[WanBlock] = WanBlock
    checkpoint_key_maps = WAN_KEY_MAPS

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__(config)
        c = config
        channels = c.in_channels + c.condition_channels
        self.patch_embedding = nn.Conv3d(channels, c.dim, c.patch_size, stride=c.patch_size)
        self.flatten_tokens = FlattenTokens()
        self.expand_frames = ExpandFrames()
        self.rope = RotaryEmbedding3D(c.head_dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        if c.image_dim is not None:
            self.img_emb = ImageEmbedding(c.image_dim, c.dim)
        if c.control_dim is not None:
            self.control_embedding = nn.Sequential(
                nn.Linear(c.control_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
            )
        blocks = nn.ModuleList(self.block_class(c) for _ in range(c.num_layers))
        self.blocks: Sequence[WanBlock] = cast(Any, blocks)
        patch_volume = c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
        self.head = Head(c.dim, c.out_channels * patch_volume, c.eps)
        if c.attention_backend != AUTO:
            self.set_attention_backend(c.attention_backend)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Type of the sum that runs through the blocks; see the config."""
        return getattr(torch, self.config.residual_dtype or self.config.dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """``residual_dtype`` for what computes on the sum through the blocks; see the contract."""
        follows = any(pattern.fullmatch(name) for pattern in RESIDUAL_PARAMETERS)
        return self.residual_dtype if follows else self.dtype

    def check_device(self, device: torch.device) -> None:
        """See the contract."""
        super().check_device(device)
        if self.config.fused_kernels:
            check_fused_kernels(device, self.dtype)

    def finish_loading(self) -> None:
        """Settle how the blocks compute, too; see the contract."""
        super().finish_loading()
        for block in self.blocks:
            block.settle()

    def parallel_plan(self) -> ParallelPlan:
        """Where the network may be cut."""
        return wan_plan(self.config)

    def initialize_cache(
        self,
        text: Tensor,
        image_tokens: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> WanCache:
        """Compute what depends on the prompt alone and allocate the KV cache.

        Args:
            text: ``[B, S, text_dim]`` with ``S <= text_len``; padded with zero rows.
            image_tokens: ``[B, S, image_dim]``, for models with image cross-attention.
            condition: ``[B, condition_channels, F, H, W]``, concatenated to the latents by their
                positions in the rollout.

        Raises:
            ValueError: a shape that does not fit the config.
        """
        cross_attention = self.project_context(text, image_tokens)
        c = self.config
        condition = self._checked_condition(condition, len(text))
        cursor = CacheCursor(c.sink_size_t, c.window_size_t, c.tokens_per_frame)
        spec = self.cache_spec(len(text))
        caches = [
            b.self_attn.core.new_cache(spec, cursor) if c.streaming else None for b in self.blocks
        ]
        keep = lru_cache(maxsize=MAX_TIMESTEPS if c.streaming else 0)
        modulations = keep(partial(self._modulations_of_value, len(text)))
        return WanCache(cursor, caches, cross_attention, condition, modulations)

    def reuse_cache(
        self,
        cache: WanCache,
        text: Tensor,
        image_tokens: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> bool:
        """Begin a rollout in the storage of a former one; see ``initialize_cache``."""
        projected = self.project_context(text, image_tokens)
        condition = self._checked_condition(condition, len(text))
        new = [x for pairs in projected for pair in pairs for x in pair]
        stored = [x for pairs in cache.cross_attention for pair in pairs for x in pair]
        if [x.shape for x in new] != [x.shape for x in stored]:
            return False
        for mine, x in zip(stored, new, strict=True):
            mine.copy_(x)
        cache.condition = condition
        cache.cursor.load_state_dict({"start": 0})
        return True

    def graphed_calls(self) -> list[GraphedCallable]:
        """The network calls, if the config asks for graphs."""
        return [self.network] if isinstance(self.network, GraphedCallable) else []

    @property
    def warm_up_steps(self) -> int:
        """Until the window is full and has evicted once."""
        c = self.config
        return -(-(c.sink_size_t + c.window_size_t) // c.len_t) + 1 if c.streaming else 1

    def example_context(self, batch_size: int) -> dict[str, Any]:
        """Zeros for ``initialize_cache``."""
        c = self.config
        context = {"text": torch.zeros(batch_size, c.text_len, c.text_dim)}
        if c.image_dim is not None:
            context["image_tokens"] = torch.zeros(batch_size, c.image_len, c.image_dim)
        if c.condition_channels:
            size = (batch_size, c.condition_channels, 1, c.latent_height, c.latent_width)
            context["condition"] = torch.zeros(size)
        return context

    def example_control(self, batch_size: int) -> Tensor | None:
        """Zeros ``[B, L, control_dim]``."""
        c = self.config
        if c.control_dim is None:
            return None
        return torch.zeros(batch_size, c.len_t * c.tokens_per_frame, c.control_dim)

    def attention_shape(self, batch_size: int) -> AttentionShape:
        """See the contract."""
        c = self.config
        tokens = c.len_t * c.tokens_per_frame
        window = (c.sink_size_t + c.window_size_t) * c.tokens_per_frame
        return AttentionShape(
            batch_size=batch_size,
            queries=tokens,
            keys=window if c.streaming else tokens,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            storage=c.kv_cache_dtype,
        )

    def cache_spec(self, batch_size: int) -> KVCacheSpec:
        """Size of one layer's KV cache on one device."""
        c = self.config
        return KVCacheSpec(
            batch_size=batch_size,
            sink_size_t=c.sink_size_t,
            window_size_t=c.window_size_t,
            tokens_per_frame=c.tokens_per_frame,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
            device=self.device,
            relative_sink=c.relative_rope and c.sink_size_t > 0,
            storage=c.kv_cache_dtype,
        )

    def cache_nbytes(self, batch_size: int) -> int:
        """Bytes of the KV cache of all layers; 0 for a bidirectional model."""
        layers = len(self.blocks) if self.config.streaming else 0
        return layers * self.cache_spec(batch_size).nbytes

    def _checked_condition(self, condition: Tensor | None, batch_size: int) -> Tensor | None:
        c = self.config
        if condition is None and c.condition_channels == 0:
            return None
        wanted = (batch_size, c.condition_channels, c.latent_height, c.latent_width)
        shape = [] if condition is None else list(condition.shape)
        if condition is None or (*shape[:2], *shape[3:]) != wanted or shape[2] == 0:
            raise ValueError(
                f"The condition must be [{batch_size}, {c.condition_channels}, latent frames, "
                f"{c.latent_height}, {c.latent_width}]; got {shape or None}. "
                "A model with condition_channels=0 takes none; others need one, usually an image."
            )
        return condition.to(self.device, self.dtype)

    def project_context(
        self, text: Tensor, image_tokens: Tensor | None = None
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Cross-attention keys and values of every block; arguments as ``initialize_cache``."""
        c = self.config
        if (image_tokens is None) != (c.image_dim is None):
            wanted = "needs" if c.image_dim is not None else "takes no"
            raise ValueError(f"This transformer {wanted} image tokens (image_dim={c.image_dim}).")
        words = self.embed_text(text)
        image = None
        if image_tokens is not None:
            image = self.img_emb(image_tokens.to(self.device, self.dtype))
        return [block.cross_attn.project(words, image) for block in self.blocks]

    def embed_text(self, text: Tensor) -> Tensor:
        """Pad text embeddings ``[B, S, text_dim]`` with zero rows and embed all rows."""
        c = self.config
        if text.ndim != 3 or text.shape[2] != c.text_dim or text.shape[1] > c.text_len:
            raise ValueError(
                f"Text embeddings must be [B, at most {c.text_len}, {c.text_dim}]; "
                f"got {list(text.shape)}."
            )
        padded = F.pad(text.to(self.device, self.dtype), (0, 0, 0, c.text_len - text.shape[1]))
        return self.text_embedding(padded)

    def update_context(self, cache: WanCache, text: Tensor) -> None:
        """Take on another prompt: its keys and values replace those of the text, in place.

        Args:
            cache: this rollout's state.
            text: ``[B, S, text_dim]``, as in ``initialize_cache``; B must stay the same.

        Raises:
            ValueError: a shape that does not fit the config or the rollout.
        """
        batch_size = len(cache.cross_attention[0][0][0])
        if len(text) != batch_size:
            raise ValueError(f"The rollout has {batch_size} prompts; got {len(text)}.")
        words = self.embed_text(text)
        for block, pairs in zip(self.blocks, cache.cross_attention, strict=True):
            for stored, new in zip(pairs[0], block.cross_attn.project(words, None)[0], strict=True):
                stored.copy_(new)

    def begin_step(self, autoregressive_index: int, cache: WanCache, control: Any = None) -> None:
        """Place the chunk in the cache, build its rotations and embed its control."""
        c = self.config
        if not c.streaming and autoregressive_index > 0:
            raise ValueError(
                f"autoregressive_index={autoregressive_index}: with streaming=False the whole "
                "video is one AR step, number 0."
            )
        cache.cursor.place(c.len_t, self.device)
        self._rotate_sinks(cache)
        self.prepare(cache, torch.arange(cache.cursor.start, cache.cursor.end), control)

    def _rotate_sinks(self, cache: WanCache) -> None:
        """With cache-relative RoPE: let the sink of every layer stand right before the window."""
        evicted = cache.cursor.evicted
        if not self.config.relative_rope or evicted == 0:
            return
        rotation = to_device(time_rotation(evicted, self.config.head_dim), self.device)
        for layer in cache.self_attention:
            if layer is not None:
                layer.rotate_sink(rotation)

    def context_frames(self, cache: WanCache) -> list[int]:
        """Positions of the clean latent frames in sink and window, oldest first."""
        return cache.cursor.past_frames() if self.config.streaming else []

    def rewrite_context(
        self, cache: WanCache, chunks: Sequence[ContextChunk], timestep: Tensor
    ) -> None:
        """Fill sink and window anew, chunk by chunk; each sees itself and what came before it.

        Frames keep their positions and slots. With cache-relative RoPE the sink stands where it
        stands now, right before the window, once the first frames behind it are reached.
        """
        cursor = cache.cursor
        layers = [layer for layer in cache.self_attention if layer is not None]
        # Frames of a chunk may be gone: buffers of another size must not take the place of these.
        kept = (cache.rope, cache.chunk_condition, cache.control)
        cache.rope = cache.chunk_condition = cache.control = None
        with cursor.rewriting():
            for chunk in chunks:
                start, end = chunk.frames[0], chunk.frames[-1] + 1
                if start >= cursor.sink_size_t:
                    self._rotate_sinks(cache)
                cursor.place_next(len(chunk.frames), self.device)
                control = self.select_control(chunk.control, chunk.kept)
                self.prepare(cache, torch.tensor(chunk.frames), control)
                self(chunk.latent, self._time(timestep, cache), cache, write_only=True)
                for layer in layers:
                    layer.keep_sink(start, end)
        frames = [frame for chunk in chunks for frame in chunk.frames]
        slots = [slot for frame in frames for slot in cursor.frame_slots(frame, frame + 1)]
        for layer in layers:
            layer.scatter(slots)
        cache.rope, cache.chunk_condition, cache.control = kept

    def select_control(self, control: Any, kept: Sequence[int]) -> Any:
        """The part of an AR step's control input that belongs to some of its latent frames."""
        if control is None or len(kept) == self.config.len_t:
            return control
        return control.unflatten(1, (self.config.len_t, -1))[:, list(kept)].flatten(1, 2)

    def prepare(self, cache: WanCache, frames: Tensor, control: Any) -> None:
        """Rotations, condition and control of latent frames at the given positions.

        Args:
            cache: receives them; the rotations keep their storage between steps.
            frames: ``[T]`` positions.
            control: ``[B, L, control_dim]`` or None.
        """
        _, rows, columns = self.config.patch_size
        height, width = self.config.latent_height // rows, self.config.latent_width // columns
        cache.rope = copy_in_place(cache.rope, self.rope(frames, height, width, self.device))
        condition, embedded = None, self.embed_control(control)
        if cache.condition is not None:
            last = cache.condition.shape[2] - 1
            condition = cache.condition[:, :, to_device(frames.clamp(max=last), self.device)]
        cache.chunk_condition = self._keep_place(cache.chunk_condition, condition)
        if cache.control is not None:
            embedded.tokens = self._keep_place(cache.control.tokens, embedded.tokens)
            embedded.blocks = self._keep_place(cache.control.blocks, embedded.blocks)
        cache.control = embedded

    def _keep_place(self, stored: Any, new: Any) -> Any:
        """``new``, in the storage of ``stored`` where a graph reads it there."""
        if not self.config.use_cuda_graph:
            return new
        if isinstance(new, Tensor):
            return copy_in_place(stored, new)
        if isinstance(new, list | tuple) and isinstance(stored, list | tuple):
            return [self._keep_place(a, b) for a, b in zip(stored, new, strict=True)]
        return new

    def embed_control(self, control: Any) -> Control:
        """Embed a control signal ``[B, L, control_dim]``; other models override this hook."""
        none_per_block = [None] * len(self.blocks)
        if (control is None) != (self.config.control_dim is None):
            wanted = "needs" if self.config.control_dim is not None else "takes no"
            raise ValueError(
                f"This transformer {wanted} control input (control_dim={self.config.control_dim})."
            )
        if control is None:
            return Control(None, none_per_block)
        tokens = self.control_embedding(to_device(control, self.device).to(self.dtype))
        return Control(tokens, none_per_block)

    def forward(
        self, latent: Tensor, time: Tensor, cache: WanCache, write_only: bool = False
    ) -> Tensor:
        """The network call.

        Args:
            latent: ``[B, C, T, H, W]``.
            time: the timestep, 0-dim, ``[B]``, ``[B, T]`` for one per latent frame, or ``[B, L]``
                for one per token; or what ``modulations`` made of it.
            cache: rotations, control, keys and values; the chunk's slots are overwritten.
            write_only: stop when the last block's keys and values are in the cache.

        Returns:
            ``[B, out_channels, T, H, W]`` float32; an empty tensor if ``write_only``.
        """
        if cache.rope is None or cache.control is None:
            raise ValueError("The cache is not prepared for a chunk; call begin_step first.")
        if cache.chunk_condition is not None:
            latent = torch.cat([latent, cache.chunk_condition.to(latent)], dim=1)
        patches = self.patch_embedding(latent.to(self.dtype))
        x = self.flatten_tokens(patches).to(self.residual_dtype)
        if cache.control.tokens is not None:
            x = x + cache.control.tokens
        if time.ndim < 4:
            time = self.modulations(time.expand(len(x)) if time.ndim == 0 else time)
        *of_blocks, of_head = time.split([6] * len(self.blocks) + [2], dim=2)
        size = patches.shape[2:]
        *layers, last = zip(
            self.blocks,
            of_blocks,
            cache.cross_attention,
            cache.self_attention,
            cache.control.blocks,
            strict=True,
        )
        for block, modulation, context, kv_cache, control in layers:
            modulation = self._per_token(modulation, size)
            x = block(x, modulation, cache.rope, context, kv_cache, control)
        block, modulation, context, kv_cache, control = last
        modulation = self._per_token(modulation, size)
        if write_only and kv_cache is not None:
            block.write(x, modulation, cache.rope, kv_cache)
            return x.new_empty(0)
        x = block(x, modulation, cache.rope, context, kv_cache, control)
        x = self.head(x, self._per_token(of_head, size))
        return self.unpatchify(x, *size).float()

    def _per_token(self, modulation: Tensor, size: torch.Size) -> Tensor:
        """One modulation for all frames serves all tokens as it is."""
        count = modulation.shape[1]
        if count == 1:
            return modulation
        frames, tokens = size[0], size.numel()
        if count not in (frames, tokens):
            raise ValueError(
                f"{count} timesteps do not fit a chunk of {tokens} tokens: give 1, {frames} (one "
                f"per latent frame) or {tokens} (one per token)."
            )
        return self.expand_frames(modulation, tokens // count)

    def modulations(self, timestep: Tensor) -> Tensor:
        """What timesteps make of the modulation of every block and of the head.

        Args:
            timestep: ``[B]``, ``[B, T]`` or ``[B, L]``.

        Returns:
            ``[B, 1, T or L, 6 * num_layers + 2, dim]`` float32: six rows a block, two of the head.
        """
        per_frame = timestep if timestep.ndim == 2 else timestep[:, None]
        embedded = self.time_embedding(
            timestep_embedding(per_frame, self.config.freq_dim).to(self.residual_dtype)
        )
        projected = self.time_projection(embedded).unflatten(-1, (6, -1)).float()
        of_blocks = [block.modulation.float() + projected for block in self.blocks]
        return torch.cat(
            [*of_blocks, self.head.modulation.float() + embedded.float().unsqueeze(2)], dim=2
        )

    def _modulations_of_value(self, batch_size: int, timestep: float) -> Tensor:
        value = torch.full((batch_size,), timestep, dtype=torch.float64, device=self.device)
        return self.modulations(value)

    def _time(self, timestep: Tensor, cache: WanCache) -> Tensor:
        """What the network call takes for a timestep: its modulations, if they are at hand.

        The value of a timestep on the CPU can be asked for without waiting for the device.
        """
        if timestep.ndim == 0 and timestep.device.type == "cpu" and not torch.is_grad_enabled():
            return cache.modulations(float(timestep))
        return timestep.to(self.device)

    def unpatchify(self, patches: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Undo the patching: ``[B, L, kt*kh*kw*C]`` (channels last) to ``[B, C, T, H, W]``."""
        kt, kh, kw = self.config.patch_size
        x = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (kt, kh, kw, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @cached_property
    def network(self) -> Callable[..., Tensor]:
        """``forward``, replayed as a CUDA graph where the config asks for it and there is CUDA."""
        if not self.config.use_cuda_graph:
            return self.__call__
        return GraphedCallable(self.__call__, self.device, key=graph_key)

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: WanCache) -> Tensor:
        """Predict ``noise - x0``; see the contract."""
        output = self.network(latent, self._time(timestep, cache), cache)
        return self._as_flow(output, latent, timestep)

    def _as_flow(self, output: Tensor, latent: Tensor, timestep: Tensor) -> Tensor:
        if self.config.prediction == "flow":
            return output
        sigma = to_device(timestep, latent.device).float() / 1000
        if sigma.ndim > 0:
            sigma = per_pixel(sigma, latent.shape[2:], self.config.patch_size)
        return (latent.float() - output) / sigma

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: WanCache) -> None:
        """Write the clean chunk's keys and values and move on to the next chunk.

        What comes after the last of them is not computed. A bidirectional model keeps nothing, so
        its network is not run.
        """
        if self.config.streaming:
            self.network(latent, self._time(timestep, cache), cache, True)
        for layer in cache.self_attention:
            if layer is not None:
                layer.keep_sink()
        cache.cursor.advance()
