"""Configs as YAML text, to keep runs under version control, and their hash."""

import dataclasses
import enum
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from flashdreams.infra.config import (
    REMOVED_FIELDS,
    UNRESOLVED,
    annotated_types,
    check_leaf,
    config_fields,
    field_annotation,
    field_default,
    has_default,
    is_config,
    quoted,
    unknown_name,
)
from flashdreams.infra.config_values import (
    fit,
    item_annotation,
    value_annotation,
    yaml_name,
    yaml_text,
)
from flashdreams.runtime.checkpoint import CheckpointError
from flashdreams.runtime.text import printable, shown

TUPLE_TAG = "!tuple"
PATH_TAG = "!path"
MOVED_MODULES = {
    "flashdreams.models.wan.runner": "flashdreams.infra.video_runner",
    "flashdreams.runtime.checkpoint": "flashdreams.runtime.checkpoint.config",
    "flashdreams.runtime.checkpoint_config": "flashdreams.runtime.checkpoint.config",
}
"""Current modules of the classes that config files of 0.1 name, by old module."""
MAX_CONFIG_BYTES = 2**17
"""Largest config file; one of all fields of a shipped method has some 7,000 bytes."""
MAX_DEPTH = 32
"""Most levels of a config file; a shipped method has 5."""
MAX_NUMBER = 64
"""Most characters of a number; parsing takes time quadratic in the length."""

_STANDARD = "tag:yaml.org,2002:"
_SCALARS = {_STANDARD + kind for kind in ("null", "bool", "int", "float", "str")}
_AS_WRITTEN = {_STANDARD + kind for kind in ("timestamp", "merge", "value")}
_SEQUENCES = {_STANDARD + "seq", TUPLE_TAG}
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


class _Dumper(yaml.SafeDumper):
    """Writes floats and strings so that ``_Loader`` tells them apart."""


class _Loader(yaml.SafeLoader):
    """Reads YAML without aliases, so that no value is shared and none contains itself."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _class in (_Dumper, _Loader):
    # YAML 1.1 reads 1e-3 as a string, but a number is meant.
    _class.add_implicit_resolver(_STANDARD + "float", _EXPONENT, list("-+0123456789"))


@dataclass(kw_only=True)
class KnownTypes:
    """The types that a config file may name; nothing else is looked up or imported."""

    tagged: dict[str, type] = field(default_factory=dict)
    """Config classes and enums by tag."""

    targets: dict[str, type] = field(default_factory=dict)
    """Classes that a config's ``_target`` may name, by ``module:name``."""


def dump_config(config: Any) -> str:
    """A config as YAML text that :func:`load_config` takes back.

    Args:
        config: a config whose values are configs, None, bool, int, float, str, ``Path``, enum
            members, and lists, tuples and dicts of these.

    Returns:
        The text. Configs and enums carry ``!module:Class``, paths ``!path``, tuples ``!tuple``.

    Raises:
        TypeError: a value that a file cannot represent, with its dotted path.
    """
    return yaml.serialize(
        _node(config, type(config).__name__),
        Dumper=_Dumper,
        allow_unicode=True,
        width=2**16,
    )


def load_config(
    text: str,
    registered: Iterable[Any],
    source: str = "config file",
    note: Callable[[str], Any] = warnings.warn,
) -> Any:
    """The config that a YAML text describes.

    Fields that the text omits keep their defaults. All tags are checked before anything is
    built: they must belong to types of the registered configs. A file of 0.1 is read as well: moved
    classes are found, and removed fields that are off are ignored with a note.

    Args:
        text: written by :func:`dump_config` or by hand.
        registered: the configs whose types the text may name (see :func:`known_types`).
        source: name of the text in messages, e.g. its file name.
        note: is called with one sentence for every removed field that is ignored.

    Returns:
        The config.

    Raises:
        ValueError: unreadable YAML, an unknown tag or field, a removed field that is on, a missing
            field, or a value that the config itself refuses; with the line.
        TypeError: a value that does not conform to its field, with the line.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"{source} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source} is not readable YAML: {_problem(error)}.") from error
    reader = _Reader(known_types(registered), source)
    if root is None or not isinstance(root, yaml.MappingNode) or not root.tag.startswith("!"):
        raise ValueError(
            f"{source} holds no config: it must start with the tag of one, such as "
            f"{next(iter(reader.types.tagged), '!module:Class')}. Write one with --print-config."
        )
    reader.check_tags(root)
    config = reader.read(root, "")
    for name in reader.ignored:
        note(f"{source}: {name} was removed in 0.2 and is ignored because it is off.")
    return config


def known_types(configs: Iterable[Any]) -> KnownTypes:
    """Types that appear in the given configs, in their annotations, and in the defaults of those.

    Args:
        configs: configs, e.g. those of every registered slug.
    """
    known = KnownTypes()
    for config in configs:
        _collect_value(config, known)
    return known


def config_hash(config: Any) -> str:
    """16 hex digits that are equal for equal configs, in any process and on any machine.

    Values that are neither plain nor configs count by their name (classes, functions) or by their
    ``repr`` without addresses.
    """
    canonical = json.dumps(_canonical(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _reference(kind: Any) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _moved(reference: str) -> str:
    """A ``module:name`` with the current module of the name."""
    module, colon, name = reference.partition(":")
    return MOVED_MODULES.get(module, module) + colon + name


def _own_target(config: Any) -> type | None:
    """The target of a config if it differs from the one of its class."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    target = getattr(config, "_target", None)
    if "_target" not in fields or target is field_default(fields["_target"]):
        return None
    return target


def _node(value: Any, path: str) -> yaml.Node:
    if is_config(value):
        pairs: list[tuple[yaml.Node, yaml.Node]] = [
            (_scalar("str", name), _node(getattr(value, name), f"{path}.{name}"))
            for name in config_fields(value)
        ]
        target = _own_target(value)
        if target is not None:
            pairs.append((_scalar("str", "_target"), _scalar("str", _reference(target))))
        return yaml.MappingNode(f"!{_reference(type(value))}", pairs, flow_style=not pairs)
    if isinstance(value, enum.Enum):
        return yaml.ScalarNode(f"!{_reference(type(value))}", value.name)
    if isinstance(value, PurePath):
        return yaml.ScalarNode(PATH_TAG, str(value), style=_style(str(value)))
    if type(value) in (list, tuple):
        items = [_node(item, f"{path}[{i}]") for i, item in enumerate(value)]
        flat = all(isinstance(item, yaml.ScalarNode) for item in items)
        tag = TUPLE_TAG if isinstance(value, tuple) else _STANDARD + "seq"
        return yaml.SequenceNode(tag, items, flow_style=flat)
    if type(value) is dict:
        pairs = [(_key(key, path), _node(item, f"{path}.{key}")) for key, item in value.items()]
        return yaml.MappingNode(_STANDARD + "map", pairs, flow_style=not pairs)
    if type(value) is str:
        return _scalar("str", value)
    if value is None or type(value) in (bool, int, float):
        return yaml.representer.SafeRepresenter().represent_data(value)
    raise TypeError(
        f"{path} holds {value!r} ({type(value).__name__}), which a config file cannot hold: it "
        "takes configs, None, bool, int, float, str, Path, enums, lists, tuples and dicts."
    )


def _key(key: Any, path: str) -> yaml.Node:
    if key is None or type(key) in (bool, int, float, str):
        return _node(key, path)
    raise TypeError(f"{path} has the key {key!r}, which a config file cannot hold: use a str.")


def _scalar(kind: str, text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(_STANDARD + kind, text, style=_style(text))


def _style(text: str) -> str | None:
    """Blocks for text of several lines; escapes where pyyaml would fold exotic line breaks away."""
    if re.search("[\r\x85\u2028\u2029]", text):
        return '"'
    return "|" if "\n" in text else None


class _Reader:
    """Turns the nodes of one YAML text into a config."""

    def __init__(self, types: KnownTypes, source: str) -> None:
        self.types = types
        self.source = source
        self.ignored: dict[str, None] = {}

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}, line {node.start_mark.line + 1}: "

    def check_tags(self, root: yaml.Node) -> None:
        plain: dict[type, set[str]] = {
            yaml.ScalarNode: {*_SCALARS, *_AS_WRITTEN, PATH_TAG},
            yaml.SequenceNode: _SEQUENCES,
            yaml.MappingNode: {_STANDARD + "map"},
        }
        for node in _nodes(root):
            if node.tag.startswith("!"):
                node.tag = f"!{_moved(node.tag[1:])}"
            if node.tag not in plain[type(node)] and node.tag not in self.types.tagged:
                tag = node.tag.replace(_STANDARD, "!!")
                what = f"type {quoted(tag)}; a file may only name types of registered configs"
                names = [*self.types.tagged, PATH_TAG, TUPLE_TAG]
                raise ValueError(self.where(node) + unknown_name(tag, names, what, "types"))

    def read(self, node: yaml.Node, path: str, annotation: Any = UNRESOLVED) -> Any:
        kind = self.types.tagged.get(node.tag)
        if kind is not None and issubclass(kind, enum.Enum):
            return self.read_enum(kind, node)
        if kind is not None:
            return self.read_config(kind, node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.read(item, f"{path}[{i}]", item_annotation(annotation, i))
                for i, item in enumerate(node.value)
            ]
            return fit(tuple(items) if node.tag == TUPLE_TAG else items, None, annotation)
        if isinstance(node, yaml.MappingNode):
            inner = value_annotation(annotation)
            return {key: self.read(v, f"{path}.{key}", inner) for key, v in self.pairs(node)}
        if node.tag == PATH_TAG:
            return Path(node.value)
        value = node.value
        try:
            if node.tag in _SCALARS:
                if node.tag != f"{_STANDARD}str" and len(node.value) > MAX_NUMBER:
                    raise ValueError(f"{quoted(node.value)} is too long a value.")
                value = yaml.constructor.SafeConstructor().construct_object(node)
            plain = isinstance(node, yaml.ScalarNode) and node.style is None
            return fit(value, node.value if plain else None, annotation)
        except Exception as error:  # a tag such as !!int on any text: whatever comes of it
            raise ValueError(self.where(node) + _problem(error)) from error

    def read_enum(self, kind: type[enum.Enum], node: yaml.Node) -> Any:
        if node.value in kind.__members__:
            return kind[node.value]
        what = f"member {quoted(node.value)} of {kind.__name__}"
        raise ValueError(
            self.where(node) + unknown_name(str(node.value), kind.__members__, what, "members")
        )

    def read_config(self, kind: type, node: yaml.Node, path: str) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{self.where(node)}{shown(node.tag)} must be followed by its fields.")
        prefix = f"{path}." if path else ""
        valid = config_fields(kind)
        values: dict[str, Any] = {}
        for name, value_node in self.pairs(node, names=True):
            if name == "_target":
                values[name] = self.read_target(value_node)
                continue
            if name not in valid:
                if name in REMOVED_FIELDS:
                    value = self.read(value_node, f"{prefix}{name}")
                    if value is False or value == "native":
                        self.ignored[name] = None
                        continue
                what = f"field '{prefix}{shown(name)}' of {kind.__name__}"
                raise ValueError(self.where(value_node) + unknown_name(str(name), valid, what))
            annotation = field_annotation(kind, name)
            values[name] = self.read(value_node, f"{prefix}{name}", annotation)
            try:
                check_leaf(kind, name, values[name], f"{prefix}{name}")
            except TypeError as error:
                raise TypeError(
                    f"{self.where(value_node)}{prefix}{name} of {kind.__name__} must be "
                    f"{yaml_name(annotation)}; got {yaml_text(values[name])}."
                ) from error
        absent = [n for n, f in valid.items() if n not in values and not has_default(f)]
        if absent:
            names = ", ".join(prefix + name for name in absent)
            raise ValueError(f"{self.where(node)}{kind.__name__} needs a value for {names}.")
        try:
            return kind(**values)
        except (ValueError, TypeError, CheckpointError) as error:
            kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
            raise kind_of_error(f"{self.where(node)}{error}") from error

    def read_target(self, node: yaml.Node) -> type:
        name = _moved(str(node.value))
        if name not in self.types.targets:
            what = f"target {quoted(node.value)}; a file may only name targets of registered "
            what += "configs"
            names = self.types.targets
            raise ValueError(self.where(node) + unknown_name(name, names, what, "targets"))
        return self.types.targets[name]

    def pairs(self, node: yaml.MappingNode, names: bool = False) -> Iterator[tuple[Any, yaml.Node]]:
        """Keys and value nodes; with ``names`` all keys are taken as field names."""
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{self.where(key_node)}a key must be a plain value.")
            key = key_node.value if key_node.style is None and names else self.read(key_node, "")
            if key in seen:
                raise ValueError(f"{self.where(key_node)}{quoted(key)} is given twice.")
            seen.add(key)
            yield key, value_node


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)


def _problem(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {printable(str(error.problem), 300)}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return printable(" ".join(str(error).split()), 300) or type(error).__name__


def _collect_value(value: Any, known: KnownTypes) -> None:
    if is_config(value):
        _collect_class(type(value), known)
        target = getattr(value, "_target", None)
        if target is not None:
            known.targets[_reference(target)] = target
        for name in config_fields(value):
            _collect_value(getattr(value, name), known)
    elif isinstance(value, enum.Enum):
        _collect_class(type(value), known)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect_value(item, known)
    elif isinstance(value, dict):
        for item in value.values():
            _collect_value(item, known)


def _collect_class(kind: type, known: KnownTypes) -> None:
    tag = f"!{_reference(kind)}"
    if tag in known.tagged:
        return
    if issubclass(kind, enum.Enum):
        known.tagged[tag] = kind
    elif dataclasses.is_dataclass(kind):
        known.tagged[tag] = kind
        for own in dataclasses.fields(kind):
            annotation = field_annotation(kind, own.name)
            if own.name != "_target" and annotation is not UNRESOLVED:
                for named in annotated_types(annotation):
                    _collect_class(named, known)
            if has_default(own):
                _collect_default(own, known)


def _collect_default(own: dataclasses.Field, known: KnownTypes) -> None:
    default = field_default(own)
    if own.name == "_target":
        known.targets[_reference(default)] = default
    else:
        _collect_value(default, known)


def _canonical(value: Any) -> Any:
    if is_config(value):
        fields = {name: _canonical(getattr(value, name)) for name in config_fields(value)}
        target = _own_target(value)
        own = [] if target is None else [_reference(target)]
        return ["config", _reference(type(value)), fields, *own]
    if isinstance(value, enum.Enum):
        return ["enum", _reference(type(value)), value.name]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else ["float", repr(float(value))]
    if isinstance(value, PurePath):
        return ["path", value.as_posix()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_canonical, value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(map(_canonical, value), key=json.dumps)]
    if isinstance(value, dict):
        pairs = [[_canonical(k), _canonical(v)] for k, v in value.items()]
        return ["dict", *sorted(pairs, key=lambda pair: json.dumps(pair[0]))]
    if hasattr(value, "__qualname__"):
        return ["named", _reference(value)]
    return ["other", _reference(type(value)), re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))]
