"""The cursor of a sink-and-window cache: which latent frame is in which slot."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flashdreams.runtime.transfer import to_device


def token_slots(frame_slots: Sequence[int], tokens_per_frame: int) -> Tensor:
    """Slots of the tokens of latent frames in the given slots, ``[F * tokens per frame]`` int64."""
    slots = torch.tensor(list(frame_slots), dtype=torch.int64, device="cpu")
    return (
        slots[:, None] * tokens_per_frame
        + torch.arange(tokens_per_frame, dtype=torch.int64, device="cpu")
    ).flatten()


class Cursor:
    """Positions of one window as host integers; shared by all layers that have this window.

    ``frames[slot]`` is the latent frame in a slot. Slots fill in order, so the visible ones are
    always a prefix. A new frame takes the next empty slot; in a full window it takes that of the
    oldest frame that is neither in a sink slot nor pinned. Unless something was pinned, that is a
    ring: frame ``p`` is in slot ``p`` while ``p < sink``, else in ``sink + (p - sink) % window``.

    ``begin_step`` starts an AR step, ``advance`` ends it; a step that is started again overwrites
    itself. ``begin_rewrite_chunk`` points at the slots from 0 on, for frames that are computed
    again, and ``end_rewrite`` returns to the current chunk.

    The tensor ``slots`` keeps its storage from one AR step to the next, as CUDA graphs need.
    """

    def __init__(self, sink_size_t: int, window_size_t: int, tokens_per_frame: int) -> None:
        """Begin with an empty window.

        Args:
            sink_size_t: latent frames that are never evicted, from frame 0 on.
            window_size_t: latent frames of the sliding window, the current chunk included.
            tokens_per_frame: tokens that a layer caches per latent frame.
        """
        self.sink_size_t = sink_size_t
        self.window_size_t = window_size_t
        self.tokens_per_frame = tokens_per_frame
        self.start = 0
        self.len_t = 0
        self.frames: list[int] = []
        self.pinned: tuple[int, ...] = ()
        """Latent frames that are not evicted until others replace them as pinned."""
        self.slots: Tensor | None = None
        self.frame_slots_written: list[int] = []
        """Slots of the latent frames that are written now, in order."""
        self._slot_buffers: dict[int, Tensor] = {}
        self._rewritten_t: int | None = None

    @property
    def capacity_t(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.sink_size_t + self.window_size_t

    @property
    def end(self) -> int:
        """Latent frames seen, including the current chunk."""
        return self.start + self.len_t

    @property
    def evicted(self) -> int:
        """Latent frames that have left the window, including for the current chunk."""
        return max(0, self.end - self.capacity_t)

    @property
    def is_full(self) -> bool:
        """Whether attention reads every slot; stays true once the window is full."""
        return self._rewritten_t is None and len(self.frames) == self.capacity_t

    @property
    def is_rewriting(self) -> bool:
        """Whether frames are recomputed, between AR steps."""
        return self._rewritten_t is not None

    @property
    def visible_tokens(self) -> int:
        """Length of the prefix of token slots that attention reads."""
        frames = len(self.frames) if self._rewritten_t is None else self._rewritten_t
        return frames * self.tokens_per_frame

    def slot_of(self, frame: int) -> int:
        """The slot of a latent frame: where it is, or where the ring would have it."""
        if frame in self.frames:
            return self.frames.index(frame)
        return self._ring_slot(frame)

    def _ring_slot(self, frame: int) -> int:
        sink = self.sink_size_t
        return frame if frame < sink else sink + (frame - sink) % self.window_size_t

    def frame_slots(self, start: int, stop: int) -> list[int]:
        """Slots of the latent frames ``start`` to ``stop - 1``."""
        return [self.slot_of(frame) for frame in range(start, stop)]

    def past_frames(self) -> list[int]:
        """Latent frames before the current chunk that are in the cache, oldest first."""
        return sorted(frame for frame in self.frames if frame < self.start)

    def begin_step(self, len_t: int, device: torch.device) -> None:
        """Point at the slots of the next ``len_t`` latent frames and evict what was there.

        Args:
            len_t: latent frames of the chunk.
            device: of ``slots``.

        Raises:
            ValueError: the chunk is longer than the window.
        """
        if len_t > self.window_size_t:
            raise ValueError(
                f"A chunk of {len_t} latent frames does not fit window_size_t="
                f"{self.window_size_t}; window_size_t must be at least {len_t}."
            )
        self.len_t = len_t
        self._point_at([self._place(frame) for frame in range(self.start, self.end)], device)

    def _place(self, frame: int) -> int:
        """Give a new latent frame a slot, and return it."""
        if frame in self.frames:
            return self.frames.index(frame)
        if len(self.frames) < self.capacity_t:
            self.frames.append(frame)
            return len(self.frames) - 1
        rolling = [f for f in self.frames[self.sink_size_t :] if f not in self.pinned]
        slot = self.frames.index(min(rolling))
        self.frames[slot] = frame
        return slot

    def pin(self, frames: Sequence[int]) -> None:
        """Keep latent frames from being evicted, in place of those that were pinned before.

        Raises:
            ValueError: too many, so that the next chunk would not fit in the window.
        """
        if len(frames) + self.len_t > self.window_size_t:
            raise ValueError(
                f"{len(frames)} pinned latent frames and a chunk of {self.len_t} do not fit "
                f"window_size_t={self.window_size_t}."
            )
        self.pinned = tuple(frames)

    def drop_past(self, device: torch.device) -> None:
        """Drop all frames but the sink and the current chunk, which moves up to be rewritten."""
        sink = [frame for frame in self.frames[: self.sink_size_t] if frame < self.start]
        self.frames = [*sink, *range(self.start, self.end)]
        self.pinned = ()
        self._point_at(self.frame_slots(self.start, self.end), device)

    def hold(self, frames: Sequence[int]) -> None:
        """Record which frames were written to the slots from 0 on."""
        self.frames = list(frames)

    def advance(self) -> None:
        """End the AR step: its frames are clean, and the next chunk follows them."""
        self.start = self.end
        self.len_t = 0

    def begin_rewrite_chunk(self, len_t: int, device: torch.device, first_slot: int = 0) -> None:
        """Point at the next ``len_t`` slots, from ``first_slot`` on, for frames to recompute.

        What was rewritten so far, and what is before it, is visible. Afterwards
        `KVCache.scatter` moves the frames to their own slots.
        """
        first = first_slot if self._rewritten_t is None else self._rewritten_t
        self._rewritten_t = first + len_t
        self._point_at(range(first, first + len_t), device)

    def end_rewrite(self) -> None:
        """Return to the current chunk, if there is one."""
        self._rewritten_t = None
        if self.len_t and self.slots is not None:
            self._point_at(self.frame_slots(self.start, self.end), self.slots.device)

    def reset(
        self,
        start: int = 0,
        frames: Sequence[int] | None = None,
        pinned: Sequence[int] = (),
    ) -> None:
        """Set the position to between AR steps, after ``start`` latent frames, in the same storage.

        Args:
            start: latent frames seen.
            frames: the frame in each slot; None: what a ring has left after so many frames.
            pinned: as of ``pin``.
        """
        self.start, self.len_t, self._rewritten_t = start, 0, None
        self.frames = self._ring_frames() if frames is None else list(frames)
        self.pinned = tuple(pinned)

    def _ring_frames(self) -> list[int]:
        first = max(self.sink_size_t, self.start - self.window_size_t)
        held = [*range(min(self.sink_size_t, self.start)), *range(first, self.start)]
        return sorted(held, key=self._ring_slot)

    def off_ring(self) -> dict[str, list[int]]:
        """What ``reset`` needs beside ``start``: nothing unless frames were pinned or moved."""
        if not self.pinned and self.frames == self._ring_frames():
            return {}
        return {"frames": list(self.frames), "pinned": list(self.pinned)}

    def clone(self) -> "Cursor":
        """The same positions with slot tensors of its own; between AR steps."""
        other = type(self)(self.sink_size_t, self.window_size_t, self.tokens_per_frame)
        other.start, other.frames, other.pinned = self.start, list(self.frames), self.pinned
        return other

    def _point_at(self, frame_slots: Sequence[int], device: torch.device) -> None:
        tokens = to_device(token_slots(frame_slots, self.tokens_per_frame), device)
        buffer = self._slot_buffers.setdefault(len(tokens), tokens)
        if buffer is not tokens:
            buffer.copy_(tokens)
        self.slots = buffer
        self.frame_slots_written = list(frame_slots)


class CacheCursor(Cursor):
    """Deprecated form of `Cursor` with its old calls; will be removed in 0.3."""

    def place(self, len_t: int, device: torch.device) -> None:
        """Deprecated: ``begin_step``."""
        _deprecated("place", "begin_step")
        self.begin_step(len_t, device)

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Deprecated: ``begin_rewrite_chunk`` and, at the end, ``end_rewrite``."""
        _deprecated("rewriting", "end_rewrite")
        try:
            yield
        finally:
            self.end_rewrite()

    def place_next(self, len_t: int, device: torch.device) -> None:
        """Deprecated: ``begin_rewrite_chunk``."""
        _deprecated("place_next", "begin_rewrite_chunk")
        self.begin_rewrite_chunk(len_t, device)

    def state_dict(self) -> dict[str, int]:
        """Deprecated: ``start``."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Deprecated: ``reset``."""
        self.reset(state["start"])


def _deprecated(old: str, new: str) -> None:
    warnings.warn(
        f"CacheCursor.{old} is Cursor.{new} now; the old name will be removed in 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )
