"""Ring attention: the KV cache stays split over the ranks and is sent around the ring."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.merge import attend_with_lse, merge
from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.context import AttentionWrapper
from flashdreams.parallel.sequence import SequenceLayout, pad_dim
from flashdreams.runtime.region import Region

NO_FP8 = (
    "precision='fp8' cannot be used with ring_method='rotate', whose partial results need native "
    "keys. Use --parallel.ring-method gather, or precision='native'."
)


class ShardedCursor:
    """A cursor over this rank's share of every latent frame, read off the model's cursor."""

    def __init__(self, cursor: Cursor, ranks: int) -> None:
        self.cursor = cursor
        self.ranks = ranks
        self.tokens_per_frame = cursor.tokens_per_frame // ranks

    @property
    def slots(self) -> Tensor | None:
        """Slots of this rank's tokens of the current chunk."""
        if self.cursor.slots is None:
            return None
        firsts = self.cursor.slots[:: self.cursor.tokens_per_frame] // self.ranks
        offsets = torch.arange(self.tokens_per_frame, device=firsts.device, dtype=torch.int64)
        return (firsts[:, None] + offsets).flatten()

    @property
    def visible_tokens(self) -> int:
        """Length of the prefix of slots that attention reads."""
        return self.cursor.visible_tokens // self.ranks

    def __getattr__(self, name: str) -> Any:
        """Frames and their slots are those of the model: every rank has its share of each."""
        if name == "cursor":  # a copy that is still empty
            raise AttributeError(name)
        return getattr(self.cursor, name)


class RingAttention(AttentionWrapper):
    """Rotates keys and values through the ranks and merges the partial results.

    Each rank keeps its share of the tokens of every latent frame, so all ranks evict the same
    slots. Memory per rank falls with the degree; each call sends the whole visible window.

    Source: Ring Attention, arXiv:2310.01889, section 3.
    """

    def __init__(
        self, core: AttentionCore | AttentionWrapper, channel: Channel, layout: SequenceLayout
    ) -> None:
        super().__init__(core)
        if not isinstance(core, AttentionCore):
            raise TypeError(f"RingAttention wraps an AttentionCore, got {type(core).__name__}.")
        self.scale = core.scale
        self.channel = channel
        self.layout = layout

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """A cache for this rank's share of every latent frame.

        Args:
            spec: sizes of the whole model.
            cursor: the rollout's position, shared by all layers.

        Raises:
            ValueError: the ranks do not divide the tokens of a latent frame, or an fp8 cache.
        """
        if spec.storage == "fp8":
            raise ValueError(NO_FP8)
        ranks = self.channel.size
        if spec.tokens_per_frame % ranks:
            raise ValueError(
                f"{spec.tokens_per_frame} tokens per latent frame cannot be shared by "
                f"ring_degree={ranks} with ring_method='rotate'. Use --parallel.ring-method gather."
            )
        own = replace(spec, tokens_per_frame=spec.tokens_per_frame // ranks)
        cache = super().new_cache(own, ShardedCursor(cursor, ranks))  # type: ignore[arg-type]
        cache.whole_spec = spec
        return cache

    def cache_region(self, region: Region) -> Region:
        """Every P-th token, from this rank's own number on."""
        return super().cache_region(self._every_other(region))

    def written_region(self, region: Region) -> Region:
        """Every P-th token, from this rank's own number on."""
        return super().written_region(self._every_other(region))

    def _every_other(self, region: Region) -> Region:
        batch, tokens, *rest = region
        return batch, tokens[self.channel.rank :: self.channel.size], *rest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are this rank's ``[B, L/P, N, D]``, and so is the result."""
        k, v = self.layout.trim(k, 1), self.layout.trim(v, 1)
        ranks, rank = self.channel.size, self.channel.rank
        backend = cast(AttentionCore, self.core).backend
        if cache is None:
            counts = [self.layout.share_of(r) for r in range(ranks)]
        else:
            k, v = cache.update(k, v)
            counts = [k.shape[1]] * ranks
        rotating = torch.stack([pad_dim(x, 1, max(counts)) for x in (k, v)])
        out, lse = q.new_zeros((), dtype=torch.float32), None
        for hop in range(ranks):
            following = self.channel.start_rotate(rotating) if hop + 1 < ranks else None
            count = counts[(rank - hop) % ranks]
            if count:  # of fewer tokens than ranks, some ranks have none
                k, v = rotating[:, :, :count].unbind(0)
                part = attend_with_lse(q, k, v, scale=self.scale, backend=backend)
                out, lse = part if lse is None else merge(out, lse, *part)
            if following is not None:
                rotating = following()
        return out.to(q.dtype)

    def write(self, k: Tensor, v: Tensor, cache: KVCache) -> None:
        """See `AttentionWrapper.write`; each rank keeps its share, no communication."""
        self.core.write(self.layout.trim(k, 1), self.layout.trim(v, 1), cache)
