"""The sink-and-window KV cache of a streaming rollout."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flashdreams.attention.cursor import CacheCursor as _CacheCursor
from flashdreams.attention.cursor import Cursor, token_slots
from flashdreams.attention.fp8 import FP8, ScaledTokens, head_maxima, quantize, scales_of
from flashdreams.attention.quantized import KVStorage, QuantizedTokens
from flashdreams.attention.rope import apply_rope, time_rotation
from flashdreams.runtime.region import (
    Region,
    TensorPart,
    region_shape,
    whole_region,
)


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """Size of one layer's cache for the whole model, independent of the number of ranks.

    A parallel strategy that splits the cache divides the one field that it splits and hands the
    rest on.
    """

    batch_size: int
    sink_size_t: int
    """Latent frames that are never evicted, from frame 0 on."""

    window_size_t: int
    """Latent frames of the sliding window, the current chunk included, the sink not."""

    tokens_per_frame: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    relative_sink: bool = False
    """Also keep the sink keys with their first rotation, for cache-relative RoPE."""
    storage: KVStorage = "native"
    """Keep keys and values in ``dtype``, in INT8 with a scale per token and head, or in e4m3 with a
    fixed scale per head. The stored sink keys beside an fp8 cache are in ``dtype``."""

    @property
    def capacity_t(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.sink_size_t + self.window_size_t

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (stored sink keys included) of one layer."""
        native = self.head_dim * self.dtype.itemsize
        row = {"native": native, "int8": self.head_dim + 1, "fp8": self.head_dim}[self.storage]
        sink = native if self.storage == "fp8" else row
        frame = 2 * self.capacity_t * row + (self.sink_size_t * sink if self.relative_sink else 0)
        return self.batch_size * frame * self.tokens_per_frame * self.num_heads

    def new_tokens(self, frames: int) -> Tensor | QuantizedTokens:
        """Zeros ``[B, tokens, N, D]`` for some latent frames; native, also of an fp8 cache."""
        shape = self._shape(frames)
        if self.storage == "int8":
            return QuantizedTokens(shape, self.dtype, self.device)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def new_scaled_tokens(self, scale: Tensor) -> ScaledTokens:
        """Zeros ``[B, slots, N, D]`` in e4m3 with scales ``[B, N]``, for all latent frames."""
        values = torch.zeros(self._shape(self.capacity_t), dtype=FP8, device=self.device)
        return ScaledTokens(values, scale, self.dtype)

    def new_scales(self, ranks: int = 1) -> Tensor:
        """Zeros ``[B, 3, N * ranks, 1]`` float32, for queries, keys and values of every head."""
        size = (self.batch_size, 3, self.num_heads * ranks, 1)
        return torch.zeros(size, dtype=torch.float32, device=self.device)

    def _shape(self, frames: int) -> tuple[int, int, int, int]:
        return (self.batch_size, frames * self.tokens_per_frame, self.num_heads, self.head_dim)

    def with_heads(self, num_heads: int) -> "KVCacheSpec":
        """The same cache for another number of heads."""
        return replace(self, num_heads=num_heads)


class CacheLayout(Protocol):
    """Which part of a cache a rank holds; an attention core is one."""

    def cache_region(self, region: Region) -> Region:
        """Which entries of a region of ``[B, slots, N, D]`` of the whole model are cached here."""

    def written_region(self, region: Region) -> Region:
        """Which of these this rank writes to a file; all ranks together write each once."""

    def share_maxima(self, maxima: Tensor) -> Tensor:
        """Largest values ``[B, 3, N]`` of all queries, keys and values; a collective call."""


class KVCache:
    """Keys and values of one layer, ``[B, slots, N, D]``, written in place and never rolled.

    Softmax does not depend on the order of keys once they are rotated, so the ring needs no
    unwrapping. In an int8 cache the frames before the current chunk are quantized; the chunk
    attends to its own keys and values as they are.

    An fp8 cache has a scale per batch entry and head for queries, keys and values each. Every pass
    over the first chunk sets them, the clean pass last; from then on they are fixed.
    """

    def __init__(
        self, spec: KVCacheSpec, cursor: Cursor, layout: CacheLayout | None = None
    ) -> None:
        self.spec = spec
        self.cursor = cursor
        """Which frame is in which slot; ``cursor.slots`` are those of the chunk's tokens."""
        self.layout = layout
        self.whole_spec = spec
        """The same cache in the whole model; a wrapper of the core puts it here."""
        self.scales: Tensor | None = None
        """``[B, 3, N, 1]`` float32 of an fp8 cache: scales of queries, keys and values, zero until
        the first chunk; N counts all heads of the queries that come to the outermost wrapper of the
        core (without those of other tensor parallel ranks)."""
        self.k: Any
        self.v: Any
        if spec.storage == "fp8":
            self.scales = spec.new_scales()
            self.q_scale, k_scale, v_scale = self.scales[..., 0].unbind(1)
            self.k, self.v = spec.new_scaled_tokens(k_scale), spec.new_scaled_tokens(v_scale)
        else:
            self.k, self.v = spec.new_tokens(spec.capacity_t), spec.new_tokens(spec.capacity_t)
        self.sink_tokens = spec.sink_size_t * spec.tokens_per_frame
        self.sink_k = spec.new_tokens(spec.sink_size_t) if spec.relative_sink else None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk and return all that it may attend to.

        Args:
            k: ``[B, L, N, D]``, rotated keys of the current chunk.
            v: ``[B, L, N, D]``.

        Returns:
            The visible keys and values, ``[B, S, N, D]``, in slot order: views, or new tensors
            where they are stored in INT8.

        Raises:
            ValueError: an fp8 cache, whose scales depend on the queries as well.
        """
        if self.scales is not None:
            raise ValueError(
                'precision="fp8": cache.update is not for an fp8 cache, only AttentionCore.forward '
                'is. Use precision="native", or give the cache of this core '
                "storage=config.kv_cache_dtype in cache_specs."
            )
        slots, visible = self.write(k, v), self.visible()
        if self.spec.storage == "int8":
            for read, own in zip(visible, (k, v), strict=True):
                read.index_copy_(1, slots, own)
        return visible

    def write(self, k: Tensor, v: Tensor) -> Tensor:
        """Write the current chunk, as ``update``; returns the slots of its tokens."""
        slots = self.cursor.slots
        if slots is None or k.shape[1] != len(slots):
            expected = 0 if slots is None else len(slots)
            raise ValueError(f"The cache expects {expected} tokens of a chunk, got {k.shape[1]}.")
        self.k.index_copy_(1, slots, k)
        self.v.index_copy_(1, slots, v)
        if self.spec.storage == "fp8" and self.sink_k is not None and k.dtype != FP8:
            self._keep_wide_sink(k)
        return slots

    def _keep_wide_sink(self, k: Tensor) -> None:
        """Store what ``k`` has of the sink before it is quantized."""
        written = self.cursor.frame_slots_written
        count = sum(slot < self.spec.sink_size_t for slot in written)
        if count and self.sink_k is not None:
            first, tokens = written[0] * self.spec.tokens_per_frame, self.spec.tokens_per_frame
            self.sink_k[:, first : first + count * tokens] = k[:, : count * tokens]

    @property
    def quantizes_early(self) -> bool:
        """Whether the core receives queries, keys and values in e4m3.

        True once scales are fixed, unless a sink is written, which is also kept in ``dtype``.
        """
        if self.scales is None or self.cursor.is_rewriting:
            return False
        wide_t = self.spec.sink_size_t if self.spec.relative_sink else 0
        return self.cursor.start >= max(1, wide_t)

    def share_scales(self, ranks: int, rank: int) -> None:
        """Hold the scales of all ranks' heads, of which this cache's are the ``rank``-th run."""
        if self.scales is None:
            return
        self.scales = self.spec.new_scales(ranks)
        heads = self.spec.num_heads
        own = self.scales[:, :, rank * heads : (rank + 1) * heads, 0]
        self.q_scale, self.k.scale, self.v.scale = own.unbind(1)

    @property
    def calibrates(self) -> bool:
        """Whether the current pass sets the scales, as every pass over the first chunk does."""
        if self.scales is None:
            return False
        return self.cursor.start == 0 and not self.cursor.is_rewriting

    def calibrate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Set the scales from the first chunk, ``[B, L, N, D]`` each; no-op later; collective.

        Args:
            q: rotated queries.
            k: rotated keys.
            v: values.
        """
        if not self.calibrates:
            return
        assert self.scales is not None
        maxima = torch.stack([head_maxima(x) for x in (q, k, v)], dim=1)
        if self.layout is not None:
            maxima = self.layout.share_maxima(maxima)
        self.scales[..., 0] = scales_of(maxima)

    def quantize(self, *qkv: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys and values ``[B, L, N, D]``, of all heads of ``scales``, in e4m3.

        None stays None.
        """
        assert self.scales is not None
        pairs = zip(qkv, self.scales[..., 0].unbind(1), strict=True)
        return tuple(None if x is None else quantize(x, scale) for x, scale in pairs)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The visible e4m3 values of keys and values of an fp8 cache, ``[B, S, N, D]`` views."""
        length = self.cursor.visible_tokens
        return self.k.values[:, :length], self.v.values[:, :length]

    def visible(self) -> tuple[Tensor, Tensor]:
        """The keys and values that attention reads, ``[B, S, N, D]``, as they are stored."""
        length = self.cursor.visible_tokens
        return self.k[:, :length], self.v[:, :length]

    def read_chunk(self) -> tuple[Tensor, Tensor]:
        """Copies of the current chunk's keys and values, ``[B, L, N, D]``."""
        slots = self.cursor.slots
        return self.k[:, slots], self.v[:, slots]

    def clear_chunk(self) -> None:
        """Set the current chunk's keys and values to zero."""
        for stored in (self.k, self.v):
            stored[:, self.cursor.slots] = 0 * stored[:, self.cursor.slots]

    def keep_sink(self, start: int | None = None, end: int | None = None) -> None:
        """Store sink keys as they were first rotated (clean pass).

        Args:
            start: first latent frame just written; None is the current chunk's.
            end: the frame after the last one; None is the current chunk's.
        """
        start = self.cursor.start if start is None else start
        end = self.cursor.end if end is None else end
        if self.sink_k is None or start >= self.spec.sink_size_t or self.spec.storage == "fp8":
            return  # an fp8 cache has stored them as they were written
        first = start * self.spec.tokens_per_frame
        last = min(end, self.spec.sink_size_t) * self.spec.tokens_per_frame
        self.sink_k[:, first:last] = self.k[:, first:last]

    def rotate_sink(self, rotation: Tensor | None = None) -> None:
        """Move the sink to right before the window (cache-relative RoPE).

        Dot products depend on position differences only, so shifting the sink forward by the
        number of evicted frames equals numbering the slots. Always from the stored keys.

        Args:
            rotation: by that number, ``[1, D/2, 2]`` on the device, where the caller has it for all
                layers; None computes it.
        """
        if self.sink_k is None or self.cursor.evicted == 0:
            return
        if rotation is None:
            rotation = time_rotation(self.cursor.evicted, self.spec.head_dim).to(self.k.device)
        self.k[:, : self.sink_tokens] = apply_rope(self.sink_k[:, :], rotation)

    def scatter(self, frame_slots: Sequence[int], first_slot: int = 0) -> None:
        """Move rewritten frame ``i`` to slot ``frame_slots[i]``; one copy, in place.

        Slots that are not named keep what they hold. The frames were written from ``first_slot``
        on.
        """
        if list(frame_slots) == list(range(first_slot, first_slot + len(frame_slots))):
            return
        tokens = self._tokens_of(frame_slots)
        first = first_slot * self.spec.tokens_per_frame
        for stored in (self.k, self.v):
            stored.index_copy_(1, tokens, stored[:, first : first + len(tokens)].clone())

    def copy_from(self, other: "KVCache", rows: slice | None = None) -> None:
        """Take the contents of a cache of the same spec, in place; the cursor comes with it.

        Args:
            other: of the same spec except for its batch size.
            rows: batch entries of it that are taken; None: all. They are repeated where this cache
                has a multiple of them.
        """
        for mine, theirs in zip(self._stored(), other._stored(), strict=True):
            taken = theirs if rows is None else theirs[rows]
            mine.unflatten(0, (-1, len(taken))).copy_(taken)

    def _stored(self) -> list[Tensor]:
        """All tensors that this cache consists of, ``[B, ...]``."""
        tokens = [x for x in (self.k, self.v, self.sink_k) if x is not None]
        found = [x for part in tokens for x in ([part] if isinstance(part, Tensor) else part.parts)]
        return found if self.scales is None else [*found, self.scales]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (stored sink keys included) on this rank."""
        return self.spec.nbytes

    def parts(self) -> Iterator[tuple[str, TensorPart]]:
        """This rank's parts of the cached tensors of the whole model, which are not read yet.

        Returns:
            ``k`` and ``v`` ``[B, F * tokens per frame, N, D]``, keys as they are rotated now, of
            the frames ``cursor.past_frames()``, ordered by position; ``sink_k``, the sink's frames
            among these as first rotated, where those are stored.
        """
        frames = self.cursor.past_frames()
        tokens = len(frames) * self.spec.tokens_per_frame
        kept = self._sink_tokens_of(frames)

        def read(stored: Any) -> Tensor:
            return stored[:, self._tokens_of(self._slots_of(frames))]

        yield "k", self._part(tokens, lambda: read(self.k))
        yield "v", self._part(tokens, lambda: read(self.v))
        sink_k = self.sink_k
        if sink_k is not None:
            yield "sink_k", self._part(kept, lambda: sink_k[:, :kept])

    def canonical_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of these tensors."""
        return ((name, part.read()) for name, part in self.parts())

    def whole_region(self, tokens: int) -> Region:
        """``[B, tokens, N, D]`` of the whole model."""
        spec = self.whole_spec
        return whole_region((spec.batch_size, tokens, spec.num_heads, spec.head_dim))

    def region(self, tokens: int) -> Region:
        """This rank's entries of ``[B, tokens, N, D]`` of the whole model."""
        whole = self.whole_region(tokens)
        return whole if self.layout is None else self.layout.cache_region(whole)

    def load_canonical(self, frames: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Take what this rank holds of the whole model, in place; the cursor comes first.

        Args:
            frames: positions that the tensors hold.
            state: this rank's tensors by name, as `parts` gives them.

        Raises:
            ValueError: other frames than this sink and window hold, or another size of model.
        """
        held = self.cursor.past_frames()
        if list(frames) != held:
            raise ValueError(
                f"The state holds keys of the latent frames {list(frames)}, but sink_size_t="
                f"{self.spec.sink_size_t} and window_size_t={self.spec.window_size_t} hold {held} "
                "here. Load it with the sink and window that it was exported with."
            )
        if ("sink_k" in state) != (self.sink_k is not None):
            raise ValueError("The state and this model differ in relative_rope; set it equally.")
        if held and self.scales is not None and not bool(self.scales.all()):
            raise ValueError(
                "The state has no scales per head: it was exported with precision='native'. Load "
                "it with that setting."
            )
        tokens = self._tokens_of(self._slots_of(held))
        for name, stored in (("k", self.k), ("v", self.v)):
            stored[:, tokens] = self._fitting(state[name], len(tokens))
        if self.sink_k is not None:
            kept = self._sink_tokens_of(held)
            self.sink_k[:, :kept] = self._fitting(state["sink_k"], kept)

    def _part(self, tokens: int, read: Callable[[], Tensor]) -> TensorPart:
        """The part ``[B, tokens, N, D]`` of this rank, which ``read`` gives."""
        spec, layout = self.whole_spec, self.layout
        tokens = tokens // self.spec.tokens_per_frame * spec.tokens_per_frame
        whole = self.whole_region(tokens)
        written = whole if layout is None else layout.written_region(whole)
        return TensorPart(region_shape(whole), spec.dtype, self.region(tokens), written, read)

    def _slots_of(self, frames: Sequence[int]) -> list[int]:
        return [self.cursor.slot_of(frame) for frame in frames]

    def _tokens_of(self, frame_slots: Sequence[int]) -> Tensor:
        return token_slots(frame_slots, self.spec.tokens_per_frame).to(self.k.device)

    def _sink_tokens_of(self, frames: Sequence[int]) -> int:
        return sum(p < self.spec.sink_size_t for p in frames) * self.spec.tokens_per_frame

    def _fitting(self, x: Tensor, tokens: int) -> Tensor:
        wanted = (self.spec.batch_size, tokens, self.spec.num_heads, self.spec.head_dim)
        if tuple(x.shape) != wanted or x.dtype != self.spec.dtype:
            raise ValueError(
                f"This rank's part of the keys is {x.dtype} {list(x.shape)} in the state and "
                f"{self.spec.dtype} {list(wanted)} here: it was exported from another model."
            )
        return x


def __getattr__(name: str) -> Any:
    if name == "CacheCursor":
        warnings.warn(
            "flashdreams.attention.cache.CacheCursor is flashdreams.attention.cursor.Cursor now; "
            "the old name will be removed in 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _CacheCursor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
