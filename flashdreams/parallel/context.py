"""Context-parallel attention: strategies that wrap a core and own no parameters.

Shape letters: B batch, L query tokens, N heads, D head dim, P ranks of the wrapped axis. All
collectives carry the new chunk, before it is written to the cache.
"""

import torch
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.sequence import SequenceLayout, pad_dim
from flashdreams.runtime.region import Region


class AttentionWrapper(nn.Module):
    """A wrapper around a core, with the interface of a core.

    Subclasses change the cache's spec, and convert a rank's part of a cache to
    the whole and back.
    """

    def __init__(self, core: "AttentionCore | AttentionWrapper") -> None:
        super().__init__()
        self.core = core

    def __str__(self) -> str:
        inner = f"({self.core})" if isinstance(self.core, AttentionWrapper) else ""
        return type(self).__name__ + inner

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """Storage for this rank's part of what is cached.

        Args:
            spec: sizes of the whole model; a strategy divides what it splits.
            cursor: the rollout's position, shared by all layers.
        """
        cache = self.core.new_cache(spec, cursor)
        cache.layout = self
        return cache

    def cache_region(self, region: Region) -> Region:
        """Which entries of a region of the whole model's cache this rank holds.

        Args:
            region: of ``[B, slots, N, D]``, any number of slots, in whole frames.
        """
        return self.core.cache_region(region)

    def written_region(self, region: Region) -> Region:
        """Which of these this rank writes to a file; all ranks together write each once."""
        return self.core.written_region(region)

    def share_maxima(self, maxima: Tensor) -> Tensor:
        """Largest values of the heads and tokens of all ranks of this strategy; a collective call.

        Args:
            maxima: ``[B, 3, N]``, of the queries, keys and values that came to the core.

        Returns:
            ``[B, 3, N]`` of the heads that come to this wrapper.
        """
        return self.core.share_maxima(maxima)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """Write this rank's part of the chunk; see `AttentionCore.write`.

        A strategy whose ``forward`` communicates or trims also does so here, without queries.
        """
        self.core.write(k, v, cache)


class HeadShardAttention(AttentionWrapper):
    """Attention over this rank's tensor-parallel heads; no communication."""

    def __init__(self, core: AttentionCore | AttentionWrapper, channel: Channel) -> None:
        super().__init__(core)
        self.channel = channel

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """A cache for this rank's heads."""
        cache = super().new_cache(_divide_heads(spec, self.channel), cursor)
        cache.whole_spec = spec
        return cache

    def cache_region(self, region: Region) -> Region:
        """This rank's heads."""
        return super().cache_region(share_region(region, 2, self.channel))

    def written_region(self, region: Region) -> Region:
        """This rank's heads."""
        return super().written_region(share_region(region, 2, self.channel))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """See `AttentionCore.forward`."""
        return self.core(q, k, v, cache)


class UlyssesAttention(HeadShardAttention):
    """Swaps a split sequence for split heads around the core, and back.

    The cache is head-sharded: it holds all tokens of this rank's heads.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
    """

    def __init__(
        self, core: AttentionCore | AttentionWrapper, channel: Channel, layout: SequenceLayout
    ) -> None:
        super().__init__(core, channel)
        self.layout = layout

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """A cache for this rank's heads, with the scales of all heads, for use before it."""
        cache = super().new_cache(spec, cursor)
        cache.share_scales(self.channel.size, self.channel.rank)
        return cache

    def share_maxima(self, maxima: Tensor) -> Tensor:
        """Join the heads of all ranks."""
        return self.channel.all_gather(super().share_maxima(maxima), dim=2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are ``[B, L/P, N, D]``, and so is the result."""
        tokens = q.shape[1]
        q, k, v = self._to_heads(q, k, v)
        out = pad_dim(self.core(q, k, v, cache), 1, tokens * self.channel.size)
        return self._to_tokens(out)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """See `AttentionWrapper.write`; an all-to-all of keys and values only."""
        k, v = self._to_heads(k, v)
        self.core.write(k, v, cache)

    def _to_heads(self, *projections: Tensor) -> tuple[Tensor, ...]:
        """Each ``[B, L/P, N, D]`` to ``[B, L, N/P, D]``, all in one all-to-all, padding dropped."""
        size = self.channel.size
        batch, tokens, heads, head_dim = projections[0].shape
        shape = (size, len(projections), batch, tokens, heads // size, head_dim)
        send = projections[0].new_empty(shape)
        for i, x in enumerate(projections):
            send[:, i] = x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
        received = self.channel.all_to_all(send).permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
        return self.layout.trim(received, 2).unbind(0)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """``[B, L, N/P, D]`` to ``[B, L/P, N, D]``."""
        send = x.unflatten(1, (self.channel.size, -1)).transpose(0, 1).contiguous()
        return self.channel.all_to_all(send).permute(1, 2, 0, 3, 4).flatten(2, 3)


class GatherKVAttention(AttentionWrapper):
    """Queries stay split; every rank gets all keys and values of the new chunk.

    The cache is the same as on one rank, and on every rank. Works for any number of heads.
    """

    def __init__(
        self, core: AttentionCore | AttentionWrapper, channel: Channel, layout: SequenceLayout
    ) -> None:
        super().__init__(core)
        self.channel = channel
        self.layout = layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are ``[B, L/P, N, D]``, and so is the result."""
        k, v = self._gather(k, v)
        if cache is not None and cache.scales is not None and not cache.quantizes_early:
            q = self.layout.without_padding(q, 1)
        return self.core(q, k, v, cache)

    def share_maxima(self, maxima: Tensor) -> Tensor:
        """The largest of all ranks: queries are split over them."""
        return self.channel.all_gather(super().share_maxima(maxima)[None]).amax(0)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """See `AttentionWrapper.write`; every rank needs all keys and values here, too."""
        k, v = self._gather(k, v)
        self.core.write(k, v, cache)

    def written_region(self, region: Region) -> Region:
        """A share of the tokens, since every rank has them all."""
        return super().written_region(share_region(region, 1, self.channel))

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of all ranks in one all-gather, padding dropped."""
        send = k.new_empty((2, *k.shape))
        send[0], send[1] = k, v
        return self.layout.trim(self.channel.all_gather(send, dim=2), 2).unbind(0)


class GatheredAttention(AttentionWrapper):
    """Gathers the tokens of all ranks, attends whole on each of them and keeps its own tokens.

    For heads that the ranks do not divide, where queries cannot be split either. The cache is the
    same as on one rank, and on every rank.
    """

    def __init__(self, core: AttentionCore | AttentionWrapper, layout: SequenceLayout) -> None:
        super().__init__(core)
        self.layout = layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are ``[B, L/P, N, D]``, and so is the result."""
        whole = self.layout.gather(torch.stack([q, k, v]), 2).unbind(0)
        return self.layout.split(self.core(*whole, cache), 1)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """See `AttentionWrapper.write`."""
        k, v = self.layout.gather(torch.stack([k, v]), 2).unbind(0)
        self.core.write(k, v, cache)

    def written_region(self, region: Region) -> Region:
        """A share of the tokens, since every rank has them all."""
        if self.layout.channel is not None:
            region = share_region(region, 1, self.layout.channel)
        return super().written_region(region)


class PaddedAttention(AttentionWrapper):
    """Drops the padding of an unsplit sequence before the core and restores it after."""

    def __init__(self, core: AttentionCore | AttentionWrapper, layout: SequenceLayout) -> None:
        super().__init__(core)
        self.layout = layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are ``[B, L, N, D]``, padded, and so is the result."""
        tokens = q.shape[1]
        q, k, v = (self.layout.trim(x, 1) for x in (q, k, v))
        return pad_dim(self.core(q, k, v, cache), 1, tokens)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """See `AttentionWrapper.write`."""
        self.core.write(self.layout.trim(k, 1), self.layout.trim(v, 1), cache)


def share_region(region: Region, dim: int, channel: Channel) -> Region:
    """A region without the entries of a dim that other ranks of a channel take; runs of them."""
    entries, size, rank = region[dim], channel.size, channel.rank
    own = entries[rank * len(entries) // size : (rank + 1) * len(entries) // size]
    return (*region[:dim], own, *region[dim + 1 :])


def _divide_heads(spec: KVCacheSpec, channel: Channel) -> KVCacheSpec:
    if spec.num_heads % channel.size:
        raise ValueError(
            f"num_heads={spec.num_heads} is not divisible by the {channel.name} degree "
            f"{channel.size}. Let resolve_degrees choose the degrees."
        )
    return spec.with_heads(spec.num_heads // channel.size)
