"""The Wan diffusion transformer, streaming and bidirectional.

Shape letters: B batch, T latent frames, H W latent rows and columns, C channels, L query tokens,
S key tokens, N heads, D head dim. Tokens run frame by frame, row by row. Parameter names are those
of the official checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.cache import CacheCursor, KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import RotaryEmbedding3D, apply_rope
from flashdreams.infra.diffusion.transformer import (
    ContextChunk,
    Transformer,
    TransformerConfig,
)
from flashdreams.models.wan.keys import WAN_KEY_MAPS
from flashdreams.models.wan.plan import wan_plan
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.runtime.cuda_graph import GraphedCallable, copy_in_place


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
    """Latent frames, rows and columns that make up one token."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim={self.dim} over num_heads={self.num_heads} must give an even head size; "
                f"got {self.dim / self.num_heads:g}."
            )
        self._check_patching()
        if self.streaming and self.window_size_t < self.len_t:
            raise ValueError(
                f"window_size_t={self.window_size_t} must hold the current chunk of "
                f"len_t={self.len_t} latent frames; use at least {self.len_t}."
            )
        if self.sink_size_t < 0:
            raise ValueError(f"sink_size_t={self.sink_size_t} must not be negative.")

    def _check_patching(self) -> None:
        sizes = (self.len_t, self.latent_height, self.latent_width)
        names = ("len_t", "latent_height", "latent_width")
        for name, size, patch in zip(names, sizes, self.patch_size, strict=True):
            if size % patch:
                below = max(patch, size // patch * patch)
                raise ValueError(
                    f"{name}={size} is not a multiple of the patch size {patch}; "
                    f"the nearest that are: {below}, {below + patch}."
                )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame (of one temporal patch)."""
        _, rows, columns = self.patch_size
        return (self.latent_height // rows) * (self.latent_width // columns)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first.

    Args:
        timestep: any shape, integer or fractional, 0 to 1000.
        dim: even width of the embedding.

    Returns:
        ``[*timestep.shape, dim]`` float32; the angles are computed in float64.

    Source: Attention Is All You Need, arXiv:1706.03762, section 3.5; order as in Wan 2.1.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.to(torch.float64)[..., None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, all heads together; statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x`` and keep its dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``norm(x) * (1 + scale) + shift``: layer norm without affine, all in float32 but the result.

    Args:
        x: ``[B, L, dim]``.
        shift: ``[B, L or 1, dim]`` float32.
        scale: like ``shift``.
        eps: added to the variance.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` in the dtype of ``x``; ``gate`` is ``[B, L or 1, dim]`` float32."""
    if x.dtype == torch.float32:
        return torch.addcmul(x, y, gate)
    return x + (y * gate).to(x.dtype)


class SelfAttention(nn.Module):
    """Self-attention of the tokens over the sink, the window and themselves."""

    def __init__(self, dim: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.core = AttentionCore(head_dim)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None) -> Tensor:
        """Attend; ``x`` is ``[B, L, dim]``, ``rope`` is ``[L, D/2, 2]``."""
        heads = (-1, self.head_dim)
        q = apply_rope(self.norm_q(self.q(x)).unflatten(-1, heads), rope)
        k = apply_rope(self.norm_k(self.k(x)).unflatten(-1, heads), rope)
        v = self.v(x).unflatten(-1, heads)
        return self.o(self.core(q, k, v, cache).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the tokens to the prompt and, for image-to-video, to the image tokens.

    Keys and values depend on the prompt alone: ``project`` computes them once per rollout.
    """

    def __init__(self, dim: int, head_dim: int, eps: float, with_image: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if with_image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)
        self.core = AttentionCore(head_dim)

    def project(self, text: Tensor, image: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[B, S, N, D]`` of the text and, where given, of the image."""
        heads = (-1, self.head_dim)
        pairs = [
            (
                self.norm_k(self.k(text)).unflatten(-1, heads),
                self.v(text).unflatten(-1, heads),
            )
        ]
        if image is not None:
            k = self.norm_k_img(self.k_img(image)).unflatten(-1, heads)
            pairs.append((k, self.v_img(image).unflatten(-1, heads)))
        return pairs

    def forward(self, x: Tensor, context: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend to each source on its own and add the results; ``x`` is ``[B, L, dim]``."""
        q = self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))
        attended = [self.core(q, k, v).flatten(2) for k, v in context]
        return self.o(attended[0] if len(attended) == 1 else attended[0] + attended[1])


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the timestep."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        c = config
        self.eps = c.eps
        self.self_attn = SelfAttention(c.dim, c.head_dim, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps)
        self.cross_attn = CrossAttention(c.dim, c.head_dim, c.eps, c.image_dim is not None)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: Tensor,
        context: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache | None,
        control: Any,
    ) -> Tensor:
        """Run the block.

        Args:
            x: ``[B, L, dim]``.
            time: ``[B, L or 1, 6, dim]`` float32, the projected timestep.
            rope: ``[L, D/2, 2]``.
            context: cross-attention keys and values of this block.
            cache: self-attention cache of this block.
            control: what ``embed_control`` prepared for this block.
        """
        e = (self.modulation.float() + time).unbind(2)
        y = modulated_norm(x, e[0], e[1], self.eps)
        x = gated_sum(x, self.self_attn(y, rope, cache), e[2])
        x = self.inject(x, control)
        x = x + self.cross_attn(self.norm3(x), context)
        y = modulated_norm(x, e[3], e[4], self.eps)
        return gated_sum(x, self.ffn(y), e[5])

    def inject(self, x: Tensor, control: Any) -> Tensor:
        """Hook between self- and cross-attention for models that control every block."""
        return x


class Head(nn.Module):
    """Final modulated projection from tokens to patches."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``[B, L, dim]`` and the time embedding ``[B, L or 1, dim]`` to patches."""
        shift, scale = (self.modulation.float() + time.float().unsqueeze(2)).unbind(2)
        return self.head(modulated_norm(x, shift, scale, self.eps))


class ImageEmbedding(nn.Module):
    """Brings image tokens to the width of the transformer."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, S, image_dim]`` to ``[B, S, dim]``."""
        return self.proj(image)


class FlattenTokens(nn.Module):
    """``[B, C, T, H, W]`` to tokens ``[B, T*H*W, C]``; a place where a plan may split."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten frames, rows and columns."""
        return x.flatten(2).transpose(1, 2)


class ExpandFrames(nn.Module):
    """Per-frame values ``[B, T, ...]`` to per-token values ``[B, L, ...]``; may be split."""

    def forward(self, x: Tensor, tokens_per_frame: int) -> Tensor:
        """Repeat every frame's value for all of its tokens."""
        return x.repeat_interleave(tokens_per_frame, dim=1)


@dataclass
class Control:
    """A control signal, embedded once per AR step."""

    tokens: Tensor | None
    """``[B, L, dim]``, added to the tokens."""
    blocks: Sequence[Any]
    """One entry per block, handed to ``WanBlock.inject``."""


@dataclass
class WanCache:
    """All state that a Wan transformer has in one rollout."""

    cursor: CacheCursor
    self_attention: list[KVCache | None]
    cross_attention: list[list[tuple[Tensor, Tensor]]]
    condition: Tensor | None
    """``[B, condition_channels, F, H, W]``, concatenated to the latents by position; latent frames
    past the last one see that one."""
    chunk_condition: Tensor | None = None
    """``[B, condition_channels, T, H, W]`` of the current chunk."""
    rope: Tensor | None = None
    """``[L, D/2, 2]`` of the current chunk."""
    control: Control | None = None


def graph_key(cache: WanCache) -> int:
    """What the network call depends on beside tensors: the number of visible keys."""
    return cache.cursor.visible_tokens


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
        if condition is not None:
            condition = condition.to(self.device, self.dtype)
        self._check_condition(condition, len(text))
        cursor = CacheCursor(c.sink_size_t, c.window_size_t, c.tokens_per_frame)
        spec = self.cache_spec(len(text))
        caches = [
            b.self_attn.core.new_cache(spec, cursor) if c.streaming else None for b in self.blocks
        ]
        return WanCache(cursor, caches, cross_attention, condition)

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
        )

    def cache_nbytes(self, batch_size: int) -> int:
        """Bytes of the KV cache of all layers; 0 for a bidirectional model."""
        layers = len(self.blocks) if self.config.streaming else 0
        return layers * self.cache_spec(batch_size).nbytes

    def _check_condition(self, condition: Tensor | None, batch_size: int) -> None:
        c = self.config
        if condition is None and c.condition_channels == 0:
            return
        wanted = (batch_size, c.condition_channels, c.latent_height, c.latent_width)
        shape = None if condition is None else list(condition.shape)
        if shape is None or (*shape[:2], *shape[3:]) != wanted or shape[2] == 0:
            raise ValueError(
                f"The condition must be [{batch_size}, {c.condition_channels}, latent frames, "
                f"{c.latent_height}, {c.latent_width}]; got {shape}. "
                "A model with condition_channels=0 takes none; others need one, usually an image."
            )

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
        cache.cursor.place(c.len_t, self.device)
        if c.relative_rope:
            for layer in cache.self_attention:
                if layer is not None:
                    layer.rotate_sink()
        self.prepare(cache, torch.arange(cache.cursor.start, cache.cursor.end), control)

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
        cursor, rope = cache.cursor, cache.rope
        layers = [layer for layer in cache.self_attention if layer is not None]
        cache.rope = None
        with cursor.rewriting():
            for chunk in chunks:
                start, end = chunk.frames[0], chunk.frames[-1] + 1
                if self.config.relative_rope and start >= cursor.sink_size_t:
                    for layer in layers:
                        layer.rotate_sink()
                cursor.place_next(len(chunk.frames), self.device)
                control = self.select_control(chunk.control, chunk.kept)
                self.prepare(cache, torch.tensor(chunk.frames), control)
                self(chunk.latent, timestep.to(self.device), cache)
                for layer in layers:
                    layer.keep_sink(start, end)
        frames = [frame for chunk in chunks for frame in chunk.frames]
        slots = [slot for frame in frames for slot in cursor.frame_slots(frame, frame + 1)]
        for layer in layers:
            layer.scatter(slots)
        cache.rope = rope

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
        table = self.rope(frames, height, width, self.device)
        if cache.rope is not None and cache.rope.shape == table.shape:
            cache.rope.copy_(table)
        else:
            cache.rope = table
        if cache.condition is not None:
            last = cache.condition.shape[2] - 1
            chosen = cache.condition[:, :, frames.clamp(max=last).to(self.device)]
            cache.chunk_condition = self._keep_place(cache.chunk_condition, chosen)
        embedded = self.embed_control(control)
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
        tokens = self.control_embedding(control.to(self.device, self.dtype))
        return Control(tokens, none_per_block)

    def forward(self, latent: Tensor, timestep: Tensor, cache: WanCache) -> Tensor:
        """The network call.

        Args:
            latent: ``[B, C, T, H, W]``.
            timestep: 0-dim, ``[B]``, or ``[B, T]`` for one timestep per latent frame.
            cache: rotations, control, keys and values; the chunk's slots are overwritten.

        Returns:
            ``[B, out_channels, T, H, W]`` float32.
        """
        if cache.rope is None or cache.control is None:
            raise ValueError("The cache is not prepared for a chunk; call begin_step first.")
        if cache.chunk_condition is not None:
            latent = torch.cat([latent, cache.chunk_condition.to(latent)], dim=1)
        patches = self.patch_embedding(latent.to(self.dtype))
        x = self.flatten_tokens(patches)
        if cache.control.tokens is not None:
            x = x + cache.control.tokens
        embedded, projected = self.embed_time(
            timestep.expand(len(x)) if timestep.ndim == 0 else timestep
        )
        if timestep.ndim == 2:
            tokens_per_frame = patches.shape[3] * patches.shape[4]
            embedded = self.expand_frames(embedded, tokens_per_frame)
            projected = self.expand_frames(projected, tokens_per_frame)
        layers = zip(
            self.blocks,
            cache.cross_attention,
            cache.self_attention,
            cache.control.blocks,
            strict=True,
        )
        for block, context, kv_cache, control in layers:
            x = block(x, projected, cache.rope, context, kv_cache, control)
        return self.unpatchify(self.head(x, embedded), *patches.shape[2:]).float()

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ``[B]`` or ``[B, T]`` timesteps.

        Returns:
            The embedding ``[B, T or 1, dim]`` and its projection ``[B, T or 1, 6, dim]`` float32.
        """
        per_frame = timestep if timestep.ndim == 2 else timestep[:, None]
        embedded = self.time_embedding(
            timestep_embedding(per_frame, self.config.freq_dim).to(self.dtype)
        )
        projected = self.time_projection(embedded).unflatten(-1, (6, -1))
        return embedded, projected.float()

    def unpatchify(self, patches: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Undo the patching: ``[B, L, kt*kh*kw*C]`` (channels last) to ``[B, C, T, H, W]``."""
        kt, kh, kw = self.config.patch_size
        x = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (kt, kh, kw, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @cached_property
    def network(self) -> Callable[[Tensor, Tensor, WanCache], Tensor]:
        """``forward``, replayed as a CUDA graph where the config asks for it and there is CUDA."""
        if not self.config.use_cuda_graph:
            return self.__call__
        return GraphedCallable(self.__call__, self.device, key=graph_key)

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: WanCache) -> Tensor:
        """Predict ``noise - x0``; see the contract."""
        output = self.network(latent, timestep.to(latent.device), cache)
        if self.config.prediction == "flow":
            return output
        sigma = timestep.to(latent.device, torch.float32) / 1000
        return (latent.float() - output) / sigma

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: WanCache) -> None:
        """Write the clean chunk's keys and values and move on to the next chunk.

        A bidirectional model keeps nothing, so its network is not run.
        """
        if self.config.streaming:
            self.network(latent, timestep.to(latent.device), cache)
        for layer in cache.self_attention:
            if layer is not None:
                layer.keep_sink()
        cache.cursor.advance()
