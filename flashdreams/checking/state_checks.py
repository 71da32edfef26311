"""Checks of where a method keeps the state of a rollout."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from flashdreams.attention.cache import KVCache
from flashdreams.attention.cursor import Cursor
from flashdreams.checking.report import Note, Problem
from flashdreams.checking.subject import Bench
from flashdreams.infra.state import StateError, check_styles
from flashdreams.parallel.plan import style_of

MAX_DEPTH = 4
"""Levels of containers that are compared."""


def check_modules(bench: Bench) -> str:
    """A rollout leaves nothing on the modules.

    Raises:
        Problem: module and attribute that a rollout changed.
    """
    bench.roll(seed=2)  # what is created once, such as a table of sines, is created now
    count = 0
    before = {name: _contents(part) for name, part in bench.pipeline.components().items()}
    bench.roll(seed=3)
    for name, part in bench.pipeline.components().items():
        after = _contents(part)
        count += len(after)
        for place in {**before[name], **after}:
            if before[name].get(place) != after.get(place):
                raise Problem(
                    f"{name}: a rollout changes {place}. The state of a rollout belongs in what "
                    "initialize_cache returns, never on a module: another rollout would read it."
                )
    return f"{count} attributes, buffers and parameters are unchanged by a rollout"


def _contents(component: nn.Module) -> dict[str, Any]:
    """What a component's modules hold, by place, in a form that can be compared."""
    found: dict[str, Any] = {}
    for path, module in component.named_modules():
        kind = type(module).__name__
        for name, value in vars(module).items():
            if name in ("_modules", "config") or name.endswith("_hooks"):
                continue
            if name in ("_parameters", "_buffers"):
                for leaf, x in value.items():
                    place = f"{kind}.{leaf}" + f" (at {path})" * bool(path)
                    found[place] = _form(x, 0)
            else:
                place = f"{kind}.{name}" + f" (at {path})" * bool(path)
                found[place] = _form(value, 0)
    return found


def _form(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth >= MAX_DEPTH:
        return type(value).__name__
    if isinstance(value, Mapping):
        return [(repr(k), _form(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_form(v, depth + 1) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, _form(getattr(value, f.name), depth + 1)) for f in fields(value)]
    return (type(value).__name__, id(value))


def check_state_styles(bench: Bench) -> str:
    """Every field of a rollout's state declares a style, and the style fits the field.

    Raises:
        Problem: a style that does not fit.
        Note: fields or state without a style.
    """
    session = bench.begin()
    bench.step(session)
    cache = session.cache
    parts = {"transformer": cache.diffusion.conditional, "encoder": cache.encoder}
    parts |= {"decoder": cache.decoder, "controller": cache.controller}
    undeclared: list[str] = []
    declared = 0
    for name, state in parts.items():
        try:
            check_styles(state, name)
        except StateError as error:
            raise Problem(str(error)) from error
        declared += _count_declared(state, name, undeclared)
    if undeclared:
        raise Note(
            f"{', '.join(undeclared)}: no style, so rollouts run on any number of ranks, but "
            "cannot be saved, forked or resumed. Declare each with "
            'flashdreams.parallel.plan.state("whole" | "heads" | "cache" | "columns" | "host" | '
            '"rebuilt").'
        )
    return f"{declared} fields declare their style" if declared else "the state has no fields"


def _count_declared(state: Any, path: str, undeclared: list[str]) -> int:
    if state is None or isinstance(state, Cursor | KVCache):
        return 0
    if not is_dataclass(state) or isinstance(state, type):
        if path.endswith("decoder") and isinstance(state, Mapping | list | tuple):
            return 0  # plain state of a decoder that is not cut is the same on all ranks
        undeclared.append(f"{path} ({type(state).__name__})")
        return 0
    count = 0
    for item in fields(state):
        value = getattr(state, item.name)
        if style_of(item) is not None:
            count += 1
        elif is_dataclass(value):
            inner = f"{path}.{type(state).__name__}.{item.name}"
            count += _count_declared(value, inner, undeclared)
        elif value is not None:
            undeclared.append(f"{type(state).__name__}.{item.name}")
    return count
