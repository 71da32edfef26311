"""The header of a snapshot: the contents of a saved rollout's files, checked before use."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flashdreams.infra.fingerprint import differences
from flashdreams.runtime.parts import PartFile
from flashdreams.runtime.region import Region, intersect, region_shape
from flashdreams.runtime.text import reason_of

SNAPSHOT_FORMAT = 1
"""Number of the form of the files; another one is refused."""

HEADER_NAME = "snapshot.json"
_PART_NAME = re.compile(r"part-\d{5}\.safetensors")
_MAX_DIMS = 16
_TYPES = {
    "format": int, "name": str, "config": dict, "weights": dict, "fingerprint": dict,
    "autoregressive_index": int, "light": bool, "log": list, "run": dict, "values": dict,
}  # fmt: skip


class SnapshotError(ValueError):
    """A snapshot is damaged, of another method, or of a newer release; nothing was loaded."""


@dataclass(frozen=True)
class StoredSlice:
    """The part of a tensor in one file, under the tensor's path."""

    file: str
    region: Region


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the whole model and the slices that make it up."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[StoredSlice, ...]


@dataclass(frozen=True, kw_only=True)
class SnapshotHeader:
    """The metadata of a snapshot; JSON values, except ``tensors`` and ``parts``."""

    name: str
    """Of the pipeline."""
    config: Mapping[str, Any]
    """From `flashdreams.infra.identity.describe_config`."""
    weights: Mapping[str, str]
    """From `flashdreams.infra.identity.hash_weights`."""
    fingerprint: Mapping[str, Any]
    """Of the numerics."""
    autoregressive_index: int
    """The AR step that comes next."""
    seed: int | None
    """Of the noise; None for a noise callable."""
    light: bool
    """KV caches are omitted and recomputed from the clean latents."""
    log: list[Any] = field(default_factory=list)
    """Commands of the session, oldest first."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Data for the program that saved it."""
    values: Mapping[str, Any]
    """The state's values, as `flashdreams.infra.state.StateEncoder` gives them."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """By path."""
    parts: tuple[PartFile, ...] = ()
    """The files."""

    def to_bytes(self) -> bytes:
        """The header as a file, with its checksum."""
        content = {
            "format": SNAPSHOT_FORMAT,
            **{f.name: getattr(self, f.name) for f in fields(self)},
        }
        content["parts"] = [asdict(part) for part in self.parts]
        content["tensors"] = {
            path: [list(t.shape), t.dtype, [_slice_to_json(s) for s in t.slices]]
            for path, t in self.tensors.items()
        }
        return _sealed(content)


def read_header(folder: Path) -> SnapshotHeader:
    """The header of a snapshot, after checks for completeness and consistency.

    Raises:
        SnapshotError: it is missing, damaged or of another format.
    """
    path = folder / HEADER_NAME
    if os.path.exists(path) and not path.is_file():  # reading a pipe would block
        raise SnapshotError(f"{folder} is not a snapshot: {HEADER_NAME} is not a file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(
            f"{folder} is not a snapshot: {HEADER_NAME} cannot be read ({reason_of(error)}). Name "
            "a folder that pipeline.save has written."
        ) from error
    try:
        content = json.loads(data)["content"]
        if _sealed(content) != data:
            raise ValueError("its checksum does not match")
        if content["format"] != SNAPSHOT_FORMAT:
            raise SnapshotError(
                f"{folder} has snapshot format {content['format']}; this release reads format "
                f"{SNAPSHOT_FORMAT}. Load it with the release that saved it."
            )
        return _from_json(content)
    except SnapshotError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path} is damaged ({error}). Use another snapshot.") from error


def check_identity(header: SnapshotHeader, config: Mapping[str, Any], weights: Mapping[str, str],
                   folder: Path) -> None:  # fmt: skip
    """Refuse a snapshot of another method or of other weights.

    Raises:
        SnapshotError: names what differs.
    """
    for what, theirs, ours in (
        ("config", header.config, config),
        ("weights", header.weights, weights),
    ):
        found = differences(dict(theirs), dict(ours))
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise SnapshotError(
                f"{folder} was saved with another {what}: {'; '.join(found[:5])}{more}. "
                "Load it with the method that saved it."
            )


def _sealed(content: Any) -> bytes:
    """The bytes of a header file; any other bytes are refused."""
    text = _dump(content)
    return b'{"content":%b,"sha256":"%b"}\n' % (text, hashlib.sha256(text).hexdigest().encode())


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _slice_to_json(stored: StoredSlice) -> list[Any]:
    return [stored.file, [[r.start, r.stop, r.step] for r in stored.region]]


def _from_json(content: dict[str, Any]) -> SnapshotHeader:
    for name, kind in _TYPES.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} is {content[name]!r:.40}, which is not a {kind.__name__}")
    index, seed, values = content["autoregressive_index"], content["seed"], content["values"]
    if index < 0 or (values["next_index"], values["seed"]) != (index, seed):
        raise ValueError("its values are of another AR step or seed than it states")
    parts = tuple(PartFile(**part) for part in content["parts"])
    for part in parts:
        if not _PART_NAME.fullmatch(part.file):
            raise ValueError(f"{part.file!r} is not the name of a part")
    names = {part.file for part in parts}
    tensors = {path: _tensor(path, entry, names) for path, entry in content["tensors"].items()}
    plain = {f.name: content[f.name] for f in fields(SnapshotHeader)}
    return SnapshotHeader(**(plain | {"parts": parts, "tensors": tensors}))


def _tensor(path: str, entry: Any, files: set[str]) -> StoredTensor:
    """A tensor whose slices cover it, each entry once."""
    shape, dtype, listed = tuple(entry[0]), str(entry[1]), entry[2]
    slices = []
    for file, bounds in listed:
        region = tuple(range(*map(int, bound)) for bound in bounds)
        inside = all(
            r.step > 0 and r.start >= 0 and (not r or r[-1] < size)
            for r, size in zip(region, shape, strict=True)
        )
        if not inside or file not in files or len(shape) > _MAX_DIMS:
            raise ValueError(f"a slice of {path} is out of its bounds")
        slices.append(StoredSlice(file, region))
    stored = sum(math.prod(region_shape(s.region)) for s in slices)
    twice = any(
        intersect(a.region, b.region) for i, a in enumerate(slices) for b in slices[:i] if shape
    )
    if stored != math.prod(shape) or twice:
        raise ValueError(f"the slices of {path} do not cover it")
    return StoredTensor(shape, dtype, tuple(slices))
