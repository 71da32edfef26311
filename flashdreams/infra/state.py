"""Conversion of rollout state to plain values and tensors and back, by field style.

The form does not depend on the number of ranks: ``{"format": 2, "values": ..., "tensors": {path:
tensor}}``. ``values`` may be written as JSON, ``tensors`` (contiguous, on the CPU) as safetensors.
A value that represents a tensor has its shape, dtype and memory format; the tensor's name is the
path of fields that leads to it. No class name is stored: a load fills fresh state by field path.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache
from flashdreams.attention.cursor import Cursor
from flashdreams.infra.config import did_you_mean
from flashdreams.parallel.plan import ParallelPlan, StateStyle, style_of
from flashdreams.parallel.state_layout import StateLayout
from flashdreams.runtime.region import Region, TensorPart, region_shape, whole_region

FORMAT = 2
"""Number of the form; a state of another one is refused."""

_MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

RolloutState = dict[str, Any]
"""What ``cache.state_dict()`` returns on rank zero."""

Emit = Callable[[str, TensorPart], None]
"""Takes this rank's part of a tensor under its path."""

Take = Callable[[str, tuple[int, ...], Region, torch.dtype], Tensor]
"""The entries of a region of the tensor of a path, by the shape and type of its whole."""

PlanStyles = Mapping[str, StateStyle]
"""Styles that a plan's deprecated ``rollout`` gives to fields without one."""


class StateError(TypeError):
    """State that cannot be saved, moved or copied, because a field declares no style."""


def plan_styles(plan: ParallelPlan | None) -> PlanStyles | None:
    """The deprecated ``rollout`` of a plan; None for a plan without."""
    return dict(plan.rollout) if plan is not None and plan.rollout else None


def check_plan_styles(state: Any, styles: PlanStyles) -> None:
    """Check that a plan's ``rollout`` names fields of the state.

    Raises:
        ValueError: it names something else; the message has the nearest field.
    """
    known = [f.name for f in fields(state)] if is_dataclass(state) else []
    for name in styles:
        if name not in known:
            raise ValueError(
                f"The plan's rollout names {name!r}, which is not a field of "
                f"{type(state).__name__}.{did_you_mean(name, known)} Fields: {', '.join(known)}."
            )


def check_styles(state: Any, path: str) -> None:
    """Check that the declared styles of state dataclasses fit their fields.

    Fields without a style pass: such state can run, but cannot be saved.

    Args:
        state: as ``initialize_cache`` returned it.
        path: for the message.

    Raises:
        StateError: names class and field, and what would fit.
    """
    if not is_dataclass(state) or isinstance(state, type):
        return
    for declared in fields(state):
        value, style = getattr(state, declared.name), style_of(declared)
        where = f"{path}: {type(state).__name__}.{declared.name}"
        if style is None:
            check_styles(value, f"{path}.{declared.name}")
        elif style != "rebuilt":
            _check_leaves(value, style, where)


def _check_leaves(value: Any, style: StateStyle, where: str) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_leaves(item, style, where)
    elif isinstance(value, KVCache) != (style == "cache") and value is not None:
        got = "a KV cache" if isinstance(value, KVCache) else f"a {type(value).__name__}"
        raise StateError(
            f"{where} declares the style {style!r} and holds {got}. "
            'KV caches, and only they, have the style "cache".'
        )
    elif isinstance(value, Tensor) and style == "host":
        raise StateError(
            f'{where} declares the style "host" and holds a tensor. Use "whole" for a tensor that '
            'is equal on all ranks, "heads" for [B, S, N, D] cut by tensor parallelism.'
        )
    elif isinstance(value, Tensor) and style == "heads" and value.ndim != 4:
        raise StateError(
            f'{where} declares the style "heads" and holds a tensor {list(value.shape)}; '
            "heads are dim 2 of [B, S, N, D]."
        )


@dataclass(frozen=True)
class StateEncoder:
    """Converts state to values and emits this rank's parts of its tensors; gathers nothing."""

    layout: StateLayout
    """How ranks hold the state; tensors on another device than its own are host tensors."""
    emit: Emit
    """Takes the parts."""
    styles: PlanStyles | None = None
    """Of a deprecated plan: fields without a style are then ``"whole"``."""
    in_process: bool = False
    """The values stay in this process: they include KV caches."""
    in_branch: bool = False
    """The state is of a branch of guidance, which other ranks may not have."""
    without_caches: bool = False
    """KV caches are omitted and recomputed on load."""

    def encode(self, value: Any, path: str, style: StateStyle | None) -> Any:
        """The values of ``value``.

        Args:
            value: what is to be written.
            path: prefix of the tensors' names.
            style: of the field that holds it; None for one that declares none.

        Raises:
            StateError: a field without a style, or an object without a plain form.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Cursor):
            return {"kind": "cursor", "start": value.start, **value.off_ring()}
        if isinstance(value, torch.device):
            return {"kind": "device"}
        if is_dataclass(value) and not isinstance(value, type):
            return {"kind": "fields", "parts": self._encode_fields(value, path)}
        if isinstance(value, KVCache) and style is not None:
            return self._encode_cache(value, path)
        if isinstance(value, Tensor) and style is not None:
            return self._encode_tensor(value, path, style)
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            parts = {k: self.encode(x, _join(path, k), style) for k, x in value.items()}
            return {"kind": "mapping", "parts": parts}
        if type(value) in (list, tuple):
            items = [self.encode(x, _join(path, str(i)), style) for i, x in enumerate(value)]
            return {"kind": type(value).__name__, "items": items}
        if hasattr(value, "load_state_dict") and hasattr(value, "state_dict"):
            state = value.state_dict()
            parts = {k: self.encode(x, _join(path, k), style) for k, x in state.items()}
            return {"kind": "object", "parts": parts}
        raise StateError(_no_form(value, path, style))

    def _encode_fields(self, value: Any, path: str) -> dict[str, Any]:
        parts = {}
        for declared in fields(value):
            part, style = getattr(value, declared.name), style_of(declared)
            if style is None and self.styles is not None:
                style = self.styles.get(declared.name, "whole")
            if style == "rebuilt":
                continue
            if style is None and _needs_style(part):
                raise StateError(_undeclared(value, declared.name, part, path))
            parts[declared.name] = self.encode(part, _join(path, declared.name), style)
        return parts

    def _encode_cache(self, cache: KVCache, path: str) -> Any:
        if self.in_process:
            return {"kind": "live_cache", "cache": cache}
        if self.without_caches:
            return {"kind": "absent_cache"}
        parts = {
            name: self._encode_part(part, _join(path, name), "whole")
            for name, part in cache.parts()
        }
        return {"kind": "cache", "frames": cache.cursor.past_frames(), "parts": parts}

    def _encode_tensor(self, x: Tensor, path: str, style: StateStyle) -> dict[str, Any]:
        order = next((n for n, f in _MEMORY_FORMATS.items() if _has_format(x, f)), None)
        on_host = x.device.type != self.layout.device.type
        part = self.layout.part(style, x, in_branch=self.in_branch)
        return self._encode_part(part, path, style, order, on_host)

    def _encode_part(
        self,
        part: TensorPart,
        path: str,
        style: StateStyle,
        order: str | None = None,
        on_host: bool = False,
    ) -> dict[str, Any]:
        """Emit a part; returns the value that represents its tensor."""
        self.emit(path, part)
        return {
            "kind": "tensor",
            "style": style,
            "shape": list(part.shape),
            "dtype": str(part.dtype)[6:],
            "order": order,
            "host": on_host,
        }


@dataclass(frozen=True)
class StateDecoder:
    """Fills fresh state from values and tensors; the inverse of `StateEncoder`."""

    layout: StateLayout
    """How ranks hold the state."""
    take: Take
    """Gives this rank's parts of the tensors."""
    in_process: bool = False
    """The values are of an encoder with ``in_process``."""
    rows: slice | None = None
    """Batch entries to take from KV caches, with ``in_process``; None: all of them."""
    drop_rest: Callable[[], None] | None = None
    """Where all ranks must take all tensors, in the order of `tensors_of`: takes those that a rank
    has not taken when it fails. None: a rank takes what it needs."""

    def restore(self, value: Any, path: str, into: Any = None, hint: Any = None) -> Any:
        """The state that ``encode`` received.

        Args:
            value: from ``encode``.
            path: as there.
            into: fresh state of the same kind, filled in place where it can be.
            hint: type of the field, for values that ``into`` does not have yet.

        Raises:
            ValueError: state that does not fit ``into``, or an object that cannot be created.
        """
        if not isinstance(value, dict):
            return value
        kind = value["kind"]
        if kind == "tensor":
            return self._restore_tensor(value, path, into)
        if kind == "device":
            return self.layout.device
        if kind == "cursor":
            into.reset(value["start"], value.get("frames"), value.get("pinned", ()))
            return into
        if kind == "live_cache":
            into.copy_from(value["cache"], self.rows)
            return into
        if kind == "absent_cache":
            return into
        if kind in ("list", "tuple"):
            return self._restore_items(value, path, into, hint)
        if kind == "fields":
            return self._restore_fields(value["parts"], path, into, hint)
        if kind == "mapping":
            places, hints = into if isinstance(into, Mapping) else {}, get_args(hint)
            inner = hints[1] if len(hints) > 1 else None
            return {
                name: self.restore(x, _join(path, name), places.get(name), inner)
                for name, x in value["parts"].items()
            }
        if into is None:
            raise ValueError(f"{path}: there is no object here to load this state into.")
        if kind == "cache":
            into.load_canonical(value["frames"], self._cache_parts(value, path, into))
        else:
            parts = {n: self.restore(x, _join(path, n)) for n, x in value["parts"].items()}
            into.load_state_dict(parts)
        return into

    def _cache_parts(self, value: dict[str, Any], path: str, into: KVCache) -> dict[str, Tensor]:
        found = {}
        for name, x in value["parts"].items():
            shape, region = tuple(x["shape"]), into.region(x["shape"][1])
            if shape != region_shape(whole := into.whole_region(shape[1])):
                raise ValueError(
                    f"{_join(path, name)} is {list(shape)} in the state and "
                    f"{list(region_shape(whole))} here: it was exported from another model."
                )
            found[name] = self.take(_join(path, name), shape, region, dtype_of(x["dtype"]))
        return found

    def skip(self, value: Any, path: str) -> None:
        """Leave ``value`` out; tensors that must be taken in order are dropped."""
        if self.drop_rest is None:
            return
        for name, shape, dtype in tensors_of(value, path):
            self.take(name, shape, whole_region(shape), dtype)

    def _restore_items(self, value: Any, path: str, into: Any, hint: Any) -> Any:
        items = value["items"]
        same = isinstance(into, list | tuple) and len(into) == len(items)
        places: Sequence[Any] = into if same else [None] * len(items)
        inner = (get_args(hint) or (None,))[0]
        restored = [
            self.restore(x, _join(path, str(i)), place, inner)
            for i, (x, place) in enumerate(zip(items, places, strict=True))
        ]
        if same and isinstance(into, list):
            into[:] = restored  # others may refer to this very list
            return into
        return restored if value["kind"] == "list" else tuple(restored)

    def _restore_fields(self, parts: dict[str, Any], path: str, into: Any, hint: Any) -> Any:
        if into is None:
            made = _dataclass_in(hint)
            if made is None:
                raise ValueError(
                    f"{path}: no object here to load these fields into: {', '.join(parts)}. "
                    "Annotate the field that holds them with their dataclass."
                )
            hints = get_type_hints(made)
            values = {
                n: self.restore(x, _join(path, n), None, hints.get(n)) for n, x in parts.items()
            }
            return made(**values)
        hints = get_type_hints(type(into))
        unknown = [name for name in parts if name not in hints]
        if unknown:
            raise ValueError(f"{path}: {type(into).__name__} has no field {unknown[0]!r}.")
        values = {
            n: self.restore(x, _join(path, n), getattr(into, n), hints[n]) for n, x in parts.items()
        }
        if type(into).__dataclass_params__.frozen:
            return type(into)(**{f.name: getattr(into, f.name) for f in fields(into)} | values)
        for name, part in values.items():
            setattr(into, name, part)
        return into

    def _restore_tensor(self, value: Any, path: str, into: Any) -> Tensor:
        shape, dtype = tuple(value["shape"]), dtype_of(value["dtype"])
        x = self.take(path, shape, self.layout.region(value["style"], shape), dtype)
        x = x.to("cpu" if value["host"] else self.layout.device)
        if isinstance(into, Tensor) and into.shape == x.shape and into.dtype == x.dtype:
            return into.copy_(x)
        order = torch.preserve_format if self.in_process else torch.contiguous_format
        # Strides are set even where a dim of size 1 leaves them open: convolutions look at them.
        return x.clone(memory_format=_MEMORY_FORMATS.get(value["order"], order))


def tensors_of(value: Any, path: str) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Path, shape and dtype of the tensors in a value of `StateEncoder`, as they were emitted.

    Args:
        value: from ``encode``.
        path: as there.
    """
    if not isinstance(value, dict):
        return
    if value["kind"] == "tensor":
        yield path, tuple(value["shape"]), dtype_of(value["dtype"])
    parts = {**dict(enumerate(value.get("items", []))), **value.get("parts", {})}
    for name, part in parts.items():
        yield from tensors_of(part, _join(path, str(name)))


def dtype_of(name: str) -> torch.dtype:
    """The dtype for a name such as ``"float32"``.

    Raises:
        ValueError: an unknown name.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype.")
    return found


def _needs_style(value: Any) -> bool:
    """Whether a value needs a declared style: dataclasses and cursors do not."""
    if value is None or isinstance(value, Cursor):
        return False
    return not is_dataclass(value)


def _undeclared(owner: Any, name: str, value: Any, path: str) -> str:
    return (
        f"{path or 'state'}: {type(owner).__name__}.{name} (a {type(value).__name__}) does not say "
        "how ranks hold it, so this rollout cannot be saved, moved or copied. Declare the field "
        f'with its style: from flashdreams.parallel.plan import state; {name}: ... = state("whole")'
        ' if it is equal on all ranks, "heads" for [B, S, N, D] tensors cut by tensor parallelism, '
        '"cache" for KV caches, "host" for plain numbers, "rebuilt" for what begin_step makes.'
    )


def _no_form(value: Any, path: str, style: StateStyle | None) -> str:
    name = type(value).__name__
    if style is None:
        return (
            f"{path}: a {name} as state does not say how ranks hold it, so this rollout cannot be "
            "saved, moved or copied. Make it a dataclass whose fields declare their styles with "
            "flashdreams.parallel.plan.state."
        )
    return (
        f"{path}: a {name} has no plain form. Keep rollout state in tensors, numbers, lists, dicts "
        "with string keys and dataclasses that declare their styles."
    )


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a type hint names, also within a union."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := _dataclass_in(part))), None)


def _has_format(x: Tensor, memory_format: torch.memory_format) -> bool:
    dims = 4 if memory_format == torch.channels_last else 5
    return x.ndim == dims and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
