"""Checks of a network call: whether a GPU can run it and replay it as a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flashdreams.checking.report import Note, Problem
from flashdreams.checking.subject import Bench
from flashdreams.checking.trace import Recorder, mark_host
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.causal_state import StepInputs, same_shapes
from flashdreams.runtime.noise import NoiseSource


@dataclass(frozen=True)
class TracedCall:
    """One call of the network within an AR step."""

    name: str
    trace: Recorder
    given: list[tuple[Tensor, Tensor]]
    """Tensors that it was called with, and copies from before the call."""

    @property
    def changes_input(self) -> bool:
        """Whether the call changed one of its input tensors."""
        return any(not torch.equal(x, before) for x, before in self.given)


def check_devices(bench: Bench) -> str:
    """Host and device tensors are not mixed; found on a CPU by tracing.

    Raises:
        Problem: where they are.
    """
    session = bench.begin()
    names = ("forward",) if isinstance(bench.transformer, CausalTransformer) else _PLAIN
    traced: list[TracedCall] = []
    with _traced(bench.transformer, names, traced):
        bench.step(session)
    decoder = bench.pipeline.decoder
    if decoder is not None:
        with _traced(decoder, ("forward",), traced):
            bench.step(bench.begin())
    for call in traced:
        if call.trace.mixes:
            raise Problem(
                f"in {call.name}, a tensor made without device= is mixed with one on the device: "
                f"{_listed(call.trace.mixes)}. On a GPU that is an error. Pass "
                "device=x.device where tensors are created, or use .to(x.device)."
            )
    return f"{sum(len(c.trace.calls) for c in traced)} torch calls traced as if on a GPU"


_PLAIN = ("predict_flow", "update_cache")


def check_graphs(bench: Bench) -> str:
    """Two network calls in the steady state make the same torch calls on the same addresses.

    Raises:
        Problem: what a replayed CUDA graph would compute wrongly.
        Note: a transformer that is never captured, or that waits for the device.
    """
    transformer = bench.transformer
    if not isinstance(transformer, CausalTransformer):
        return _check_plain(bench)
    session = bench.begin()
    for _ in range(transformer.warm_up_steps if bench.subject.streaming else 0):
        bench.step(session)
    steps: list[list[TracedCall]] = []
    for _ in range(2 if bench.subject.streaming else 1):
        traced: list[TracedCall] = []
        with _traced(transformer, ("forward",), traced):
            bench.step(session)
        steps.append(traced)
    _check_inputs(steps[0])
    for call in steps[0]:
        if call.trace.syncs:
            raise Problem(
                f"the network call waits for the device: {_listed(call.trace.syncs)}. It cannot "
                "be captured as a CUDA graph, and stalls without one. Compute the value in "
                "begin_step or embed_control, on the host."
            )
    if len(steps) == 2:
        for before, after in zip(*steps, strict=True):
            _compare(before.trace, after.trace)
    _check_warm_up(bench, session.cache.diffusion.branches[0].inputs)
    calls = len(steps[0][0].trace.calls)
    return f"{len(steps[0])} network calls of an AR step, {calls} torch calls each"


def _check_warm_up(bench: Bench, inputs: StepInputs) -> None:
    """Warm-up, which a CPU skips, runs on zeros that have the shapes of an AR step's ``inputs``."""
    model, transformer = bench.pipeline.diffusion_model, bench.transformer
    context = transformer.example_context(1)
    if context is None:
        raise Note(
            "without example_context(batch_size) nothing is warmed up or captured on a GPU. Return "
            "zeros of the shapes that initialize_cache takes."
        )
    negative = None if model.config.guidance_scale is None else context
    try:
        cache = model.initialize_cache(context, negative, NoiseSource(0), 1)
        model.step_through(cache)
    except Exception as error:
        raise Problem(
            f"the warm-up on a GPU fails with {type(error).__name__}: {error}. It calls "
            "begin_step, predict_flow and update_cache with zeros of latent_shape(1), a 0-dim "
            "timestep, example_context(1) and example_control(1)."
        ) from error
    zeros = cache.branches[0].inputs
    for name in ("rotations", "condition", "control"):
        warm, real = (getattr(x, name) for x in (zeros, inputs))
        if not same_shapes(warm, real):
            raise Note(
                f"{name} of the warm-up has the shapes {_shapes(warm)}, that of an AR step "
                f"{_shapes(real)}, so no CUDA graph is replayed. Correct example_control(1) and "
                "example_context(1)."
            )


def _shapes(nest: Any) -> list[list[int]]:
    return [list(x.shape) for x in tree_leaves(nest) if isinstance(x, Tensor)]


def _check_inputs(calls: list[TracedCall]) -> None:
    for call in calls:
        if call.changes_input:
            raise Problem(
                f"{call.name} writes into an input tensor. Eagerly that is the rollout's own "
                "latent; a CUDA graph gets a copy, so the results would differ. Write "
                "x = x * 2 instead of x.mul_(2), x *= 2 or x[...] = 2."
            )


def _compare(before: Recorder, after: Recorder) -> None:
    for old, new, place in zip(before.calls, after.calls, after.places, strict=False):
        if old != new:
            raise Problem(
                f"from one AR step to the next the network call changes at {place}: "
                f"{_changed(old, new)}. A replayed CUDA graph would use the old "
                "value. Put what changes into step inputs (embed_control, rotations), as tensors."
            )
    if len(before.calls) != len(after.calls):
        raise Problem(
            f"one AR step makes {len(before.calls)} torch calls per network call, the next "
            f"{len(after.calls)}. A replayed CUDA graph would repeat the first one: decide in "
            "begin_step, not in forward."
        )
    for old_address, new_address, place in zip(
        before.read, after.read, after.read_places, strict=False
    ):
        if old_address != new_address:
            raise Problem(
                f"from one AR step to the next, a tensor read at {place} is at another address in "
                "memory. A replayed CUDA graph would read the old one. Keep it in storage that is "
                "written in place (x.copy_(new)), or return it from embed_control."
            )


def _changed(old: tuple[str, Any], new: tuple[str, Any]) -> str:
    if old[0] != new[0]:
        return f"{old[0]} becomes {new[0]}"
    pairs = [(a, b) for a, b in zip(old[1], new[1], strict=False) if a != b]
    return f"{new[0]} with {pairs[0][0]!r} becomes {pairs[0][1]!r}" if pairs else new[0]


def _check_plain(bench: Bench) -> str:
    traced: list[TracedCall] = []
    session = bench.begin()
    with _traced(bench.transformer, _PLAIN, traced):
        bench.step(session)
    _check_inputs(traced)
    found = [sync for call in traced for sync in call.trace.syncs]
    if found:
        raise Note(
            f"the network waits for the device: {_listed(found)}. Each wait leaves the GPU idle; "
            "compute the value in begin_step, on the host."
        )
    return "no waits for the device; the transformer is no CausalTransformer, so never captured"


@contextmanager
def _traced(module: Any, names: tuple[str, ...], into: list[TracedCall]) -> Iterator[None]:
    """Record the calls of some methods of a module."""
    kept = {name: vars(module).get(name) for name in names}

    def recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            trace = Recorder()
            given = [(x, x.clone()) for x in args if isinstance(x, Tensor)]
            into.append(TracedCall(f"{type(module).__name__}.{name}", trace, given))
            args = tuple(_as_given(x, trace) for x in args)
            with trace:
                return original(*args, **kwargs)

        return call

    for name in names:
        setattr(module, name, recorded(name, getattr(module, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
            if kept[name] is not None:
                setattr(module, name, kept[name])


def _as_given(x: Any, trace: Recorder) -> Any:
    """Arguments are copied into a graph for every call; a timestep is a host number."""
    if not isinstance(x, Tensor):
        return x
    if x.ndim == 0:
        return mark_host(x)
    x = x.view(x.shape) if torch.is_inference_mode_enabled() else x
    trace.ignored.add(x.data_ptr())
    return x


def _listed(places: list[str]) -> str:
    unique = list(dict.fromkeys(places))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return ", ".join(unique[:3]) + more
