"""Tensors in a safetensors file, written and read one at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashdreams.runtime.checkpoint.read import SAFETENSORS_DTYPES, SafetensorsStore
from flashdreams.runtime.checkpoint.source import LocalCheckpoint

BLOCK_BYTES = 2**24
"""Most that is read at once to compute a checksum."""
SMALL_BYTES = 2**20
"""A tensor of fewer bytes is written before another thread would have begun its checksum."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives the tensor, on any device; called once, in the order of the file."""


@dataclass(frozen=True)
class PartFile:
    """A file that was written."""

    file: str
    """Its name."""
    bytes: int
    sha256: str
    """Of the whole file, 64 hex digits."""


def write_part(path: Path, entries: Sequence[Entry]) -> PartFile:
    """Write tensors and wait until the disk has them.

    Host memory holds one tensor at a time. Its checksum is computed while it is written.

    Args:
        path: a file that does not exist.
        entries: the tensors, with different names.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor of another shape or type than was announced.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file, ThreadPoolExecutor(1, "checksum") as thread:
        header = _header(entries)
        digest.update(header)
        size += file.write(header)
        for entry in entries:
            data = _bytes_of(entry)
            if len(data) < SMALL_BYTES:
                digest.update(data)
                size += file.write(data)
            else:
                hashed = thread.submit(digest.update, data)
                size += file.write(data)
                hashed.result()
            del data  # before the next tensor is read
        file.flush()
        os.fsync(file.fileno())
    return PartFile(path.name, size, digest.hexdigest())


def read_part(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as read-only views of the mapped file, to be copied.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    store = SafetensorsStore(LocalCheckpoint(files=(path,)))
    return dict(store.read(dict.fromkeys(store.infos)))


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read a block at a time."""
    digest, block = hashlib.sha256(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder, where the system can say so."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(entries: Sequence[Entry]) -> bytes:
    """The head of a safetensors file.

    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    described, offset = {}, 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        described[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(entry: Entry) -> memoryview:
    x = entry.read().detach()
    if (tuple(x.shape), x.dtype) != (entry.shape, entry.dtype):
        raise ValueError(
            f"{entry.name} was announced as {entry.dtype} {list(entry.shape)} and is {x.dtype} "
            f"{list(x.shape)}."
        )
    return x.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
