"""Tensors in a safetensors file, written and read one at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
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

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


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
        names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
        header = safetensors_header({e.name: (names[e.dtype], e.shape, e.nbytes) for e in entries})
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


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The head of a safetensors file whose tensors follow in order.

    Args:
        tensors: type in the format's words, shape and bytes of each, by name.

    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    described, offset = {}, 0
    for name, (kind, shape, nbytes) in tensors.items():
        place = [offset, offset + nbytes]
        described[name] = {"dtype": kind, "shape": list(shape), "data_offsets": place}
        offset += nbytes
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
