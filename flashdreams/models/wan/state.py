"""The state of a Wan transformer in one rollout; shape letters as in the transformer's file."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flashdreams.attention.cache import CacheCursor, KVCache


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
    outside_graphs: ClassVar[frozenset[str]] = frozenset({"condition"})
    """What the network call does not touch, so that it may move; see `GraphedCallable`."""

    condition: Tensor | None
    """``[B, condition_channels, F, H, W]``, concatenated to the latents by position; latent frames
    past the last one see that one."""
    modulations: Callable[[float], Tensor]
    """Of a timestep, as ``WanTransformer.modulations`` gives them; kept once they are computed."""
    chunk_condition: Tensor | None = None
    """``[B, condition_channels, T, H, W]`` of the current chunk."""
    rope: Tensor | None = None
    """``[L, D/2, 2]`` of the current chunk."""
    control: Control | None = None


def graph_key(cache: WanCache, write_only: bool = False) -> Hashable:
    """What the network call depends on beside tensors.

    That is the number of visible keys, and how much of the network is run.
    """
    return cache.cursor.visible_tokens, write_only
