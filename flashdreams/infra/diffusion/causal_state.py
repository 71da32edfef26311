"""The state of a causal transformer in one rollout, and the inputs of one AR step.

Shape letters as in `flashdreams.infra.diffusion.causal`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.choose import AttentionShape
from flashdreams.attention.cursor import Cursor
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.finite import tensors_in
from flashdreams.parallel.plan import state
from flashdreams.runtime.transfer import to_device

MAX_TIMESTEPS = 64
"""Timesteps whose modulations a streaming rollout keeps; schedules have fewer."""


class StepInputs:
    """Inputs of a network call besides latent, modulation and state; constant over an AR step.

    Filled in place: the tensors of the first fill keep their storage, as CUDA graphs need.
    """

    def __init__(self, rotations: Any = None, condition: Any = None, control: Any = None) -> None:
        self.rotations = rotations
        """Rotary tables, usually ``[L, D/2, 2]``."""
        self.condition: Tensor | None = condition
        """``[B, condition_channels, T, H, W]`` of the chunk."""
        self.control = control
        """What ``embed_control`` returned."""
        self.in_place = True
        """Whether the tensors are those of the first fill; if not, graphs do not read them."""
        self._first: tuple[Any, ...] | None = None

    def fill(self, new: "StepInputs") -> None:
        """Copy the values of ``new``, without keeping references to it.

        Those of other shapes than the first ones, such as one control for all tokens instead of
        one for each, have storage of their own.
        """
        values = (new.rotations, new.condition, new.control)
        if self._first is None:
            self._first = _cloned(values)
        self.in_place = _same_form(self._first, values)
        if self.in_place:
            copy_tensors(self._first, values)
        chosen = self._first if self.in_place else _cloned(values)
        self.rotations, self.condition, self.control = chosen


@dataclass
class Shots:
    """Progress of a rollout with several shots."""

    begun: int = state("host", default=0)
    """Shots that have begun after the first one."""
    opening: bool = state("host", default=False)
    """The current or next chunk begins one."""


@dataclass
class CausalState:
    """All state that a causal transformer has in one rollout."""

    context: Any
    """What ``project_context`` returned."""
    cursors: list[Cursor] = state("host")
    """One per distinct window, shared by the caches of that window."""
    scales: dict[str, list[Tensor]] = state("heads")
    """Glob of ``cache_specs`` -> the scales of its fp8 caches, which are the caches' own tensors:
    ``[B, 3, N, 1]`` float32, of queries, keys and values. A load needs them before ``caches``."""
    caches: dict[str, list[KVCache | None]] = state("cache")
    """Glob of ``cache_specs`` -> the caches of its cores; None without streaming."""
    condition: Tensor | None = state("rebuilt")
    """``[B, condition_channels, F, H, W]`` by position; latent frames past the last one see it."""
    batch_size: int = state("rebuilt")
    shots: Shots = state("host", default_factory=Shots)
    """Scene cuts so far."""
    modulations: dict[float, Tensor] = state("rebuilt", default_factory=dict)
    """Results of ``modulations`` for the timesteps so far."""
    inputs: StepInputs = state("rebuilt", default_factory=StepInputs)
    """Of the current AR step; filled by ``begin_step``."""

    @property
    def cursor(self) -> Cursor:
        """The cursor of the first caches: where the rollout is."""
        return self.cursors[0]

    @property
    def is_steady(self) -> bool:
        """Whether every window is full and scales are fixed, so later calls are alike."""
        return all(cursor.is_full for cursor in self.cursors) and not (
            self.scales and self.cursor.start == 0
        )

    def condition_at(self, frames: Tensor) -> Tensor:
        """The rollout's condition of latent frames at the positions ``[T]``.

        Raises:
            ValueError: there is none, and this AR step came without one.
        """
        if self.condition is None:
            raise ValueError("Neither initialize_cache nor this AR step was given a condition.")
        last = self.condition.shape[2] - 1
        return self.condition[:, :, to_device(frames.clamp(max=last), self.condition.device)]

    def layers(self) -> Iterator[KVCache]:
        """All KV caches."""
        for caches in self.caches.values():
            for cache in caches:
                if cache is not None:
                    yield cache


def scales_by_glob(caches: Mapping[str, Sequence[KVCache | None]]) -> dict[str, list[Tensor]]:
    """The scales of the fp8 caches, in their order."""
    found = {
        glob: [x.scales for x in some if x is not None and x.scales is not None]
        for glob, some in caches.items()
    }
    return {glob: scales for glob, scales in found.items() if scales}


def checked_condition(
    condition: Tensor | None, transformer: Transformer, batch_size: int
) -> Tensor:
    """A condition on the device and in the type of a transformer.

    Args:
        condition: ``[B, condition_channels, F, H, W]``.
        transformer: its config says what fits.
        batch_size: B.

    Raises:
        ValueError: None, or another shape.
    """
    c: Any = transformer.config
    wanted = (batch_size, c.condition_channels, c.latent_height, c.latent_width)
    shape = [] if condition is None else list(condition.shape)
    if condition is None or (*shape[:2], *shape[3:]) != wanted or shape[2] == 0:
        raise ValueError(
            f"The condition must be [{batch_size}, {c.condition_channels}, latent frames, "
            f"{c.latent_height}, {c.latent_width}]; got {shape or None}. "
            "A model with condition_channels=0 takes none; others need one, usually an image."
        )
    return to_device(condition, transformer.device).to(transformer.dtype)


def attention_over(spec: KVCacheSpec, config: CausalTransformerConfig) -> AttentionShape:
    """The attention call of the whole model over a full cache or, without streaming, a chunk."""
    tokens = config.len_t * spec.tokens_per_frame
    return AttentionShape(
        batch_size=spec.batch_size,
        queries=tokens,
        keys=spec.capacity_t * spec.tokens_per_frame if config.streaming else tokens,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        # Attention over an fp8 cache is fixed: the choice is for cross-attention.
        storage="native" if spec.storage == "fp8" else spec.storage,
    )


def graph_key(inputs: StepInputs, state: CausalState, write_only: bool = False) -> bool | None:
    """Which of the two graphs of a state a call needs; None while a window fills, and for inputs
    of other shapes than the first ones."""
    return write_only if state.is_steady and inputs.in_place else None


def graph_state(inputs: StepInputs, state: CausalState, write_only: bool = False) -> CausalState:
    """The state that the graphs of a call belong to."""
    return state


def select_tokens(control: Any, kept: Sequence[int], len_t: int) -> Any:
    """The part of an AR step's control ``[B, L, ...]`` that belongs to some of its latent frames.

    Args:
        control: of the whole AR step; None stays None, and so does one token for all, ``L = 1``.
        kept: places of the frames in the chunk.
        len_t: latent frames of the chunk.
    """
    if control is None or len(kept) == len_t or control.shape[1] == 1:
        return control
    return control.unflatten(1, (len_t, -1))[:, list(kept)].flatten(1, 2)


def token_values_to_pixels(
    values: Tensor, size: Sequence[int], patch_size: Sequence[int]
) -> Tensor:
    """Values per batch entry, latent frame or token, spread over a latent.

    Args:
        values: ``[B]``, ``[B, T]`` or ``[B, L]``.
        size: T, H and W of the latent.
        patch_size: latent frames, rows and columns of a token.

    Returns:
        ``[B, 1, T, H, W]``, with a 1 in place of the dims over which the values are the same.
    """
    if values.ndim == 1 or values.shape[1] in (1, size[0]):
        return values.reshape(len(values), 1, -1, 1, 1)
    tokens = [whole // patch for whole, patch in zip(size, patch_size, strict=True)]
    spread = values.reshape(len(values), 1, *tokens)
    for dim, patch in enumerate(patch_size, start=2):
        spread = spread.repeat_interleave(patch, dim)
    return spread


def copy_tensors(stored: Any, new: Any) -> None:
    """Copy the tensors of one nest into those of another of the same shapes, in place."""
    for into, x in zip(tensors_in(stored), tensors_in(new), strict=True):
        into.copy_(x)


def same_shapes(a: Any, b: Any) -> bool:
    """Whether two nests hold tensors of the same shapes in the same order."""
    return [x.shape for x in tensors_in(a)] == [x.shape for x in tensors_in(b)]


def _same_form(a: Any, b: Any) -> bool:
    """Whether two nests differ in the values of their tensors alone."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(map(_same_form, a.values(), b.values()))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same_form, a, b))
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def _cloned(value: Any) -> Any:
    """A nest with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _cloned(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        make: Callable[..., Any] = getattr(type(value), "_make", type(value))
        return make(map(_cloned, value))
    return value
