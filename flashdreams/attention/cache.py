"""The sink-and-window KV cache of a streaming rollout."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flashdreams.attention.quantized import KVStorage, QuantizedTokens
from flashdreams.attention.rope import apply_rope, time_rotation
from flashdreams.runtime.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """Size of one layer's cache, said for the whole model: no rank appears in it.

    A parallel strategy that splits the cache divides the one field that it splits and hands the
    rest on.
    """

    batch_size: int
    sink_size_t: int
    """Latent frames that are kept for ever, from frame 0 on."""

    window_size_t: int
    """Latent frames of the sliding window, the current chunk included, the sink not."""

    tokens_per_frame: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    relative_sink: bool = False
    """Keep the sink keys as first rotated too, for cache-relative RoPE."""
    storage: KVStorage = "native"
    """Keep keys and values in ``dtype``, or in eight bits and a scale per token and head."""

    @property
    def capacity_t(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.sink_size_t + self.window_size_t

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (stored sink keys included) of one layer."""
        frames = 2 * self.capacity_t
        frames += self.sink_size_t if self.relative_sink else 0
        native = self.head_dim * self.dtype.itemsize
        row = native if self.storage == "native" else self.head_dim + 1
        return self.batch_size * frames * self.tokens_per_frame * self.num_heads * row

    def new_tokens(self, frames: int) -> Tensor | QuantizedTokens:
        """Zeros ``[B, tokens, N, D]`` for some latent frames, stored as the spec says."""
        shape = (self.batch_size, frames * self.tokens_per_frame, self.num_heads, self.head_dim)
        if self.storage == "native":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        return QuantizedTokens(shape, self.storage, self.dtype, self.device)

    def with_heads(self, num_heads: int) -> "KVCacheSpec":
        """The same cache for another number of heads."""
        return replace(self, num_heads=num_heads)


class CacheLayout(Protocol):
    """How a rank's part of a cache becomes the whole and back; an attention core is one."""

    def gather_cache(self, x: Tensor) -> Tensor:
        """``[B, slots, N, D]`` of the whole model from this rank's part; a collective call."""

    def shard_cache(self, x: Tensor) -> Tensor:
        """This rank's part of ``[B, slots, N, D]`` of the whole model."""


def token_slots(frame_slots: Sequence[int], tokens_per_frame: int) -> Tensor:
    """Slots of the tokens of latent frames in the given slots, ``[F * tokens per frame]`` int64."""
    slots = torch.tensor(list(frame_slots), dtype=torch.int64)
    return (slots[:, None] * tokens_per_frame + torch.arange(tokens_per_frame)).flatten()


class CacheCursor:
    """Which slots the current chunk fills and which are visible; shared by all layers.

    Latent frame ``p`` lives in slot ``p`` while ``p < sink``, else in slot
    ``sink + (p - sink) % window``. Slots fill in order, so the visible ones are always a prefix.
    ``place`` starts an AR step, ``advance`` ends it; a step that is placed again overwrites itself.
    ``rewriting`` and ``place_next`` fill the slots anew with frames that were there before.
    """

    def __init__(self, sink_size_t: int, window_size_t: int, tokens_per_frame: int) -> None:
        self.sink_size_t = sink_size_t
        self.window_size_t = window_size_t
        self.tokens_per_frame = tokens_per_frame
        self.start = 0
        self.len_t = 0
        self.slots: Tensor | None = None
        self._rewritten_t: int | None = None

    def place(self, len_t: int, device: torch.device) -> None:
        """Point at the slots of the next ``len_t`` latent frames.

        The slot tensor keeps its storage from one AR step to the next, as replayed graphs need.

        Raises:
            ValueError: the chunk is longer than the window.
        """
        if len_t > self.window_size_t:
            raise ValueError(
                f"A chunk of {len_t} latent frames does not fit window_size_t="
                f"{self.window_size_t}; window_size_t must be at least {len_t}."
            )
        self.len_t = len_t
        self._point_at(self.frame_slots(self.start, self.end), device)

    def advance(self) -> None:
        """Close the AR step: its frames are clean now and the next chunk comes after them."""
        self.start = self.end
        self.len_t = 0

    def state_dict(self) -> dict[str, int]:
        """Latent frames before the next chunk; to be asked between AR steps."""
        return {"start": self.start}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Stand where the cursor stood that gave ``state``."""
        self.start, self.len_t = state["start"], 0

    def frame_slots(self, start: int, stop: int) -> list[int]:
        """Slots of the latent frames ``start`` to ``stop - 1``."""
        sink, window = self.sink_size_t, self.window_size_t
        return [p if p < sink else sink + (p - sink) % window for p in range(start, stop)]

    def past_frames(self) -> list[int]:
        """Latent frames before the current chunk that are in the cache, oldest first."""
        first = max(self.sink_size_t, self.end - self.window_size_t)
        return [*range(min(self.sink_size_t, self.start)), *range(first, self.start)]

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Fill the cache anew with frames that were there before, oldest first.

        Within the context ``place_next`` points at the next slots from slot 0 on, so that what is
        visible stays a prefix. Afterwards the frames lie one behind the other; `KVCache.scatter`
        brings them to their own slots.
        """
        slots = self.slots
        self.slots, self._rewritten_t = None, 0
        try:
            yield
        finally:
            self.slots, self._rewritten_t = slots, None

    def place_next(self, len_t: int, device: torch.device) -> None:
        """Point at the slots of the next ``len_t`` latent frames that are written anew."""
        first = self._rewritten_t or 0
        self._rewritten_t = first + len_t
        self._point_at(range(first, first + len_t), device)

    def _point_at(self, frame_slots: Sequence[int], device: torch.device) -> None:
        tokens = to_device(token_slots(frame_slots, self.tokens_per_frame), device)
        if self.slots is not None and self.slots.shape == tokens.shape:
            self.slots.copy_(tokens)
        else:
            self.slots = tokens

    @property
    def end(self) -> int:
        """Latent frames seen when the current chunk is counted in."""
        return self.start + self.len_t

    @property
    def visible_tokens(self) -> int:
        """Length of the prefix of slots that attention reads."""
        frames = min(self.end, self.sink_size_t + self.window_size_t)
        if self._rewritten_t is not None:
            frames = self._rewritten_t
        return frames * self.tokens_per_frame

    @property
    def evicted(self) -> int:
        """Latent frames that have left the window, the current chunk counted in."""
        return max(0, self.end - self.sink_size_t - self.window_size_t)


class KVCache:
    """Keys and values of one layer, ``[B, slots, N, D]``, written in place and never rolled.

    Softmax does not care for the order of keys once the rotation is in them, so the ring needs no
    unwrapping. In eight bits the past is what has been rounded: the chunk that is being computed
    attends to its own keys and values as they are.
    """

    def __init__(
        self, spec: KVCacheSpec, cursor: CacheCursor, layout: CacheLayout | None = None
    ) -> None:
        self.spec = spec
        self.cursor = cursor
        self.layout = layout
        self.k = spec.new_tokens(spec.capacity_t)
        self.v = spec.new_tokens(spec.capacity_t)
        self.sink_tokens = spec.sink_size_t * spec.tokens_per_frame
        self.sink_k = spec.new_tokens(spec.sink_size_t) if spec.relative_sink else None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk and return all that it may attend to.

        Args:
            k: ``[B, L, N, D]``, rotated keys of the current chunk.
            v: ``[B, L, N, D]``.

        Returns:
            The visible keys and values, ``[B, S, N, D]``, in slot order: views, or new tensors
            where they are stored in eight bits.
        """
        slots, visible = self.write(k, v), self.visible()
        if self.spec.storage != "native":
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
        return slots

    def visible(self) -> tuple[Tensor, Tensor]:
        """The keys and values that attention reads, ``[B, S, N, D]``, as they are stored."""
        length = self.cursor.visible_tokens
        return self.k[:, :length], self.v[:, :length]

    def keep_sink(self, start: int | None = None, end: int | None = None) -> None:
        """Store sink keys as they were first rotated (clean pass).

        Args:
            start: first latent frame just written; None is the current chunk's.
            end: the frame after the last one; None is the current chunk's.
        """
        start = self.cursor.start if start is None else start
        end = self.cursor.end if end is None else end
        if self.sink_k is None or start >= self.spec.sink_size_t:
            return
        first = start * self.spec.tokens_per_frame
        last = min(end, self.spec.sink_size_t) * self.spec.tokens_per_frame
        self.sink_k[:, first:last] = self.k[:, first:last]

    def rotate_sink(self, rotation: Tensor | None = None) -> None:
        """Move the sink so that it stands right before the window (cache-relative RoPE).

        Dot products see differences of positions alone, so shifting the sink forward by the
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

    def scatter(self, frame_slots: Sequence[int]) -> None:
        """Move frame ``i`` of those written anew to slot ``frame_slots[i]``; one copy, in place.

        Slots that are not named keep what they hold.
        """
        if list(frame_slots) == list(range(len(frame_slots))):
            return
        tokens = self._tokens_of(frame_slots)
        for stored in (self.k, self.v):
            stored.index_copy_(1, tokens, stored[:, : len(tokens)].clone())

    def state_dict(self) -> dict[str, Tensor]:
        """Frames of the whole model in the order of their positions; a collective call.

        Returns:
            ``frames`` ``[F]`` int64, positions in the rollout, ascending; ``k`` and ``v``
            ``[B, F * tokens per frame, N, D]``, keys as they are rotated now; ``sink_k``, the
            sink's frames among these as first rotated, where those are stored.
        """
        frames = self.cursor.past_frames()
        tokens = self._tokens_of(self._slots_of(frames))
        state = {"frames": torch.tensor(frames, dtype=torch.int64)}
        for name, stored in (("k", self.k), ("v", self.v)):
            state[name] = self._gather(stored[:, tokens])
        if self.sink_k is not None:
            state["sink_k"] = self._gather(self.sink_k[:, : self._sink_tokens_of(frames)])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what ``state_dict`` gave, in place; the cursor comes first.

        Raises:
            ValueError: other frames than this sink and window hold, or another size of model.
        """
        frames, held = state["frames"].tolist(), self.cursor.past_frames()
        if frames != held:
            raise ValueError(
                f"The state holds keys of the latent frames {frames}, but sink_size_t="
                f"{self.spec.sink_size_t} and window_size_t={self.spec.window_size_t} hold {held} "
                "here. Load it with the sink and window that it was exported with."
            )
        if ("sink_k" in state) != (self.sink_k is not None):
            raise ValueError("The state and this model differ in relative_rope; set it alike.")
        tokens = self._tokens_of(self._slots_of(frames))
        for name, stored in (("k", self.k), ("v", self.v)):
            stored[:, tokens] = self._shard(state[name], len(tokens))
        if self.sink_k is not None:
            kept = self._sink_tokens_of(frames)
            self.sink_k[:, :kept] = self._shard(state["sink_k"], kept)

    def _slots_of(self, frames: Sequence[int]) -> list[int]:
        return [slot for p in frames for slot in self.cursor.frame_slots(p, p + 1)]

    def _tokens_of(self, frame_slots: Sequence[int]) -> Tensor:
        return token_slots(frame_slots, self.spec.tokens_per_frame).to(self.k.device)

    def _sink_tokens_of(self, frames: Sequence[int]) -> int:
        return sum(p < self.spec.sink_size_t for p in frames) * self.spec.tokens_per_frame

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.layout is None else self.layout.gather_cache(x)

    def _shard(self, whole: Tensor, tokens: int) -> Tensor:
        own = whole if self.layout is None else self.layout.shard_cache(whole)
        wanted = (self.spec.batch_size, tokens, self.spec.num_heads, self.spec.head_dim)
        if tuple(own.shape) != wanted or own.dtype != self.spec.dtype:
            raise ValueError(
                f"This rank's part of the keys is {own.dtype} {list(own.shape)} in the state and "
                f"{self.spec.dtype} {list(wanted)} here: it was exported from another model."
            )
        return own
