"""Applies a plan to a plain module."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashdreams.attention.core import AttentionCore
from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.context import (
    AttentionWrapper,
    GatheredAttention,
    GatherKVAttention,
    HeadShardAttention,
    PaddedAttention,
    UlyssesAttention,
)
from flashdreams.parallel.mesh import Axis, Mesh
from flashdreams.parallel.plan import ParallelPlan, glob_pattern, units_of
from flashdreams.parallel.ring import RingAttention
from flashdreams.parallel.sequence import SequenceLayout
from flashdreams.parallel.spatial import WidthLayout, split_by_width
from flashdreams.parallel.strict import make_strict
from flashdreams.parallel.tensor import (
    ColwiseLinear,
    GatheredColwiseLinear,
    RowwiseLinear,
    ShardedLayer,
    ShardedRMSNorm,
)
from flashdreams.parallel.xfuser import XfuserAttention, build_long_context
from flashdreams.runtime.checkpoint import TensorSlice

_MARK = "_parallel_report"

_LINEARS: dict[str, Callable[[nn.Linear, Channel, str], ShardedLayer]] = {
    "colwise": ColwiseLinear,
    "colwise_kv": partial(ColwiseLinear, parts=2),
    "colwise_qkv": partial(ColwiseLinear, parts=3),
    "colwise_gathered": GatheredColwiseLinear,
    "rowwise": RowwiseLinear,
}


@dataclass(frozen=True, kw_only=True)
class ParallelReport:
    """Report of `parallelize`."""

    installed: dict[str, int] = field(default_factory=dict)
    """What was installed -> how many times; empty: the module is untouched."""

    slices: dict[str, TensorSlice] = field(default_factory=dict)
    """Parameter name -> the part of it that this rank holds, for sharded loading."""

    replicated: bool = False
    """Several ranks run the whole module each, because it has no plan that fits the mesh."""

    width_layout: WidthLayout | None = None
    """How a decoder's columns are shared; it gathers and shards the decoder's rollout state."""

    def __str__(self) -> str:
        if self.replicated:
            return "replicated: every rank runs all of it, because it has no parallel plan"
        done = ", ".join(f"{count} x {what}" for what, count in self.installed.items())
        return done or "untouched"


def parallelize(module: nn.Module, plan: ParallelPlan | None, mesh: Mesh) -> ParallelReport:
    """Split a module over the ranks, from outside and in place.

    State-dict names never change; sliced parameters are the only difference. Modules may be on the
    meta device: load them afterwards with the report's ``slices``. Degrees of 1 install nothing,
    except that ``strict`` changes the module on one rank too.

    Args:
        module: plain, single-device.
        plan: how it may be split; None: every rank runs all of it.
        mesh: the ranks, the strategy and whether to be strict.

    Raises:
        ValueError: the plan does not fit the module, or the module was parallelized before.
    """
    if hasattr(module, _MARK):
        raise ValueError(f"This {type(module).__name__} is already parallelized; build a new one.")
    plan = plan or ParallelPlan()
    matches = _Matches(module, plan)
    installed: dict[str, int] = {}
    slices: dict[str, TensorSlice] = {}
    unit = 1
    if mesh.config.strict:
        what, unit = make_strict(module, mesh.device_type)
        installed[what] = 1
    matches.leave_whole(plan, mesh.tp.size)
    cut_weights = mesh.tp.is_shared and bool(plan.tensor)
    if cut_weights:
        slices = _split_weights(module, matches, mesh.channel(mesh.tp))
        installed["sliced layer"] = len(matches.styles)
    cut_sequence = mesh.sequence.is_shared and bool(plan.split)
    layout = None
    # Strict tiles also pad on one rank: the ends of long vectors are rounded differently.
    if cut_sequence or (unit > 1 and plan.split):
        layout = _split_sequence(module, matches, mesh, unit)
        installed["split"], installed["gather"] = len(matches.split), len(matches.gather)
    for strategy in _wrap_cores(module, plan, matches, layout, mesh):
        installed[strategy] = installed.get(strategy, 0) + 1
    width_layout = None
    wants_split = mesh.config.decode in ("auto", "split") and not mesh.config.strict
    if mesh.decode.is_shared and plan.spatial and wants_split:
        width_layout = split_by_width(module, matches.spatial, mesh.channel(mesh.decode))
        installed["halo convolution"] = sum(s == "halo" for s in matches.spatial.values())
    idle = (mesh.sequence.size > 1 and not cut_sequence) or (mesh.tp.size > 1 and not cut_weights)
    report = ParallelReport(
        installed=installed,
        slices=slices,
        replicated=idle and width_layout is None,
        width_layout=width_layout,
    )
    object.__setattr__(module, _MARK, report)
    return report


class _Matches:
    """The submodules that a plan names, checked against the module."""

    def __init__(self, module: nn.Module, plan: ParallelPlan) -> None:
        self.names = [name for name, _ in module.named_modules() if name]
        named = self._find("tensor", plan.tensor)
        self.styles = {name: style for name, style in named.items() if style != "replicated"}
        self.split = self._find("split", plan.split)
        self.gather = self._find("gather", plan.gather)
        self.attention = list(self._find("attention", dict.fromkeys(plan.attention)))
        self.cores = self._find("cores", plan.cores)
        self._find("units", plan.units)
        self.spatial = self._find("spatial", plan.spatial)
        self._refuse_unnamed_linears(module, plan, named)
        parts = (plan.split, plan.gather, plan.attention or plan.cores)
        if any(parts) and not all(parts):
            raise ValueError(
                "A plan that splits the sequence needs split, gather, and attention or cores; got "
                f"split={plan.split}, gather={plan.gather}, attention={plan.attention}, "
                f"cores={plan.cores}."
            )

    def leave_whole(self, plan: ParallelPlan, degree: int) -> None:
        """Remove the entries that the tensor-parallel degree does not divide."""
        for name in list(self.styles):
            if (units_of(plan, name) or degree) % degree:
                del self.styles[name]

    def _find(self, field_name: str, globs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for glob, value in globs.items():
            pattern = glob_pattern(glob)
            names = [name for name in self.names if pattern.fullmatch(name)]
            if not names:
                raise ValueError(self._near_misses(field_name, glob))
            found.update(dict.fromkeys(names, value))
        return found

    def _near_misses(self, field_name: str, glob: str) -> str:
        shapes = sorted({re.sub(r"\b\d+\b", "*", name) for name in self.names})
        near = difflib.get_close_matches(glob, shapes, n=3, cutoff=0.4)
        hint = f" Near misses: {', '.join(near)}." if near else f" There are: {', '.join(shapes)}."
        return f"The plan's {field_name} names {glob!r}, which matches no submodule.{hint}"

    def _refuse_unnamed_linears(
        self, module: nn.Module, plan: ParallelPlan, named: dict[str, Any]
    ) -> None:
        """Every linear of a block must be named: an omitted one would get a part of its input."""
        blocks = {glob[: glob.rfind("*") + 1] for glob in plan.tensor if "*" in glob}
        inside = [re.compile(glob_pattern(block).pattern + r"\..+") for block in blocks]
        unnamed = [
            name
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
            and name not in named
            and any(block.fullmatch(name) for block in inside)
        ]
        if unnamed:
            shapes = sorted({re.sub(r"\b\d+\b", "*", name, count=1) for name in unnamed})
            raise ValueError(
                f"The plan's tensor omits linear layers of a block: {', '.join(shapes)}. "
                'Name each as "colwise", "colwise_gathered", "rowwise" or "replicated".'
            )


def _split_weights(
    module: nn.Module, matches: _Matches, channel: Channel
) -> dict[str, TensorSlice]:
    """Replace the named layers by sliced ones; returns the slices by parameter name."""
    slices: dict[str, TensorSlice] = {}
    for name, style in matches.styles.items():
        layer = module.get_submodule(name)
        sharded: ShardedLayer
        if style == "norm":
            sharded = ShardedRMSNorm(layer, channel, name)
        elif type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}; only nn.Linear can be {style}.")
        else:
            sharded = _LINEARS[style](layer, channel, name)
        _replace(module, name, sharded)
        slices |= {f"{name}.{leaf}": part for leaf, part in sharded.slices.items()}
    return slices


def _split_sequence(module: nn.Module, matches: _Matches, mesh: Mesh, unit: int) -> SequenceLayout:
    """Hook the modules whose outputs are split and gathered."""
    layout = SequenceLayout(
        mesh.ring,
        mesh.ulysses,
        mesh.channel(mesh.sequence) if mesh.sequence.is_shared else None,
        interleaved=mesh.config.ring_method == "rotate" and mesh.ring.is_shared,
        unit=unit,
    )

    def hook(change: Callable[[Tensor, int], Tensor], dim: int) -> Callable[..., Tensor]:
        return lambda module, args, output: change(output, dim)

    for name, dim in matches.split.items():
        module.get_submodule(name).register_forward_hook(hook(layout.split, dim))
    for name, dim in matches.gather.items():
        module.get_submodule(name).register_forward_hook(hook(layout.gather, dim))
    return layout


def _wrap_cores(
    module: nn.Module,
    plan: ParallelPlan,
    matches: _Matches,
    layout: SequenceLayout | None,
    mesh: Mesh,
) -> list[str]:
    """Wrap the attention cores in the strategies of the mesh; returns their names."""
    use_xfuser = mesh.sequence.size > 1 and mesh.config.context_backend == "xfuser"
    long_context = build_long_context(mesh) if use_xfuser else None
    names = []
    for name in (*matches.attention, *matches.cores):
        core, heads, style = _find_core(module, name), units_of(plan, name), matches.cores.get(name)
        wrapped: AttentionCore | AttentionWrapper = core
        if style is None and long_context is not None and layout is not None:
            wrapped = XfuserAttention(core, long_context, layout)
        elif style is None:
            wrapped = _split_over_sequence(core, layout, heads, mesh)
        elif style == "all_tokens" and layout is not None:
            wrapped = _unite_tokens(core, layout, heads, mesh)
        tp = mesh.tp.size
        if mesh.tp.is_shared and plan.tensor and (heads or tp) % tp == 0:
            wrapped = HeadShardAttention(wrapped, mesh.channel(mesh.tp))
        if isinstance(wrapped, AttentionWrapper):
            _replace(module, name, wrapped)
            names.append(str(wrapped))
    return names


def _split_over_sequence(
    core: AttentionCore, layout: SequenceLayout | None, heads: int | None, mesh: Mesh
) -> AttentionCore | AttentionWrapper:
    """Wrap a core of the sequence in strategies, the innermost axis of heads outermost.

    Args:
        core: to be wrapped.
        layout: how tokens are split; None if they are not.
        heads: of the core where the plan lets it stay whole; None: the degrees divide it.
        mesh: the ranks.
    """
    wrapped: AttentionCore | AttentionWrapper = core
    if layout is not None and mesh.ulysses.is_shared and not _divides(heads, mesh.ulysses, mesh):
        return GatheredAttention(core, layout)
    if layout is not None and layout.channel is None:
        wrapped = PaddedAttention(wrapped, layout)
    if layout is not None and mesh.ring.is_shared:
        strategy = RingAttention if layout.interleaved else GatherKVAttention
        wrapped = strategy(wrapped, mesh.channel(mesh.ring), layout)
    if layout is not None and mesh.ulysses.is_shared:
        wrapped = UlyssesAttention(wrapped, mesh.channel(mesh.ulysses), layout)
    return wrapped


def _unite_tokens(
    core: AttentionCore, layout: SequenceLayout, heads: int | None, mesh: Mesh
) -> AttentionWrapper:
    """Give a core all tokens: of fewer heads, if the sequence ranks divide them."""
    if layout.channel is None:
        return PaddedAttention(core, layout)
    if layout.interleaved or heads is None or not _divides(heads, mesh.sequence, mesh):
        return GatheredAttention(core, layout)
    return UlyssesAttention(core, mesh.channel(mesh.sequence), layout)


def _divides(heads: int | None, axis: Axis, mesh: Mesh) -> bool:
    """Whether the ranks of an axis divide the heads that tensor parallelism leaves to each."""
    if heads is None:
        return True
    own = heads // mesh.tp.size if heads % mesh.tp.size == 0 else heads
    return own % axis.size == 0


def _find_core(module: nn.Module, name: str) -> AttentionCore:
    core = module.get_submodule(name)
    if not isinstance(core, AttentionCore):
        raise ValueError(f"The plan's attention names {name}, a {type(core).__name__}, not a core.")
    return core


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
