"""The sink-and-window KV cache of a streaming rollout."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashdreams.attention.rope import apply_rope, time_rotation


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

    @property
    def capacity_t(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.sink_size_t + self.window_size_t

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (and stored sink keys) of one layer."""
        frames = 2 * self.capacity_t + (self.sink_size_t if self.relative_sink else 0)
        row = self.num_heads * self.head_dim * self.dtype.itemsize
        return self.batch_size * frames * self.tokens_per_frame * row

    def with_heads(self, num_heads: int) -> "KVCacheSpec":
        """The same cache for another number of heads."""
        return replace(self, num_heads=num_heads)


class CacheCursor:
    """Which slots the current chunk fills and how many are visible; shared by all layers.

    Latent frame ``p`` lives in slot ``p`` while ``p < sink``, else in slot
    ``sink + (p - sink) % window``. Slots fill in order, so the visible ones are always a prefix.
    ``place`` starts an AR step, ``advance`` ends it; a step that is placed again overwrites itself.
    """

    def __init__(self, sink_size_t: int, window_size_t: int, tokens_per_frame: int) -> None:
        self.sink_size_t = sink_size_t
        self.window_size_t = window_size_t
        self.tokens_per_frame = tokens_per_frame
        self.start = 0
        self.len_t = 0
        self.slots: Tensor | None = None

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
        slots = torch.tensor(self.frame_slots(self.start, self.end), dtype=torch.int64)
        tokens = slots[:, None] * self.tokens_per_frame + torch.arange(self.tokens_per_frame)
        tokens = tokens.flatten().to(device)
        if self.slots is not None and self.slots.shape == tokens.shape:
            self.slots.copy_(tokens)
        else:
            self.slots = tokens

    def advance(self) -> None:
        """Close the AR step: its frames are clean now and the next chunk comes after them."""
        self.start = self.end
        self.len_t = 0

    def frame_slots(self, start: int, stop: int) -> list[int]:
        """Slots of the latent frames ``start`` to ``stop - 1``."""
        sink, window = self.sink_size_t, self.window_size_t
        return [p if p < sink else sink + (p - sink) % window for p in range(start, stop)]

    @property
    def end(self) -> int:
        """Latent frames seen when the current chunk is counted in."""
        return self.start + self.len_t

    @property
    def visible_tokens(self) -> int:
        """Length of the prefix of slots that attention reads."""
        return min(self.end, self.sink_size_t + self.window_size_t) * self.tokens_per_frame

    @property
    def evicted(self) -> int:
        """Latent frames that have left the window, the current chunk counted in."""
        return max(0, self.end - self.sink_size_t - self.window_size_t)


class KVCache:
    """Keys and values of one layer, ``[B, slots, N, D]``, written in place and never rolled.

    Softmax does not care for the order of keys once the rotation is in them, so the ring needs no
    unwrapping.
    """

    def __init__(self, spec: KVCacheSpec, cursor: CacheCursor) -> None:
        self.spec = spec
        self.cursor = cursor
        slots = spec.capacity_t * spec.tokens_per_frame
        shape = (spec.batch_size, slots, spec.num_heads, spec.head_dim)
        self.k = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        self.v = torch.zeros_like(self.k)
        self.sink_tokens = spec.sink_size_t * spec.tokens_per_frame
        self.sink_k = self.k[:, : self.sink_tokens].clone() if spec.relative_sink else None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk and return all that it may attend to.

        Args:
            k: ``[B, L, N, D]``, rotated keys of the current chunk.
            v: ``[B, L, N, D]``.

        Returns:
            Views of the visible keys and values, ``[B, S, N, D]``, in slot order.
        """
        slots = self.cursor.slots
        if slots is None or k.shape[1] != len(slots):
            expected = 0 if slots is None else len(slots)
            raise ValueError(f"The cache expects {expected} tokens of a chunk, got {k.shape[1]}.")
        self.k.index_copy_(1, slots, k)
        self.v.index_copy_(1, slots, v)
        return self.visible()

    def visible(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values that attention reads, ``[B, S, N, D]``."""
        length = self.cursor.visible_tokens
        return self.k[:, :length], self.v[:, :length]

    def keep_sink(self) -> None:
        """Store the sink keys of the current chunk as they were first rotated (clean pass)."""
        if self.sink_k is None or self.cursor.start >= self.spec.sink_size_t:
            return
        first = self.cursor.start * self.spec.tokens_per_frame
        last = min(self.cursor.end, self.spec.sink_size_t) * self.spec.tokens_per_frame
        self.sink_k[:, first:last] = self.k[:, first:last]

    def rotate_sink(self) -> None:
        """Move the sink so that it stands right before the window (cache-relative RoPE).

        Dot products see differences of positions alone, so shifting the sink forward by the
        number of evicted frames equals numbering the slots. Always from the stored keys.
        """
        if self.sink_k is None or self.cursor.evicted == 0:
            return
        table = time_rotation(self.cursor.evicted, self.spec.head_dim).to(self.k.device)
        self.k[:, : self.sink_tokens] = apply_rope(self.sink_k, table)
