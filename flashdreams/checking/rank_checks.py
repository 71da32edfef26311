"""Checks of a method on two ranks: equality, and omissions of its plan."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from flashdreams.attention.core import AttentionCore
from flashdreams.checking.report import Note, Problem, Skipped
from flashdreams.checking.subject import Bench, Chunk, Subject, relative_error
from flashdreams.infra.state import RolloutState, StateError
from flashdreams.parallel.local_ranks import RankError, run_ranks
from flashdreams.parallel.mesh import ParallelConfig, resolve_degrees
from flashdreams.parallel.plan import ParallelPlan, glob_pattern, units_of

TOLERANCE = 1e-5
"""Largest difference of float32 latents on two ranks, as a share of the largest latent."""

STATE_TOLERANCE = 1e-2
"""The same for saved state, which a decoder amplifies; a wrong style exceeds it by far."""

RANKS = 2
LIMIT_S = 120.0
MAX_TRIALS = 12
"""Maximum number of additions to a plan that are tried."""

WAYS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2, "ring_degree": 1, "tensor_parallel_degree": 1},
    "ring": {"ulysses_degree": 1, "ring_degree": 2, "tensor_parallel_degree": 1},
    "tensor": {"ulysses_degree": 1, "ring_degree": 1, "tensor_parallel_degree": 2},
    "guidance": {"cfg_parallel_degree": 2},
}
"""A way to split a rollout over two ranks."""


@dataclass(frozen=True)
class Ranks:
    """The results on rank zero of two."""

    chunks: list[Chunk]
    installed: dict[str, int]
    """What was installed in the transformer."""
    state: RolloutState | None
    """The saved rollout; None for state that cannot be saved."""


def roll_on_ranks(subject: Subject, degrees: dict[str, Any], steps: int) -> Ranks:
    """A rollout on all ranks; runs in separate processes."""
    bench = subject.open(**degrees)
    session = bench.begin()
    chunks = [bench.step(session) for _ in range(steps)]
    try:
        state = session.cache.state_dict()
    except StateError:
        state = None
    report = getattr(bench.transformer, "_parallel_report", None)
    return Ranks(chunks, dict(report.installed) if report is not None else {}, state)


def check_ranks(subject: Subject, bench: Bench) -> str:
    """Two ranks give the latents of one, for every split that the plan and the heads allow.

    Raises:
        Problem: what differs, and what the plan omits.
        Note: a core attends with all heads on every rank, because the plan does not say how many.
        Skipped: nothing can be split.
    """
    plan = bench.transformer.parallel_plan()
    steps = bench.steps
    session = bench.begin()
    base = [bench.step(session) for _ in range(steps)]
    try:
        state = session.cache.state_dict()
    except StateError:
        state = None
    done = []
    for way, degrees in WAYS.items():
        if not _is_possible(subject, bench, degrees, plan, way):
            continue
        found = _run(subject, bench, way, degrees, steps, base)
        if state is not None and found.state is not None:
            _compare_states(found.state, state, way)
        done.append(f"{way}: {_what(found.installed)}")
    if not done:
        heads = getattr(subject.transformer, "num_heads", None)
        raise Skipped(
            "the transformer has no parallel plan, so every rank computes all of it. Write "
            "parallel_plan() to split the work."
            if plan is None
            else f"{RANKS} ranks cannot split {heads} heads"
        )
    text = f"{steps} AR steps within {TOLERANCE:g} of one rank: {'; '.join(done)}"
    united = [] if plan is None else [g for g, s in plan.cores.items() if s == "all_tokens"]
    for glob in united:
        if units_of(plan, glob) is None:
            raise Note(
                f"{text}. Every rank attends with all heads of {glob!r}: give their number in the "
                "plan's units, after that of the backbone, and ranks that divide it share them."
            )
    return text


def _what(installed: dict[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in installed.items()) or "nothing to split"


def _is_possible(
    subject: Subject, bench: Bench, degrees: dict[str, Any], plan: ParallelPlan | None, way: str
) -> bool:
    guided = subject.config.pipeline.diffusion_model.guidance_scale is not None
    if way == "guidance":
        return guided
    if plan is None:
        return False
    config = ParallelConfig(**degrees, cfg_parallel_degree=1)
    try:
        resolve_degrees(config, RANKS, getattr(subject.transformer, "num_heads", None), guided)
    except ValueError:
        return False
    wanted = {"tensor": plan.tensor}.get(way, plan.split or plan.attention or plan.gather)
    return bool(wanted)


def _run(
    subject: Subject,
    bench: Bench,
    way: str,
    degrees: dict[str, Any],
    steps: int,
    base: list[Chunk],
) -> Ranks:
    """The rollout on two ranks.

    Raises:
        Problem: it fails or differs.
    """
    degrees = degrees if way == "guidance" else {**degrees, "cfg_parallel_degree": 1}
    found, trouble = _attempt(subject, degrees, steps, base)
    if trouble is None and found is not None:
        return found
    hint = _diagnose(subject, bench, way, degrees, base)
    raise Problem(f"on {RANKS} ranks ({way}) {trouble}. {hint}")


def _attempt(
    subject: Subject, degrees: dict[str, Any], steps: int, base: list[Chunk]
) -> tuple[Ranks | None, str | None]:
    """The result of two ranks, and what is wrong with it."""
    try:
        found = run_ranks(roll_on_ranks, RANKS, subject, degrees, steps, timeout_s=LIMIT_S)[0]
    except RankError as error:
        return None, f"the rollout fails with {_last_line(str(error))}"
    except TimeoutError:
        return None, f"the rollout did not end within {LIMIT_S:g} s: the ranks wait for each other"
    off = relative_error(found.chunks, base[:steps])
    if not off <= TOLERANCE:
        return found, f"the latents differ from those of one rank by {off:.1e} of the largest"
    return found, None


def _last_line(trace: str) -> str:
    """The error at the end of a traceback, with the last place outside of torch."""
    lines = [line for line in trace.strip().splitlines() if line.strip()]
    errors = [line.strip() for line in lines if re.match(r"\w[\w.]*(Error|Exception)", line)]
    text = (errors or lines)[-1]
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', trace)
    own = [p for p in places if "/torch/" not in p[0] and "local_ranks" not in p[0]]
    where = f" ({own[-1][0].rpartition('/')[2]}:{own[-1][1]} in {own[-1][2]})" if own else ""
    return f"{text.rstrip('.')}{where}"


def _diagnose(
    subject: Subject, bench: Bench, way: str, degrees: dict[str, Any], base: list[Chunk]
) -> str:
    """What the plan omits: additions are tried until one makes the ranks agree."""
    plan = bench.transformer.parallel_plan()
    if plan is None or way == "guidance":
        return "Look for state that is kept per branch of guidance on a module."
    tokens = _token_count(bench)
    outputs = _outputs(bench)
    steps = min(3, len(base))
    trials = list(_additions(bench.transformer, plan, way, outputs, tokens))[:MAX_TRIALS]
    for changes, text in trials:
        trial = replace(subject, plan_changes=changes)
        if _attempt(trial, degrees, steps, base)[1] is None:
            return f"The plan leaves out {text} With that line the ranks agree."
    names = ", ".join(f"{name} {shape}" for name, shape in outputs.items() if tokens in shape)
    if way == "tensor":
        return (
            'Every linear that reads a colwise output must be "rowwise", norms over all heads '
            '"norm", and head counts must be taken from tensor shapes, not from the config.'
        )
    return (
        f"No single addition to the plan fixes it. Modules whose output has all {tokens} tokens: "
        f"{names or 'none'}. Each of these that is combined with split tokens must be split: "
        "name its module in the plan's split, or wrap the operation in a separate module."
    )


def _token_count(bench: Bench) -> int:
    config = bench.subject.transformer
    return int(config.len_t * getattr(config, "tokens_per_frame", 0))


def _outputs(bench: Bench) -> dict[str, tuple[int, ...]]:
    """Shape of every submodule's output in an AR step on one rank, in the order of the calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in bench.transformer.named_modules():
        if name:
            handles.append(module.register_forward_hook(_note_shape(shapes, name)))
    try:
        bench.step(bench.begin())
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _note_shape(shapes: dict[str, tuple[int, ...]], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(name, tuple(output.shape))

    return hook


def _additions(
    transformer: nn.Module,
    plan: ParallelPlan,
    way: str,
    outputs: dict[str, tuple[int, ...]],
    tokens: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Fields of a plan to add, each with its description; the likely ones first."""
    if way == "tensor":
        yield from _tensor_additions(transformer, plan)
        return
    cores = {_glob(n) for n, m in transformer.named_modules() if isinstance(m, AttentionCore)}
    for glob in sorted(cores - _matched((*plan.attention, *plan.cores), cores)):
        yield {"attention": (glob,)}, f'the attention core {glob!r}: add attention=("{glob}",).'
    whole = {name: shape.index(tokens) for name, shape in outputs.items() if tokens in shape}
    globs: dict[str, int] = {}
    for name, dim in whole.items():
        globs.setdefault(_glob(name), dim)
    outside = {glob: dim for glob, dim in globs.items() if "*" not in glob}
    for glob, dim in outside.items():
        if not _matched(plan.split, {glob}):
            shape = list(outputs[glob])
            yield (
                {"split": {glob: dim}},
                f"{glob!r}: its output {shape} has all {tokens} tokens where the others are split. "
                f'Add split={{"{glob}": {dim}}}.',
            )


def _tensor_additions(
    transformer: nn.Module, plan: ParallelPlan
) -> Iterator[tuple[dict[str, Any], str]]:
    for name, module in transformer.named_modules():
        glob = _glob(name)
        if name != _first_of(transformer, glob) or _matched(plan.tensor, {glob}):
            continue
        if isinstance(module, nn.RMSNorm) or "Norm" in type(module).__name__:
            yield {"tensor": {glob: "norm"}}, f'the norm {glob!r}: add tensor={{"{glob}": "norm"}}.'


def _first_of(transformer: nn.Module, glob: str) -> str:
    pattern = glob_pattern(glob)
    return next(name for name, _ in transformer.named_modules() if pattern.fullmatch(name))


def _glob(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _matched(globs: Any, names: set[str]) -> set[str]:
    """The names that match a plan's globs; both may have stars."""
    patterns = [glob_pattern(glob) for glob in globs]
    return {name for name in names if any(p.fullmatch(name) for p in patterns)}


def _compare_states(found: RolloutState, expected: RolloutState, way: str) -> None:
    """Two ranks save the same rollout as one rank.

    Raises:
        Problem: names the field.
    """
    for path, whole in expected["tensors"].items():
        other = found["tensors"].get(path)
        name = path.partition("/")[2] or path
        if other is None or other.shape != whole.shape:
            got = "nothing" if other is None else str(list(other.shape))
            raise Problem(
                f"on {RANKS} ranks ({way}) the saved rollout has {got} for {name}, one rank "
                f"{list(whole.shape)}. Its field's style does not say how ranks hold it: "
                '"heads" for [B, S, N, D] cut by tensor parallelism, "whole" only for what is '
                "equal on all ranks."
            )
        if not whole.is_floating_point():
            continue
        difference = (other.double() - whole.double()).abs().max() if whole.numel() else 0.0
        largest = whole.abs().max() if whole.numel() else 0.0
        if not float(difference) <= STATE_TOLERANCE * max(float(largest), 1e-6):
            raise Problem(
                f"on {RANKS} ranks ({way}) the saved rollout differs in {name} by "
                f"{float(difference):.1e}. If ranks hold different values of it, declare the "
                'field "heads", "columns" or "cache"; if it is made by begin_step, "rebuilt".'
            )


def warm_forkserver() -> None:
    """Let the forkserver, where there is one, import what ranks need while other checks run."""
    if sys.platform == "win32":
        return
    import multiprocessing
    from multiprocessing.forkserver import ensure_running

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        [
            "flashdreams.checking.rank_checks",
            "torch.distributed.device_mesh",
            "torch._dynamo",  # what builds on meta asks it, and importing it takes a second
        ]
    )
    ensure_running()
