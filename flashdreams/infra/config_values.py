"""Conversion of config file values to the types of fields, and errors in YAML terms."""

import collections.abc
import enum
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashdreams.infra.config import UNRESOLVED, annotated_types, conforms, is_config, quoted

SURPRISES = {
    "int": re.compile(r"[-+]?(0[0-9_]+|0b[01_]+|[0-9_]*_[0-9_]*|[0-9]+(:[0-9]+)+)"),
    "float": re.compile(r"[-+]?[0-9]+(:[0-9]+)+\.[0-9]*|[-+]?[0-9.]*_[0-9_.]*"),
    "bool": re.compile(r"(?i)yes|no|on|off"),
}
"""Unquoted words that YAML 1.1 misreads, by the type that it gives them."""

_ANYTHING = object()
_NAMES = {
    int: "a whole number such as 3",
    float: "a number such as 0.5",
    bool: "true or false",
    str: 'text such as "a cat"',
    type(None): "null",
}


def fit(value: Any, text: str | None, annotation: Any) -> Any:
    """Convert a value for its field: a list to a tuple, text to a path, an unquoted word to text.

    Args:
        value: the value as YAML parsed it.
        text: the source text of an unquoted value; None for all others.
        annotation: of the field, evaluated.

    Returns:
        A value that conforms to the annotation, or the value unchanged if none does.

    Raises:
        ValueError: an unquoted word that YAML parsers read as different numbers.
    """
    flag = isinstance(value, bool) and conforms(value, annotation)
    if text is not None and _is_surprise(value, text) and not flag:
        for wanted in (str, Path):
            if _admits(annotation, wanted):
                return wanted(text)
        word = quoted(text)[1:-1]
        raise ValueError(
            f"{word} without quotes is {quoted(value)} to YAML, which is easily misread: write "
            f'{quoted(value)}, or "{word}" in quotes for text.'
        )
    if conforms(value, annotation):
        return value
    if isinstance(value, (list, tuple)):
        return _fit_sequence(value, annotation)
    if isinstance(value, str):
        text = value
    if text is not None and value is not None:
        for kind in annotated_types(annotation):
            if issubclass(kind, enum.Enum) and text in kind.__members__:
                return kind[text]
        if conforms(text, annotation):
            return text
        if conforms(Path(text), annotation):
            return Path(text)
    return value


def item_annotation(annotation: Any, index: int) -> Any:
    """The annotation of an entry of a list or tuple; `UNRESOLVED` where nothing is said."""
    for arm in _arms(annotation):
        origin, args = typing.get_origin(arm), typing.get_args(arm)
        if origin in (list, collections.abc.Sequence, set, frozenset) and args:
            return args[0]
        if origin is tuple and args:
            if args[-1] is Ellipsis:
                return args[0]
            if index < len(args):
                return args[index]
    return UNRESOLVED


def value_annotation(annotation: Any) -> Any:
    """The annotation of the values of a mapping; `UNRESOLVED` where nothing is said."""
    for arm in _arms(annotation):
        args = typing.get_args(arm)
        origin = typing.get_origin(arm)
        if isinstance(origin, type) and issubclass(origin, Mapping) and len(args) == 2:
            return args[1]
    return UNRESOLVED


def yaml_name(annotation: Any) -> str:
    """What to write for an annotation, in YAML terms."""
    return " or ".join(dict.fromkeys(_yaml_name(arm) for arm in _arms(annotation)))


def yaml_text(value: Any) -> str:
    """A value approximately as it was written."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(yaml_text, value))}]" if len(value) < 10 else quoted(value)
    if isinstance(value, Path):
        return f"!path {quoted(str(value))[1:-1]}"
    return f"the fields of {type(value).__name__}" if is_config(value) else quoted(value)


def _is_surprise(value: Any, text: str) -> bool:
    kind = type(value).__name__
    return kind in SURPRISES and bool(SURPRISES[kind].fullmatch(text))


def _admits(annotation: Any, kind: type) -> bool:
    """Whether an annotation restricts the value."""
    return not conforms(_ANYTHING, annotation) and conforms(kind(), annotation)


def _fit_sequence(value: list | tuple, annotation: Any) -> Any:
    for kind in (tuple, list):
        if conforms(kind(value), annotation):
            return kind(value)
    return value


def _arms(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _arms(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for arm in typing.get_args(annotation) for inner in _arms(arm)]
    return [annotation]


def _yaml_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if annotation is None:
        return "null"
    if origin is typing.Literal:
        return " or ".join(yaml_text(arg).replace("'", '"') for arg in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: [{', '.join(yaml_name(arg) for arg in args)}]"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"a list of {yaml_name(args[0])} each" if args else "a list such as [1, 2]"
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return "a path such as out/run"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(annotation.__members__)
    if isinstance(annotation, type) and hasattr(annotation, "__dataclass_fields__"):
        return f"!{annotation.__module__}:{annotation.__qualname__} and its fields below it"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "keys and values"
    return str(annotation).replace("typing.", "")
