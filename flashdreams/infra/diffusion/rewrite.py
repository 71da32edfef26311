"""Recomputing the window of a causal transformer, after the prompt has changed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashdreams.infra.diffusion.causal_state import CausalState, select_tokens
from flashdreams.infra.diffusion.transformer import ContextChunk

RewriteMode = Literal["chunks", "once"]
"""How the window is recomputed: chunk by chunk, or all frames in one forward pass."""


def context_frames(transformer: Any, cache: CausalState) -> list[int]:
    """Latent frames whose clean latents may be needed to recompute the window, oldest first."""
    config = transformer.config
    if not config.streaming:
        return []
    cursor = cache.cursor
    if config.rewritten_sink == "moved":
        return list(range(max(0, cursor.start - cursor.capacity_t), cursor.start))
    return cursor.past_frames()


def check_rewrite(transformer: Any, cache: CausalState, mode: RewriteMode) -> None:
    """Refuse an unsupported way to recompute the window, before anything is changed.

    Raises:
        ValueError: an unknown mode; ``"once"`` with ``relative_rope``, which rotates the sink;
            ``"chunks"`` where the sink moves; layers whose windows hold other frames than those of
            the first; shots, whose frames have positions of their own.
    """
    config = transformer.config
    if mode not in get_args(RewriteMode):
        raise ValueError(f'reencode_window={mode!r}: must be True, False, "chunks" or "once".')
    if mode == "once" and config.relative_rope and config.rewritten_sink != "kept":
        raise ValueError('mode="once" cannot be used with relative_rope=True; use "chunks".')
    if mode == "chunks" and config.rewritten_sink == "moved":
        raise ValueError('rewritten_sink="moved" requires mode="once".')
    windows = {(cursor.sink_size_t, cursor.window_size_t) for cursor in cache.cursors}
    if len(windows) > 1:
        raise ValueError(
            f"There are windows of several sizes, (sink, window): {sorted(windows)}. They cannot "
            "be recomputed; change the prompt without reencode_window."
        )
    if cache.shots.begun:
        raise ValueError(
            "A rollout with shots keeps its window; change the prompt without reencode_window."
        )


def rewrite_context(
    transformer: Any,
    cache: CausalState,
    chunks: Sequence[ContextChunk],
    timestep: Tensor,
    mode: RewriteMode = "chunks",
) -> None:
    """Recompute the window, and the sink according to ``rewritten_sink``; frames keep positions.

    ``"chunks"``: each chunk sees itself and earlier frames. With cache-relative RoPE the
    sink is placed right before the window once the first frames behind it are reached.
    ``"once"``: one forward pass over all frames, which attend to each other without a mask.

    Args:
        transformer: a `CausalTransformer`.
        cache: this rollout's state.
        chunks: clean latents of the frames that ``context_frames`` names.
        timestep: of the clean pass.
        mode: see `RewriteMode`.

    Raises:
        ValueError: see ``check_rewrite``.
    """
    transformer.check_rewrite(cache, mode)
    config = transformer.config
    policy, first_slot = config.rewritten_sink, 0
    if policy == "kept" and cache.cursor.start > cache.cursor.capacity_t:
        first_slot = config.sink_size_t
        chunks = [rest for chunk in chunks if (rest := _without_sink(chunk, first_slot))]
    if not chunks:
        return
    groups = [list(chunks)] if mode == "once" else [[chunk] for chunk in chunks]
    for group in groups:
        _write_group(transformer, cache, group, timestep, first_slot)
    written = [frame for chunk in chunks for frame in chunk.frames]
    for cursor in cache.cursors:
        cursor.end_rewrite()
        if policy == "moved":
            cursor.hold(written)
    if policy != "moved":
        for layer in cache.layers():
            layer.scatter([layer.cursor.slot_of(frame) for frame in written], first_slot)


def _write_group(
    transformer: Any,
    cache: CausalState,
    group: Sequence[ContextChunk],
    timestep: Tensor,
    first_slot: int,
) -> None:
    """One pass over some chunks, which attend to each other and to earlier frames."""
    frames = [frame for chunk in group for frame in chunk.frames]
    if frames[0] >= transformer.config.sink_size_t:
        transformer.rotate_sinks(cache)
    for cursor in cache.cursors:
        cursor.begin_rewrite_chunk(len(frames), transformer.device, first_slot)
    control = _joined_controls(group, transformer.config)
    latent = torch.cat([chunk.latent for chunk in group], dim=2)
    inputs = transformer.inputs_at(
        cache, torch.tensor(frames, dtype=torch.int64, device="cpu"), control
    )
    transformer(latent, transformer.modulation_of(timestep, cache), inputs, cache, True)
    for layer in cache.layers():
        layer.keep_sink(frames[0], frames[-1] + 1)


def _joined_controls(group: Sequence[ContextChunk], config: Any) -> Any:
    """The control of the frames of some chunks, one after the other."""
    parts = [select_tokens(chunk.control, chunk.kept, config.len_t) for chunk in group]
    if not parts[1:] or parts[0] is None:
        return parts[0]
    tokens = (len(chunk.frames) * config.tokens_per_frame for chunk in group)
    each = (
        x.expand(-1, count, *x.shape[2:]) if x.shape[1] == 1 else x
        for x, count in zip(parts, tokens, strict=True)
    )
    return torch.cat(list(each), dim=1)


def _without_sink(chunk: ContextChunk, sink_size_t: int) -> ContextChunk | None:
    """The part of a chunk that is behind the sink."""
    skipped = sum(frame < sink_size_t for frame in chunk.frames)
    if skipped == len(chunk.frames):
        return None
    return replace(
        chunk,
        frames=chunk.frames[skipped:],
        kept=chunk.kept[skipped:],
        latent=chunk.latent[:, :, skipped:],
    )
