"""The parts of a Wan transformer: norms, attention, feed-forward, embeddings and head.

Shape letters as in `flashdreams.models.wan.transformer`; parameter names are those of the official
checkpoints.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import apply_rope
from flashdreams.models.wan import fp8_linear, fused
from flashdreams.models.wan.matmuls import (
    PackedLinears,
    fuses_gelu,
    linear_gelu,
    pack_linears,
    repack,
)


class BlockConfig(Protocol):
    """The config fields that a block reads."""

    dim: int
    """Width of the token stream."""
    ffn_dim: int
    """Inner width of the feed-forward layers."""
    eps: float
    """Added to variances."""
    dtype: Any
    """Name of the type of the branches."""
    kv_cache_dtype: Any
    """How cached keys and values are stored."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""

    @property
    def image_branch(self) -> bool:
        """Whether cross-attention sees image tokens beside the text."""


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
        self.rounds_once = False
        """Whether 16-bit results are rounded only after the gain, in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``, ``[..., dim]``, and keep its dtype."""
        # In float32 the bits are the same, without a separate operation for the gain.
        if x.dtype == torch.float32 or self.rounds_once:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``: layer norm without affine, all in float32 but the result.

    Args:
        x: ``[B, L, dim]``.
        shift: ``[B, L or 1, dim]`` float32.
        scale: like ``shift``.
        eps: added to the variance.
        dtype: of the result; None means that of ``x``.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(dtype or x.dtype)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` in the dtype of ``x``; ``gate`` is ``[B, L or 1, dim]`` float32.

    ``y`` may have a narrower dtype than ``x``.
    """
    if x.dtype == torch.float32:
        return torch.addcmul(x, y, gate)
    return x + (y * gate).to(x.dtype)


def affine_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """The norm of ``x``, ``[B, L, dim]``, in ``dtype``."""
    return norm(x).to(dtype)


def norm_rope(
    q: Tensor, k: Tensor, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """Norm over all heads together, then rotation, of queries and keys.

    Args:
        q: ``[B, L, N, D]``, this rank's heads.
        k: like ``q``.
        norm_q: maps ``[B, L, N * D]``.
        norm_k: like ``norm_q``.
        rope: ``[L, D/2, 2]``.
    """
    return (
        apply_rope(norm_q(q.flatten(2)).view_as(q), rope),
        apply_rope(norm_k(k.flatten(2)).view_as(k), rope),
    )


class SelfAttention(nn.Module):
    """Self-attention of the tokens over the sink, the window and themselves.

    Once packed, one matmul computes queries, keys and values; ``q``, ``k`` and ``v`` keep their
    parameters, as parts of one tensor.
    """

    def __init__(self, dim: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm_rope: Callable[..., tuple[Tensor, Tensor]] = norm_rope
        self.writes_fused = False
        self.packed: PackedLinears | None = None
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.core = AttentionCore(head_dim)
        self.register_load_state_dict_post_hook(repack)

    def pack(self) -> None:
        """Let one matmul compute queries, keys and values, if their layers are plain."""
        self.packed = pack_linears((self.q, self.k, self.v))

    def _apply(self, *args: Any, **kwargs: Any) -> "SelfAttention":
        """Move or convert, and pack again on the new device."""
        super()._apply(*args, **kwargs)
        repack(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        repack(self)  # a copy's parameters are separate tensors

    def _project(self, x: Any) -> list[Tensor]:
        """Queries, keys and values ``[B, L, N, D]``, views or not."""
        packed = self.packed
        projected = packed(x) if packed is not None else (self.q(x), self.k(x), self.v(x))
        return [y.unflatten(-1, (-1, self.head_dim)) for y in projected]

    def forward(self, x: Any, rope: Tensor, cache: KVCache | None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, L, dim]``; also as `QuantizedRows` where the layers are FP8.
            rope: ``[L, D/2, 2]``.
            cache: of this block; None attends to ``x`` alone.
        """
        q, k, v = self._project(x)
        if cache is not None and cache.scales is not None:
            return self.o(self._attend_fp8(q, k, v, rope, cache).flatten(2))
        if cache is not None and self.writes_fused:
            q = fused.norm_rope_write(q, k, v, self.norm_q, self.norm_k, rope, cache)
            k, v, cache = *cache.visible(), None  # already written: the core attends to these
        else:
            q, k = self.norm_rope(q, k, self.norm_q, self.norm_k, rope)
        return self.o(self.core(q, k, v, cache).flatten(2))

    def _attend_fp8(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, cache: KVCache) -> Tensor:
        """Norm, rotate, quantize and attend; ``[B, L, N, D]`` each.

        Until the scales are fixed, the core quantizes. Later it gets e4m3 values, so that
        ranks communicate only these.
        """
        norms = self.norm_q, self.norm_k
        if not cache.quantizes_early:
            return self.core(*self.norm_rope(q, k, *norms, rope), v, cache)
        if self.writes_fused:
            q = fused.norm_rope_write(q, k, v, *norms, rope, cache)
            return self.core.attend_stored(q, cache)
        if self.norm_rope is fused.norm_rope:
            return self.core(*fused.norm_rope_quantize(q, k, v, *norms, rope, cache), cache)
        q, k = self.norm_rope(q, k, *norms, rope)
        return self.core(*cache.quantize(q, k, v), cache)

    def write(self, x: Any, rope: Tensor, cache: KVCache) -> None:
        """Leave the keys and values of one chunk in the cache; arguments as in ``forward``."""
        if cache.calibrates:  # the scale of queries follows from this pass, too
            self.forward(x, rope, cache)
            return
        heads = (-1, self.head_dim)
        k, v = self.packed.last(2)(x) if self.packed is not None else (self.k(x), self.v(x))
        k, v = apply_rope(self.norm_k(k).unflatten(-1, heads), rope), v.unflatten(-1, heads)
        if cache.quantizes_early:
            _, k, v = cache.quantize(None, k, v)
        self.core.write(k, v, cache)


class CrossAttention(nn.Module):
    """Attention of the tokens to the prompt and, for image-to-video, to the image tokens.

    Keys and values depend only on the prompt: ``project`` computes them once per rollout.
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

    def project(self, text: Any, image: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[B, S, N, D]`` of the text and, where given, of the image.

        A model without a prompt passes its image tokens instead of text.
        """
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

    def forward(self, x: Any, context: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend to each source on its own and add the results.

        Args:
            x: ``[B, L, dim]``; also as `QuantizedRows` where the layers are FP8.
            context: what ``project`` made of ``B`` prompts.
        """
        q = self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))
        attended = [self.core(q, k, v).flatten(2) for k, v in context]
        return self.o(attended[0] if len(attended) == 1 else attended[0] + attended[1])


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the timestep."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        c = config
        self.eps = c.eps
        self.config = c
        self.branch_dtype: torch.dtype = getattr(torch, c.dtype)
        self.modulated_norm: Callable[..., Any] = modulated_norm
        self.gated_sum: Callable[..., Tensor] = gated_sum
        self.affine_norm: Callable[..., Any] = affine_norm
        self.branch_sum: Callable[..., Tensor] = operator.add
        self.self_attn = SelfAttention(c.dim, c.head_dim, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps)
        self.cross_attn = CrossAttention(c.dim, c.head_dim, c.eps, c.image_branch)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim)
        )
        self.modulation = new_modulation(6, c.dim)
        self.fuses_gelu = False
        self.quantized_gelu: Callable[[Tensor], Any] | None = None

    def select_implementations(self, fused_kernels: bool) -> None:
        """Select how the block computes; called once, after it is split over ranks.

        Args:
            fused_kernels: whether small operations run as Triton kernels.
        """
        if fused_kernels:
            self._fuse()
        forms: Any = fused if fused_kernels else fp8_linear
        if isinstance(self.ffn[0], fp8_linear.FP8Linear):
            self.modulated_norm = forms.quantized_norm
            self.affine_norm = forms.quantized_affine_norm
        if isinstance(self.ffn[2], fp8_linear.FP8Linear):
            self.quantized_gelu = forms.quantized_gelu

    def _fuse(self) -> None:
        """Let small operations run as Triton kernels."""
        attention = self.self_attn
        attention.pack()
        self.fuses_gelu = fuses_gelu(self.ffn[0], self.ffn[1])
        self.modulated_norm, self.gated_sum = fused.modulated_norm, fused.gated_sum
        self.affine_norm, self.branch_sum = fused.affine_norm, fused.branch_sum
        # Under tensor parallelism a norm contains an all-reduce and stays unfused.
        if isinstance(self.cross_attn.norm_q, RMSNorm):
            self.cross_attn.norm_q.rounds_once = True
        if isinstance(attention.norm_q, RMSNorm):
            attention.norm_rope = fused.norm_rope
            # The write can be fused if the core would write these keys unchanged.
            attention.writes_fused = (
                type(attention.core) is AttentionCore and self.config.kv_cache_dtype == "native"
            )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        context: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache | None,
        control: Any,
    ) -> Tensor:
        """Run the block.

        Args:
            x: ``[B, L, dim]``, in ``residual_dtype`` like the result.
            modulation: ``[B, L or 1, 6, dim]`` float32, this block's at the timestep.
            rope: ``[L, D/2, 2]``.
            context: cross-attention keys and values of this block.
            cache: self-attention cache of this block.
            control: output of ``embed_control`` for this block.
        """
        e = modulation.unbind(2)
        y = self.modulated_norm(x, e[0], e[1], self.eps, self.branch_dtype)
        x = self.sum_and_inject(x, self.self_attn(y, rope, cache), e[2], control)
        y = self.affine_norm(x, self.norm3, self.branch_dtype)
        x = self.branch_sum(x, self.cross_attn(y, context))
        x = self.inject_late(x, control)
        y = self.modulated_norm(x, e[3], e[4], self.eps, self.branch_dtype)
        return self.gated_sum(x, self.feed_forward(y), e[5])

    def feed_forward(self, y: Any) -> Tensor:
        """``ffn``, with GELU in the epilogue of its first matmul where that is possible.

        Where the second matmul is FP8, GELU and quantization are one operation instead.
        """
        if self.quantized_gelu is not None:
            return self.ffn[2](self.quantized_gelu(self.ffn[0](y)))
        if not self.fuses_gelu:
            return self.ffn(y)
        return self.ffn[2](linear_gelu(cast(nn.Linear, self.ffn[0]), y))

    def write(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        context: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        control: Any,
    ) -> None:
        """Write to the caches what ``forward`` writes, and compute nothing else.

        A block that changes its tokens before self-attention, or has its own caches, overrides
        this as well. Arguments as for ``forward``.
        """
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        y = self.modulated_norm(x, shift, scale, self.eps, self.branch_dtype)
        self.self_attn.write(y, rope, cache)

    def sum_and_inject(self, x: Tensor, y: Tensor, gate: Tensor, control: Any) -> Tensor:
        """``gated_sum``, then ``inject``; a block may fuse them. Arguments as for these."""
        return self.inject(self.gated_sum(x, y, gate), control)

    def inject(self, x: Tensor, control: Any) -> Tensor:
        """Hook between self- and cross-attention for models with control in every block.

        Args:
            x: ``[B, L, dim]``, the tokens.
            control: the control prepared by ``begin_step``.

        Returns:
            Like ``x``.
        """
        return x

    def inject_late(self, x: Tensor, control: Any) -> Tensor:
        """Hook between cross-attention and feed-forward; as ``inject``."""
        return x


def new_modulation(rows: int, dim: int) -> nn.Parameter:
    """Offsets of a modulation before training: ``[1, rows, dim]``, normal, deviation dim ** -0.5.

    On the meta device nothing is drawn: for that PyTorch 2.13 would import its compiler, which
    takes half of the start-up time of a small run.
    """
    values = torch.empty(1, rows, dim)
    return nn.Parameter(values if values.is_meta else torch.randn(1, rows, dim) / dim**0.5)


class Head(nn.Module):
    """Final modulated projection from tokens to patches."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = new_modulation(2, dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Map ``[B, L, dim]`` to patches; ``modulation`` is ``[B, L or 1, 2, dim]`` float32."""
        shift, scale = modulation.unbind(2)
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
    """``[B, C, T, H, W]`` to tokens ``[B, T*H*W, C]``; a module that a plan can split."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten frames, rows and columns.

        The result is contiguous token by token: element-wise operations keep the layout of the
        residual stream from block to block, so a transposed one would slow all of them.
        """
        return x.flatten(2).transpose(1, 2).contiguous()


class TokenPlaces(nn.Module):
    """The timestep of each token, if there are several; a module that a plan can split.

    Ranks split the indices, so each expands only the modulations of its own tokens.
    """

    def forward(self, count: int, times: int, device: torch.device) -> Tensor:
        """Place of every token's timestep ``[L]`` among ``count`` ones of ``times`` tokens each."""
        return torch.arange(count, dtype=torch.int64, device=device).repeat_interleave(times)


def modulation_rows(network: Any, modulation: Tensor, size: torch.Size) -> Callable[[int], Tensor]:
    """Modulations ``[B, L or 1, 6, dim]`` of a block; ``[B, L or 1, 2, dim]`` of the head.

    Args:
        modulation: from ``modulations``.
        size: T, rows and columns of tokens.
    """
    count, blocks = modulation.shape[1], len(network.blocks)
    if count == 1:
        rows = modulation.split([6] * blocks + [2], dim=2)
        return rows.__getitem__
    frames, tokens = size[0], size.numel()
    if count not in (frames, tokens):
        raise ValueError(
            f"{count} timesteps do not fit a chunk of {tokens} tokens: give 1, {frames} (one "
            f"per latent frame) or {tokens} (one per token)."
        )
    places = network.token_places(count, tokens // count, modulation.device)
    projected, embedded = modulation.split([6, 1], dim=2)

    def expanded(place: int) -> Tensor:
        """One block at a time: all would take 200 times the memory of a long clip's tokens."""
        if place == blocks:
            return (network.head.modulation.float() + embedded).index_select(1, places)
        own = network.blocks[place].modulation.float()
        return (own + projected).index_select(1, places)

    return expanded
