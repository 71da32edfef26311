"""Discovery of runners: installed entry points and the FLASHDREAMS_RUNNER_CONFIGS variable."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from flashdreams.infra.config import InstantiateConfig, check_slug, unknown_name

GROUP = "flashdreams.runner_configs"
"""The entry-point group in which packages, this one included, name their runner configs."""

VARIABLE = "FLASHDREAMS_RUNNER_CONFIGS"
"""The environment variable for temporary registration: ``slug=module:attr,...``."""

_REFERENCE = re.compile(r"[\w.]+:[\w.]+")


class PluginError(Exception):
    """A requested plug-in cannot be used; its own error is the cause."""


@dataclass(frozen=True)
class Source:
    """One registration: the reference to an attribute, before it is imported."""

    label: str
    """The entry point's name, or the part before ``=`` in the variable."""

    reference: str
    """``module:attr``."""

    place: str
    """The distribution or variable that registers it."""

    def __str__(self) -> str:
        return f"{self.label}={self.reference} from {self.place}"

    def load(self) -> dict[str, Any]:
        """Import the attribute and, if it is callable, call it.

        Returns:
            The registered configs by slug, unchecked.

        Raises:
            ValueError: the reference is not of the form ``module:attr``.
            TypeError: the attribute cannot be registered.
            Exception: whatever the plug-in raises.
        """
        if not _REFERENCE.fullmatch(self.reference):
            raise ValueError(f"{self.place}: {self} is not of the form slug=module:attr.")
        value = EntryPoint(name=self.label, value=self.reference, group=GROUP).load()
        if callable(value):
            value = value()
        if is_runner_config(value):
            return {value.runner_name: value}
        if isinstance(value, Mapping):
            return dict(value)
        raise TypeError(
            f"{self.reference} must be a RunnerConfig, a mapping of them by runner_name, or a "
            f"function without arguments that returns either; got {type(value).__name__}."
        )


@dataclass(frozen=True)
class BrokenPlugin:
    """A registration that cannot be used."""

    slug: str
    """The slug if known, else the label."""

    source: Source
    error: BaseException


class Registry(dict[str, InstantiateConfig]):
    """Runner configs by slug, in the order of their registration; the first of a slug wins."""

    def __init__(self, sources: Iterable[Source]) -> None:
        super().__init__()
        self.broken: list[BrokenPlugin] = []
        """Registrations that cannot be used, with their errors."""
        self.collisions: dict[str, list[str]] = {}
        """Messages by slug: the origin that is used, and the one that it hides."""
        self._origins: dict[str, Source] = {}
        self._labels: dict[str, dict[str, InstantiateConfig]] = {}
        for source in sources:
            self._register(source)

    def origin(self, slug: str) -> Source:
        """The source that registered a slug."""
        return self._origins[slug]

    def resolve(self, name: str) -> InstantiateConfig:
        """The config of a slug, or of a label for one.

        Raises:
            ValueError: no such slug (the nearest and all are listed), or a label of several.
            PluginError: the plug-in is broken; its own error and traceback are the cause.
        """
        if name in self:
            return self[name]
        labelled = self._labels.get(name, {})
        if len(labelled) == 1:
            return next(iter(labelled.values()))
        for broken in self.broken:
            if name in (broken.slug, broken.source.label):
                kind = type(broken.error).__name__
                raise PluginError(
                    f"the plug-in {broken.slug!r} ({broken.source}) is broken: "
                    f"{kind}: {broken.error}"
                ) from broken.error
        if labelled:
            raise ValueError(
                f"{name!r} registers several runners: {', '.join(labelled)}. Choose one."
            )
        raise ValueError(unknown_name(name, self, f"slug {name!r}", "slugs"))

    def _register(self, source: Source) -> None:
        try:
            loaded = source.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.broken.append(BrokenPlugin(source.label, source, error))
            return
        for slug, config in loaded.items():
            try:
                _check(slug, config)
            except (TypeError, ValueError) as error:
                self.broken.append(BrokenPlugin(str(slug), source, error))
                continue
            self._labels.setdefault(source.label, {}).setdefault(slug, config)
            if slug not in self:
                self[slug] = config
                self._origins[slug] = source
            elif config is not self[slug]:
                self._collide(slug, source)

    def _collide(self, slug: str, source: Source) -> None:
        text = f"slug {slug!r} of {source} is hidden by {self._origins[slug]}, which comes first"
        if source.label not in (slug, self._origins[slug].label):
            text += f"; {source.label!r} still names it"
        self.collisions.setdefault(slug, []).append(text)


def discover() -> Registry:
    """Load every registered runner config.

    The items of ``FLASHDREAMS_RUNNER_CONFIGS`` come first, so they hide installed slugs of the same
    name, and after them entry points in the order of their distributions' names and then their own.
    Modules that the variable names may be in the working directory. A plug-in that fails is in
    ``Registry.broken``; nothing is raised.
    """
    return Registry([*_from_variable(os.environ.get(VARIABLE, "")), *_installed()])


def is_runner_config(value: Any) -> bool:
    """Whether a value can be registered: a config with a ``runner_name``."""
    return isinstance(value, InstantiateConfig) and hasattr(value, "runner_name")


def _installed() -> list[Source]:
    found = []
    for point in entry_points(group=GROUP):
        name = point.dist.name if point.dist else ""
        found.append(Source(point.name, point.value, f"the package {name}"))
    return sorted(found, key=lambda source: (source.place, source.label))


def _from_variable(text: str) -> list[Source]:
    sources = []
    for item in filter(None, map(str.strip, text.split(","))):
        label, _, reference = item.partition("=")
        sources.append(Source(label.strip(), reference.strip(), VARIABLE))
    if sources:
        with contextlib.suppress(FileNotFoundError):
            if not {"", os.getcwd()} & set(sys.path):
                sys.path.append(os.getcwd())
    return sources


def _check(slug: Any, config: Any) -> None:
    if not is_runner_config(config):
        raise TypeError(f"{slug!r} must be a RunnerConfig, got {type(config).__name__}.")
    name: Any = config.runner_name
    if slug != name:
        raise ValueError(f"the key {slug!r} must equal the config's runner_name {name!r}.")
    check_slug(name)
