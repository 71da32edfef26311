"""The config system: dataclasses that name the class they set up, and their variants."""

import collections.abc
import copy
import dataclasses
import difflib
import os
import pathlib
import re
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

ConfigT = TypeVar("ConfigT")

UNRESOLVED: Any = object()
"""Placeholder for an annotation that cannot be evaluated; every value conforms to it."""

REMOVED_FIELDS = {
    "fuse_clean_pass": "measured slower (380 ms against 372 per AR step on an H200)",
    "compile_blocks": "measured slower (379 ms against 372 per AR step on an H200)",
    "linear_precision": "measured slower (475 ms against 374 per AR step on an H200); "
    "precision='fp8' is FP8 attention, 'fp8_gemm' also FP8 matmuls with quantization fused",
}
"""Removed fields of version 0.1, and the reasons."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = 160
_QUOTE.maxlist = _QUOTE.maxtuple = _QUOTE.maxdict = _QUOTE.maxset = _QUOTE.maxfrozenset = 12


@dataclass(kw_only=True)
class InstantiateConfig:
    """A typed, nestable description of an object, which ``setup`` builds.

    Subclasses are dataclasses with ``kw_only=True``. They point ``_target`` to their class through
    a default factory, so that the config can be defined above the class it names::

        _target: type["MyEncoder"] = field(default_factory=lambda: MyEncoder)

    Equal fields make equal configs. A config is not changed once it is in use: variants of it are
    made with :func:`derive_config`. A value that ``__post_init__`` computes from others belongs in
    a ``field(init=False)``, so that a variant computes it again.
    """

    _target: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a ``__post_init__`` that does not call the inherited one, which checks fields."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        code = getattr(own, "__code__", None)
        inherited = any("__post_init__" in base.__dict__ for base in cls.__mro__[1:])
        if code is not None and inherited and "__post_init__" not in code.co_names:
            raise TypeError(
                f"{cls.__name__}.__post_init__ skips the inherited checks: begin it "
                "with super().__post_init__()."
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> "InstantiateConfig":
        """Refuse a keyword that was a field in an earlier version, with the reason."""
        for name in REMOVED_FIELDS.keys() & kwargs.keys():
            if name not in cls.__dataclass_fields__:
                raise TypeError(removed_field(name))
        return super().__new__(cls)

    def setup(self, **kwargs: Any) -> Any:
        """Build the object: the target class called with this config and ``kwargs``."""
        return self._target(self, **kwargs)

    def __str__(self) -> str:
        return format_config(self)


@overload
def derive_config(base: type[ConfigT], /, **overrides: Any) -> ConfigT: ...
@overload
def derive_config(base: ConfigT, /, **overrides: Any) -> ConfigT: ...
def derive_config(base: Any, /, **overrides: Any) -> Any:
    """Make a variant of a config: all fields except the overridden ones are kept.

    Args:
        base: a config, or a config class, which is instantiated first. It is never changed, and
            the variant shares no mutable value with it.
        overrides: new values by field name. For a component, a ``dict`` overrides some of the
            component's fields (at any depth), and a whole config replaces it; a component that is
            None is built from the dict. A field that holds a dict is replaced whole.

    Returns:
        A new config of the same class; ``__post_init__`` has run again at every changed level.

    Raises:
        ValueError: an unknown field, or one that the config computes itself.
        TypeError: a value that does not conform to the field's annotation, a dict for a field that
            is not a component, or a base that is not a config.
    """
    if not dataclasses.is_dataclass(base):
        raise TypeError(
            f"derive_config needs a config (an instance or class of a dataclass) as its base, "
            f"got {base!r}."
        )
    if isinstance(base, type):
        return _derive_from_class(base, overrides, "")
    return _derive(base, overrides, "")


def format_config(config: Any) -> str:
    """The config as text of one line per field, components indented below their field."""
    return _format(config, "")


def expand_home(config: ConfigT) -> ConfigT:
    """The config with ``~`` in all its paths read as the home directory.

    A shell does that only at the start of a word, so not after ``=`` and not in a file.
    """
    changed: dict[str, Any] = {}
    for name in config_fields(config):
        value = getattr(config, name)
        if is_config(value):
            expanded = expand_home(value)
        elif isinstance(value, pathlib.Path):
            expanded = pathlib.Path(os.path.expanduser(value))
        else:
            continue
        if expanded != value:
            changed[name] = expanded
    return dataclasses.replace(config, **changed) if changed else config  # type: ignore[type-var]


def is_config(value: Any) -> bool:
    """Whether a value is a config: an instance of any dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def config_fields(config_type: Any) -> dict[str, dataclasses.Field]:
    """The user-settable fields of a config or config class, by name, without ``_target``."""
    fields = dataclasses.fields(config_type)
    return {f.name: f for f in fields if f.init and f.name != "_target"}


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All values of a config, of its components and of theirs: dotted path, owner and value."""
    for name in config_fields(config):
        value = getattr(config, name)
        yield f"{prefix}{name}", config, value
        if is_config(value):
            yield from walk(value, f"{prefix}{name}.")


def has_default(field: dataclasses.Field) -> bool:
    """Whether the field has a default."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def field_default(field: dataclasses.Field) -> Any:
    """The default of a field, from its factory if it has one; ``dataclasses.MISSING`` if none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_annotation(config_type: type, name: str) -> Any:
    """The evaluated annotation of one field, or :data:`UNRESOLVED`.

    Each annotation is evaluated separately, in the module of its class: one that names a
    type that exists only for type checkers does not affect the others.
    """
    field = config_type.__dataclass_fields__[name]  # type: ignore[attr-defined]
    owners = [c for c in config_type.__mro__ if _declares(c, name, field)]
    owner = owners[-1] if owners else config_type
    module = sys.modules.get(owner.__module__)
    holder = types.SimpleNamespace(__annotations__={name: field.type})
    try:
        hints = typing.get_type_hints(
            holder, vars(module) if module else {}, dict(vars(owner)), include_extras=True
        )
    except Exception:
        return UNRESOLVED
    return hints[name]


def _declares(owner: type, name: str, field: dataclasses.Field) -> bool:
    return owner.__dict__.get("__dataclass_fields__", {}).get(name) is field


def removed_field(name: str) -> str | None:
    """Text for a field of an earlier version; None for any other name."""
    reason = REMOVED_FIELDS.get(name)
    return reason and f"{name} was removed in 0.2: {reason}. Remove it; see CHANGELOG.md."


def unknown_name(name: str, valid: Iterable[str], what: str, kind: str = "fields") -> str:
    """Text for an unknown name: the nearest ones, then all valid ones.

    For a removed field, the reason.

    Args:
        name: the last part of the requested name.
        valid: all valid names.
        what: the requested thing in the text, e.g. ``"field 'encoder.dmi' of EncConfig"``.
        kind: description of the valid names.
    """
    name = name[:200]
    removed = removed_field(name) if kind == "fields" else None
    if removed is not None:
        return removed
    valid = list(valid)
    return (
        f"Unknown {what}.{did_you_mean(name, valid)} Valid {kind}: {', '.join(valid) or '(none)'}."
    )


def quoted(value: Any) -> str:
    """The ``repr`` of a value for a message: control characters escaped, long values cut."""
    return _QUOTE.repr(value)


def check_slug(name: Any) -> None:
    """Refuse a ``runner_name`` that is not a slug; it is used in file names.

    Raises:
        ValueError: states what is allowed.
    """
    if not isinstance(name, str) or not _SLUG.fullmatch(name):
        raise ValueError(
            f"runner_name {quoted(name)} must be of letters, digits and . _ + - only, begin with a "
            "letter or digit, and have at most 100 characters."
        )


def did_you_mean(name: str, valid: Collection[str]) -> str:
    """A sentence with at most three names, those about as near as the nearest; or nothing."""
    found = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    ratios = [difflib.SequenceMatcher(None, other, name).ratio() for other in found]
    near = [repr(n) for n, ratio in zip(found, ratios, strict=True) if ratio > max(ratios) - 0.1]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def check_leaf(config_type: type, name: str, value: Any, path: str) -> None:
    """Check one value against the annotation of its field.

    Args:
        config_type: the config class.
        name: the field.
        value: the value.
        path: name of the field in messages (dotted, from the outermost config).

    Raises:
        TypeError: the value does not conform. An annotation that cannot be evaluated is skipped.
    """
    annotation = field_annotation(config_type, name)
    if conforms(value, annotation):
        return
    if value is None and config_type.__dataclass_fields__[name].default is None:  # type: ignore[attr-defined]
        return
    raise TypeError(
        f"{path} of {config_type.__name__} must be {type_name(annotation)}, "
        f"got {quoted(value)} ({type(value).__name__})."
    )


def conforms(value: Any, annotation: Any) -> bool:
    """Whether a value conforms to an annotation; True if that cannot be decided.

    An int conforms to float, a bool to neither int nor float, a str to no sequence of str.
    """
    annotation = _plain(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, arm) for arm in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if annotation in (int, float) and isinstance(value, (bool, int)):
        return not isinstance(value, bool)
    expected = origin or annotation
    if expected is collections.abc.Callable:
        return callable(value)
    if not isinstance(expected, type):
        return True
    try:
        if not isinstance(value, expected):
            return False
    except TypeError:
        return True
    return _elements_conform(value, expected, args)


def _elements_conform(value: Any, expected: type, args: tuple[Any, ...]) -> bool:
    if isinstance(value, (str, bytes)):
        return expected not in (collections.abc.Sequence, collections.abc.Iterable)
    if isinstance(value, Mapping) and len(args) == 2:
        return all(conforms(k, args[0]) and conforms(v, args[1]) for k, v in value.items())
    if isinstance(value, tuple) and expected is tuple and args and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(conforms, value, args))
    if isinstance(value, (list, tuple, set, frozenset)) and args:
        return all(conforms(item, args[0]) for item in value)
    return True


def _plain(annotation: Any) -> Any:
    """An annotation without wrappers that do not affect the allowed values."""
    while True:
        if typing.get_origin(annotation) in (typing.Annotated, typing.Final):
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        else:
            return annotation


def type_name(annotation: Any) -> str:
    """An annotation in readable form."""
    if annotation is UNRESOLVED:
        return "unknown type"
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(arm) for arm in typing.get_args(annotation))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def annotated_types(annotation: Any) -> list[type]:
    """The classes that an annotation names, at any depth, in order."""
    annotation = _plain(annotation)
    args = typing.get_args(annotation)
    if isinstance(annotation, type) and not args:
        return [annotation]
    return [found for arg in args for found in annotated_types(arg)]


def _derive_from_class(config_type: type, overrides: Mapping[str, Any], path: str) -> Any:
    fields = config_fields(config_type)
    missing = [n for n, f in fields.items() if not has_default(f)]
    if not missing:
        return _derive(config_type(), overrides, path)
    _check_names(config_type, overrides, path)
    values = {}
    for name, value in overrides.items():
        field = config_type.__dataclass_fields__[name]  # type: ignore[attr-defined]
        current = field_default(field) if has_default(field) else None
        values[name] = _new_value(config_type, name, current, value, f"{path}{name}")
    absent = [name for name in missing if name not in values]
    if absent:
        raise TypeError(
            f"{config_type.__name__} cannot be made without {', '.join(path + n for n in absent)}: "
            "give a value for each, or an instance instead of the class."
        )
    return config_type(**values)


def _derive(base: Any, overrides: Mapping[str, Any], path: str) -> Any:
    _check_names(type(base), overrides, path)
    values = {
        f.name: copy.deepcopy(getattr(base, f.name))
        for f in dataclasses.fields(base)
        if f.init and f.name not in overrides
    }
    for name, value in overrides.items():
        current = getattr(base, name)
        values[name] = _new_value(type(base), name, current, value, f"{path}{name}")
    return dataclasses.replace(base, **values)


def _check_names(config_type: type, names: Iterable[Any], path: str) -> None:
    valid = config_fields(config_type)
    computed = {f.name for f in dataclasses.fields(config_type) if not f.init}
    for name in names:
        if name in computed:
            raise ValueError(
                f"Field '{path}{name}' of {config_type.__name__} is computed by the config itself "
                "and cannot be set."
            )
        if name not in valid and name != "_target":
            what = f"field '{path}{name}' of {config_type.__name__}"
            raise ValueError(unknown_name(str(name), valid, what))


def _new_value(config_type: type, name: str, current: Any, value: Any, path: str) -> Any:
    """The new value of a field that holds ``current`` and is given ``value``."""
    if isinstance(value, Mapping):
        if is_config(current):
            return _derive(current, value, f"{path}.")
        annotation = field_annotation(config_type, name)
        components = _component_types(annotation)
        if current is None and len(components) == 1:
            return _derive_from_class(components[0], value, f"{path}.")
        holds_dict = isinstance(current, Mapping) or conforms(value, annotation)
        if annotation is UNRESOLVED and current is not None:
            holds_dict = isinstance(current, Mapping)
        if not holds_dict:
            raise TypeError(_no_component(config_type, path, current, components, annotation))
    check_leaf(config_type, name, value, path)
    return copy.deepcopy(value)


def _component_types(annotation: Any) -> list[type]:
    """The config classes in an annotation such as ``EncoderConfig | None``."""
    annotation = _plain(annotation)
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    arms = typing.get_args(annotation) if union else (annotation,)
    return [a for a in map(_plain, arms) if isinstance(a, type) and dataclasses.is_dataclass(a)]


def _no_component(
    config_type: type, path: str, current: Any, components: list[type], annotation: Any
) -> str:
    if components:
        choice = " or ".join(f"{c.__name__}(...)" for c in components)
        return f"{path} of {config_type.__name__} is {current!r}: give a whole config, {choice}."
    return (
        f"{path} of {config_type.__name__} is a plain value, not a component "
        f"({type_name(annotation)}, now {current!r}): it takes no dict of overrides."
    )


def _format(value: Any, indent: str) -> str:
    deeper = indent + "    "
    if is_config(value):
        lines = [
            f"{f.name}={_format(getattr(value, f.name), deeper)}"
            for f in dataclasses.fields(value)
            if f.repr and not (f.name == "_target" and value._target is field_default(f))
        ]
        opening, closing = f"{type(value).__name__}(", ")"
    elif type(value) in (list, tuple) and any(is_config(item) for item in value):
        lines = [_format(item, deeper) for item in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
    elif type(value) is dict and any(is_config(item) for item in value.values()):
        lines = [f"{key!r}: {_format(item, deeper)}" for key, item in value.items()]
        opening, closing = "{", "}"
    else:
        return repr(value)
    if not lines:
        return opening + closing
    return "\n".join([opening, *(f"{deeper}{line}," for line in lines), f"{indent}{closing}"])
