"""Mapping of tensor names from a file to a module, and reports of mismatches."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashdreams.infra.config import quoted
from flashdreams.runtime.checkpoint.config import CheckpointConfig, CheckpointError
from flashdreams.runtime.text import shown

_LISTED = 10
_COMPARED = 5000
_COMPARED_LENGTH = 200

KNOWN_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Prefixes that other programs put before the names of a diffusion transformer."""

OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
"""Prefixes of the other networks in a file of a whole ComfyUI pipeline."""


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Naming scheme of another publisher of the same network.

    A module offers its maps as the attribute ``checkpoint_key_maps``; the first whose ``marker``
    occurs in a file is applied.
    """

    name: str
    """For reports: ``diffusers``, ``transformers``, ..."""

    marker: str
    """Regular expression; a tensor name that it matches at the start identifies the publisher."""

    rename: tuple[tuple[str, str], ...]
    """Pairs of regular expression and replacement, applied in order to every tensor name."""

    ignore: tuple[str, ...] = ()
    """Regular expressions of tensor names (after renaming) that the module does not need."""


@dataclass(frozen=True, kw_only=True)
class NameMatch:
    """Tensor names of a file under the names that a module uses."""

    file_names: dict[str, str]
    """Module's name to the file's name."""

    key_map: str | None
    """Name of the `KeyMap` that was applied."""

    prefix: str = ""
    """The one of ``KNOWN_PREFIXES`` that was found and dropped."""


def map_names(
    names: Iterable[str],
    config: CheckpointConfig,
    key_maps: Sequence[KeyMap] = (),
    wanted: Iterable[str] = (),
) -> NameMatch:
    """Translate the tensor names of a file by the rules of a config and of a detected key map.

    Args:
        names: tensor names as the file holds them, after ``select``.
        config: gives ``drop``, ``strip_prefixes``, ``rename`` and ``ignore``, applied first.
        key_maps: other naming schemes that are recognised by their marker.
        wanted: names of the module; one of ``KNOWN_PREFIXES`` is dropped if more of them are found
            without it.

    Raises:
        CheckpointError: two tensors of the file end up with one name.
    """
    unwrapped = {name: _unwrap(name, config) for name in names}
    prefixes = [p for p in KNOWN_PREFIXES if any(n.startswith(p) for n in unwrapped.values())]
    known = set(wanted) if prefixes else set()

    def found(prefix: str) -> int:
        translated, _ = _translate(unwrapped, prefix, config, key_maps)
        return len(known.intersection(translated.values()))

    prefix = max(["", *prefixes], key=found) if known else ""  # the first of equals
    plain, key_map = _translate(unwrapped, prefix, config, key_maps)
    ignore = config.ignore + (key_map.ignore if key_map is not None else ())
    ignored = [re.compile(pattern) for pattern in ignore]
    file_names: dict[str, str] = {}
    for name, mapped in plain.items():
        if any(pattern.match(mapped) for pattern in ignored):
            continue
        if prefix == KNOWN_PREFIXES[0] and mapped.startswith(OTHER_PARTS):
            continue
        if mapped in file_names:
            raise CheckpointError(
                f"checkpoint {config.source}: tensors {quoted(file_names[mapped])} and "
                f"{quoted(name)} would both be {quoted(mapped)}; correct strip_prefixes, drop or "
                "rename"
            )
        file_names[mapped] = name
    return NameMatch(
        file_names=file_names, key_map=key_map.name if key_map else None, prefix=prefix
    )


def _translate(
    unwrapped: Mapping[str, str],
    prefix: str,
    config: CheckpointConfig,
    key_maps: Sequence[KeyMap],
) -> tuple[dict[str, str], KeyMap | None]:
    """Apply a prefix, the config's pairs and the key map that then fits."""
    plain = {n: rename(x.removeprefix(prefix), config.rename) for n, x in unwrapped.items()}
    key_map = _detect(plain.values(), key_maps)
    if key_map is not None:
        plain = {name: rename(mapped, key_map.rename) for name, mapped in plain.items()}
    return plain, key_map


def _unwrap(name: str, config: CheckpointConfig) -> str:
    for part in config.drop:
        name = name.replace(part, "")
    for prefix in config.strip_prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Apply pairs of regular expression and replacement, in order."""
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def _detect(names: Iterable[str], key_maps: Sequence[KeyMap]) -> KeyMap | None:
    known = list(names)
    for key_map in key_maps:
        marker = re.compile(key_map.marker)
        if any(marker.match(name) for name in known):
            return key_map
    return None


def describe_mismatch(
    missing: Sequence[str],
    unexpected: Sequence[str],
    misfits: Mapping[str, str],
    *,
    wanted: Iterable[str],
    present: Iterable[str],
) -> str:
    """List mismatches: the first ten of each kind, a count, and the nearest names.

    Args:
        missing: names that the module has and the file does not.
        unexpected: names that the file has and the module does not.
        misfits: name to what is wrong with its shape or type.
        wanted: all names of the module.
        present: all names of the file, translated.
    """
    lines = []
    if missing:
        nearest = _nearest(missing, list(unexpected) or list(present))
        lines.append(_listing("missing in the file", nearest, len(missing)))
    if unexpected:
        nearest = _nearest(unexpected, list(missing) or list(wanted))
        lines.append(_listing("unexpected in the file", nearest, len(unexpected)))
    if misfits:
        listed = [f"{shown(name)} {wrong}" for name, wrong in list(misfits.items())[:_LISTED]]
        lines.append(_listing("of another shape or type", listed, len(misfits)))
    return "\n".join(lines)


def _listing(title: str, listed: Sequence[str], count: int) -> str:
    rest = [f"... and {count - len(listed)} more"] if count > len(listed) else []
    return "\n    ".join([f"  {count} {title}:", *listed, *rest])


def _nearest(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Append to each of the first ten names the candidate that resembles it most."""
    if len(candidates) > _COMPARED:  # the comparison takes time with each
        return [shown(name) for name in names[:_LISTED]]
    close: list[str] = []
    lines = []
    for name in names[:_LISTED]:
        # It also takes time with the square of a name's length.
        if len(name) <= _COMPARED_LENGTH:
            alike = [other for other in candidates if len(other) <= _COMPARED_LENGTH]
            close = difflib.get_close_matches(name, alike, n=1, cutoff=0.5)
        lines.append(f"{shown(name)} (nearest: {shown(close[0])})" if close else shown(name))
        close = []
    return lines
