"""Names, shapes and types of every tensor of the public checkpoints, as compact text.

A line of ``tests/data/manifests/<name>.txt`` is ``name dtype shape``, the shape written ``2x3`` and
empty for a scalar; ``blocks.{0-29}.norm3.bias`` stands for thirty tensors. A line of
``keymap_<name>.txt`` is ``our name = other publisher's name``, both with the same braces.
"""

import json
import math
import re
import struct
from collections import defaultdict
from pathlib import Path

import torch

Manifest = dict[str, tuple[tuple[int, ...], str]]

FOLDER = Path(__file__).parent / "data" / "manifests"
_RANGE = re.compile(r"\{([\d,-]+)\}")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
}


def manifest_names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.txt") if not p.stem.startswith("keymap_"))


def load_manifest(name: str) -> Manifest:
    """Tensor name -> (shape, dtype such as ``float32``) of one public checkpoint."""
    manifest: Manifest = {}
    for line in _lines(name):
        pattern, dtype, *shape = line.split()
        sizes = tuple(map(int, shape[0].split("x"))) if shape else ()
        for expanded in _expand(pattern):
            manifest[expanded] = (sizes, dtype)
    return manifest


def load_keymap(name: str) -> dict[str, str]:
    """Name in the official checkpoint -> name in another publisher's."""
    pairs = {}
    for line in _lines(f"keymap_{name}"):
        ours, theirs = line.split(" = ")
        pairs.update(zip(_expand(ours), _expand(theirs), strict=True))
    return pairs


def fold_manifest(manifest: Manifest) -> str:
    """The text of a manifest: tensors that differ in their first number share a line."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for name, (shape, dtype) in manifest.items():
        before, number, after = _split(name)
        rest = f"{dtype} {'x'.join(map(str, shape))}".strip()
        groups[before, after if number else "", rest].append(int(number or -1))
    lines = []
    for (before, after, rest), numbers in groups.items():
        lines.append(f"{before}{_braces(numbers)}{after} {rest}")
    return "\n".join(lines) + "\n"


def fold_keymap(keymap: dict[str, str]) -> str:
    """The text of a key map; both names carry the same number where they carry one."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for ours, theirs in keymap.items():
        before, number, after = _split(ours)
        other_before, other_number, other_after = _split(theirs)
        if number and number == other_number:
            groups[before, after, other_before, other_after].append(int(number))
        else:
            groups[ours, "", theirs, ""] = [-1]
    lines = []
    for (before, after, other_before, other_after), numbers in groups.items():
        braces = _braces(numbers)
        lines.append(f"{before}{braces}{after} = {other_before}{braces}{other_after}")
    return "\n".join(lines) + "\n"


def write_sparse_safetensors(path: Path, manifest: Manifest) -> None:
    """A safetensors file of zeros that takes next to no space on disk."""
    header, end = {}, 0
    for name, (shape, dtype) in manifest.items():
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def zero_state_dict(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Zeros of the right names, shapes and types that share one element each: cheap to pickle."""
    return {
        name: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for name, (shape, dtype) in manifest.items()
    }


def _lines(stem: str) -> list[str]:
    path = FOLDER / f"{stem}.txt"
    if not path.is_file():
        raise KeyError(f"no manifest {stem!r}; there are: {', '.join(manifest_names())}")
    return path.read_text().splitlines()


def _split(name: str) -> tuple[str, str, str]:
    found = _NUMBER.search(name)
    if found is None:
        return name, "", ""
    return name[: found.start()], found[0], name[found.end() :]


def _braces(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return "" if numbers == [-1] else str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = (str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return "{" + ",".join(texts) + "}"


def _expand(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers: list[int] = []
    for run in found[1].split(","):
        first, _, last = run.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return [f"{before}{number}{after}" for number in numbers]
