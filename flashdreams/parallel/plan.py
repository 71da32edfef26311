"""Parallel plans: what a model lets others split, as frozen data."""

import re
from dataclasses import dataclass, field
from typing import Literal

TensorStyle = Literal["colwise", "colwise_gathered", "rowwise", "norm", "replicated"]
SpatialStyle = Literal["halo", "gather_width"]
RolloutStyle = Literal["heads", "rebuilt"]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Where a plain, single-device module may be cut, said beside the module.

    Keys are globs over submodule names (``*`` matches one path component). Every glob must match
    at least one submodule when the plan is applied. The module itself never reads its plan.
    """

    tensor: dict[str, TensorStyle] = field(default_factory=dict)
    """Linear or norm -> how its weight is split over the ``tp`` axis. ``"colwise_gathered"`` is
    colwise with an output that every rank gets whole, for a result that meets whole tensors: an
    exchange as large as the output, so for layers that run seldom. ``"replicated"`` says that a
    linear stays whole on purpose."""

    split: dict[str, int] = field(default_factory=dict)
    """Submodule -> dim of its output that is cut over the sequence ranks."""

    gather: dict[str, int] = field(default_factory=dict)
    """Submodule -> dim of its output that is gathered from the sequence ranks."""

    attention: tuple[str, ...] = ()
    """Attention cores whose exchange a context-parallel strategy takes over."""

    rollout: dict[str, RolloutStyle] = field(default_factory=dict)
    """Field of the transformer's rollout state -> ``"heads"`` (``[B, S, N, D]`` tensors that hold
    the heads of the sliced weights) or ``"rebuilt"`` (made from the rollout's context or by
    ``begin_step``, so that the exported state leaves it out). All other fields but KV caches must
    be the same on every rank."""

    low_precision: tuple[str, ...] = ()
    """Linears whose products may be computed in eight bits where the user asks for it."""

    spatial: dict[str, SpatialStyle] = field(default_factory=dict)
    """Decoder submodule -> ``"halo"`` (a convolution that needs its neighbours' columns) or
    ``"gather_width"`` (a module that must see the full width)."""


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob over dotted names as a regular expression; ``*`` stays within one component."""
    return re.compile(re.escape(glob).replace(r"\*", r"[^.]*"))
