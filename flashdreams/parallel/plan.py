"""Parallel plans and state styles: what a model lets others split, as data."""

import re
from dataclasses import MISSING, Field, dataclass, field
from typing import Any, Literal, get_args

TensorStyle = Literal[
    "colwise", "colwise_kv", "colwise_qkv", "colwise_gathered", "rowwise", "norm", "replicated"
]
CoreStyle = Literal["all_tokens", "split_queries"]
SpatialStyle = Literal["halo", "gather_width"]
RolloutStyle = Literal["heads", "rebuilt"]

StateStyle = Literal["whole", "heads", "cache", "columns", "rank0", "rebuilt", "host"]
"""How a field of a rollout's state is held by several ranks:

- ``"whole"``: equal on all ranks;
- ``"heads"``: tensors ``[B, S, N, D]`` whose heads are cut over the ``tp`` axis;
- ``"cache"``: KV caches, which ask their attention core for the cut;
- ``"columns"``: decoder state ``[..., W]`` cut by width where decoding is split;
- ``"rank0"``: used on rank zero alone;
- ``"rebuilt"``: made by ``initialize_cache`` or ``begin_step``, so never saved;
- ``"host"``: plain numbers, equal on all ranks.
"""

_STYLE = "flashdreams.state_style"


def state(style: StateStyle, *, default: Any = MISSING, default_factory: Any = MISSING) -> Any:
    """A field of a state dataclass that declares how ranks hold it::

        @dataclass
        class MyCache:
            text: Tensor = state("whole")
            last: Tensor | None = state("whole", default=None)

    A field that holds another state dataclass needs no style: that class declares its own.

    Args:
        style: one of `StateStyle`.
        default: of the field.
        default_factory: makes the default of the field.

    Raises:
        ValueError: an unknown style.
    """
    if style not in get_args(StateStyle):
        allowed = ", ".join(map(repr, get_args(StateStyle)))
        raise ValueError(f"state style {style!r} is unknown; allowed: {allowed}.")
    options: dict[str, Any] = {"metadata": {_STYLE: style}}
    if default is not MISSING:
        options["default"] = default
    if default_factory is not MISSING:
        options["default_factory"] = default_factory
    return field(**options)


def style_of(declared: "Field[Any]") -> StateStyle | None:
    """The style that a dataclass field declares; None without one."""
    return declared.metadata.get(_STYLE)


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a plain, single-device module may be split.

    Keys are globs over submodule names (``*`` matches one path component). Every glob must match
    at least one submodule when the plan is applied. The module itself never reads its plan.
    """

    tensor: dict[str, TensorStyle] = field(default_factory=dict)
    """Linear or norm -> how its weight is split over the ``tp`` axis. ``"colwise_gathered"`` is
    colwise with an output that every rank gets whole, for a result that meets whole tensors: a
    collective as large as the output, so for layers that run seldom. ``"colwise_kv"`` and
    ``"colwise_qkv"`` are colwise for an output that is two or three parts side by side, of each of
    which a rank takes its share. ``"replicated"``: a linear that is intentionally not split."""

    split: dict[str, int] = field(default_factory=dict)
    """Submodule -> dim of its output that is cut over the sequence ranks."""

    gather: dict[str, int] = field(default_factory=dict)
    """Submodule -> dim of its output that is gathered from the sequence ranks."""

    attention: tuple[str, ...] = ()
    """Attention cores that a context-parallel strategy wraps."""

    cores: dict[str, CoreStyle] = field(default_factory=dict)
    """Attention cores of another kind -> ``"all_tokens"``: all tokens of the chunk must meet on one
    rank, as for attention over time at each position: tokens are traded for heads over all sequence
    ranks where these divide the heads that ``units`` gives, else gathered on every rank.
    ``"split_queries"``: queries are split like the tokens, keys and values are the same on every
    rank."""

    units: dict[str, int] = field(default_factory=dict)
    """For a model that runs on any number of ranks: submodule -> what a degree must divide to cut
    it, its attention heads or the width of its feed-forward. What a degree does not divide is
    computed in full on every rank, the rest is split. The first is the backbone, whose heads
    also apply to state of the style ``"heads"``. Empty: degrees must divide."""

    rollout: dict[str, RolloutStyle] = field(default_factory=dict)
    """Deprecated, read until 0.3: field of the transformer's rollout state -> ``"heads"`` or
    ``"rebuilt"``. Declare the style at the field instead, with `state`."""

    low_precision: tuple[str, ...] = ()
    """Deprecated, ignored until 0.3: linears that could run in FP8."""

    spatial: dict[str, SpatialStyle] = field(default_factory=dict)
    """Decoder submodule -> ``"halo"`` (a convolution that needs its neighbours' columns) or
    ``"gather_width"`` (a module that needs the full width)."""

    def __post_init__(self) -> None:
        for name, kind in (("tensor", TensorStyle), ("spatial", SpatialStyle)):
            for glob, style in getattr(self, name).items():
                if style not in get_args(kind):
                    allowed = ", ".join(map(repr, get_args(kind)))
                    raise ValueError(
                        f"The plan's {name} gives {glob!r} the style {style!r}; allowed: {allowed}."
                    )


def units_of(plan: ParallelPlan, name: str) -> int | None:
    """The size that a degree must divide to split a submodule; None if the plan does not name it.

    Args:
        plan: with ``units``.
        name: of a submodule, or of one inside of it.
    """
    for glob, units in plan.units.items():
        if re.match(glob_pattern(glob).pattern + r"(\.|$)", name):
            return units
    return None


def trunk_is_cut(plan: ParallelPlan, degree: int) -> bool:
    """Whether a tensor-parallel degree splits the heads of the backbone."""
    return bool(plan.tensor) and next(iter(plan.units.values()), degree) % degree == 0


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob over dotted names as a regular expression; ``*`` stays within one component."""
    return re.compile(re.escape(glob).replace(r"\*", r"[^.]*"))
