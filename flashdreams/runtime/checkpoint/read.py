"""Tensors of checkpoint files, read by memory map."""

import contextlib
import json
import math
import mmap
import pickle
import re
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashdreams.infra.config import quoted
from flashdreams.runtime.checkpoint.config import CheckpointError
from flashdreams.runtime.checkpoint.pickles import HostileFile, check_pickle_file
from flashdreams.runtime.checkpoint.source import LocalCheckpoint
from flashdreams.runtime.text import printable, reason_of, shown

MAX_HEADER_BYTES = 2**24
"""Longest header of a safetensors file: some 100,000 tensors. The format allows 100 MB, which takes
gigabytes to read."""
MAX_NAME = 1000
"""Most characters of a tensor's name."""
MAX_DIMS = 16
"""Most dimensions of a tensor."""
_MAX_SIZE = 2**48  # of a dimension, and of all of a tensor in bytes
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in a safetensors file."""

_UNUSABLE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
"""Types of the format that hold parts of a quantized tensor, with the bits of a value."""

NO_TENSOR = "not a dense tensor with a name"
"""Why an entry of a pickle cannot be read."""


class TensorInfo(NamedTuple):
    """Metadata of one tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    """Place in the file, in bytes: tensors are read in this order."""

    refused: str | None = None
    """Why it cannot be read; ``None``: it can."""


class TensorSlice(NamedTuple):
    """Part of a tensor that one process needs: ``length`` entries of ``dim`` from ``start``.

    With several ``parts``, the dim is that many equal runs, and the slice is taken from each.
    """

    dim: int
    start: int
    length: int
    size: int | None = None
    """Entries of ``dim`` in the whole tensor, to be checked; ``None``: at least start + length."""
    parts: int = 1
    """Runs that ``dim`` is made of, such as queries, keys and values; ``start`` and ``length``
    count within each."""

    def of(self, x: Tensor) -> Tensor:
        """The part of the whole tensor; a view where there is one run."""
        if self.parts == 1:
            return x.narrow(self.dim, self.start, self.length)
        runs = x.unflatten(self.dim, (self.parts, -1)).narrow(self.dim + 1, self.start, self.length)
        return runs.flatten(self.dim, self.dim + 1)


def open_tensors(local: LocalCheckpoint, select: tuple[str, ...] = ()) -> "TensorStore":
    """Open a checkpoint and read only its headers.

    Args:
        local: its files.
        select: for ``.pt`` and ``.pth``, names of the sub-dictionary to take.

    Raises:
        CheckpointError: damaged, of an unknown kind, or a pickle that is not plain tensors.
    """
    suffix = local.files[0].suffix
    if suffix == ".safetensors":
        return SafetensorsStore(local)
    if suffix in (".pt", ".pth") and local.tensor_files is None:
        return PickleStore(local.files[0], select)
    raise CheckpointError(
        f"{local.files[0]} is not a known kind of checkpoint; allowed: .safetensors (also sharded, "
        "by its .safetensors.index.json), .pt, .pth"
    )


class SafetensorsStore:
    """Tensors of one safetensors file or of all shards of an index."""

    def __init__(self, local: LocalCheckpoint) -> None:
        headers = {path: read_header(path) for path in local.files}
        if local.tensor_files is None:
            self.infos = headers[local.files[0]]
            return
        self.infos = {}
        for name, path in local.tensor_files.items():
            if name not in headers[path]:
                raise CheckpointError(
                    f"{path}: the index places tensor {quoted(name)} in this shard, which does "
                    "not have it. Index and shard are from different versions: download both again"
                )
            self.infos[name] = headers[path][name]
        for path, header in headers.items():
            strays = [name for name in header if local.tensor_files.get(name, path) != path]
            if strays:
                names = ", ".join(map(shown, strays[:10]))
                raise CheckpointError(
                    f"{path}: the index places {len(strays)} of this shard's tensors elsewhere: "
                    f"{names}. Index and shard are from different versions: download both again"
                )
            beyond = {name: info for name, info in header.items() if name not in self.infos}
            self.infos |= beyond  # some indexes omit tensors

    def read(self, wanted: Mapping[str, TensorSlice | None]) -> Iterator[tuple[str, Tensor]]:
        """Yield the requested tensors file by file, in the order of the files.

        The mapping is read-only: unlike a private writable one, the kernel does not count it as
        memory, so a file may be larger than the machine's. Writing into a view would crash.
        """
        for path in sorted({self.infos[name].file for name in wanted}):
            names = [name for name in wanted if self.infos[name].file == path]
            names.sort(key=lambda name: self.infos[name].offset)
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be mapped: {reason_of(error)}") from error
            for name in names:
                part = wanted[name]
                tensor = _view(mapped, self.infos[name], part)
                yield name, tensor if part is None else part.of(tensor)


def _view(mapped: mmap.mmap, info: TensorInfo, part: TensorSlice | None) -> Tensor:
    """View one tensor in the mapped file, and let the kernel read ahead the requested part."""
    count = math.prod(info.shape)
    if count == 0:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    start, length = info.offset, count * info.dtype.itemsize
    if part is not None and part.dim == 0 and part.parts == 1:
        row = length // info.shape[0]
        start, length = start + part.start * row, part.length * row
    if sys.platform != "win32" and length > 0:
        page = start - start % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # a hint only
            mapped.madvise(mmap.MADV_WILLNEED, page, length + start - page)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.offset)
    return flat.view(info.shape)


class PickleStore:
    """Tensors of one ``.pt`` or ``.pth`` file, loaded as data only."""

    def __init__(self, path: Path, select: tuple[str, ...]) -> None:
        entries = _select(load_pickle(path), select, path)
        self._tensors = {str(name): value for name, value in entries.items()}
        size = path.stat().st_size
        for name, value in entries.items():
            if _is_plain(name, value):
                _refuse_inflated(path, size, name, value)
        self.infos = {
            str(name): TensorInfo(tuple(value.shape), value.dtype, path, position)
            if _is_plain(name, value)
            else TensorInfo((), torch.uint8, path, position, NO_TENSOR)
            for position, (name, value) in enumerate(entries.items())
        }

    def read(self, wanted: Mapping[str, TensorSlice | None]) -> Iterator[tuple[str, Tensor]]:
        """Yield the requested tensors in the order of the file's dictionary."""
        for name in sorted(wanted, key=lambda name: self.infos[name].offset):
            part = wanted[name]
            tensor = self._tensors[name]
            yield name, tensor if part is None else part.of(tensor)


TensorStore = SafetensorsStore | PickleStore
"""Tensors of an opened checkpoint."""


def _refuse_inflated(path: Path, file_bytes: int, name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose strides repeat a few numbers into more than the whole file."""
    claimed = tensor.numel() * tensor.element_size()
    if claimed > max(file_bytes, tensor.untyped_storage().nbytes()) or tensor.ndim > MAX_DIMS:
        raise CheckpointError(
            f"{path} is damaged: the tensor {shown(name)} of shape {quoted(list(tensor.shape))} "
            f"claims {claimed} bytes, the file has {file_bytes}"
        )


def _is_plain(name: object, value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return dense and isinstance(name, str)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        CheckpointError: not a safetensors file, damaged or truncated.

    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    try:
        actual = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise CheckpointError(
                    f"{path} is truncated: it has {actual} bytes, fewer than any safetensors file. "
                    "Download it again"
                )
            length = struct.unpack("<Q", first)[0]
            if length > min(MAX_HEADER_BYTES, actual - 8):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: its header needs {length} "
                    f"bytes, the file has {actual}. Download it again"
                )
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"it is {quoted(header)}, not a JSON object")
        header.pop("__metadata__", None)
        _check_names(header)
        places = {name: _info(path, 8 + length, entry) for name, entry in header.items()}
        promised = 8 + length
        for start, size in sorted((info.offset, size) for info, size in places.values()):
            if start != promised:
                raise ValueError("its tensors overlap, or leave a gap")
            promised += size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = printable(str(error), 300)
        raise CheckpointError(
            f"{path} is damaged: its safetensors header is invalid ({reason}). Download it again"
        ) from error
    if promised != actual:
        word = "truncated" if promised > actual else "damaged"
        raise CheckpointError(
            f"{path} is {word}: its header promises {promised} bytes, the file has {actual}. "
            "Download it again"
        )
    return {name: info for name, (info, _) in places.items()}


def _info(path: Path, base: int, entry: dict) -> tuple[TensorInfo, int]:
    """One entry of a header, and its bytes in the file."""
    kind = entry["dtype"]
    if kind not in SAFETENSORS_DTYPES and kind not in _UNUSABLE_BITS:
        known = ", ".join([*SAFETENSORS_DTYPES, *_UNUSABLE_BITS])
        if not isinstance(kind, str) or not kind.isidentifier() or len(kind) > 20:
            raise ValueError(f"dtype {quoted(kind)} is none of {known}")
        # The file is intact, so a new download would not help.
        raise CheckpointError(
            f"{path}: a tensor is of type {kind}, which is not supported; known: {known}. Use a "
            "file of these weights in one of them"
        )
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ValueError(f"the shape {quoted(shape)} is not a list of at most {MAX_DIMS} sizes")
    # Checked before they are multiplied: multiplying huge numbers can take unbounded time.
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in (*shape, start, end)):
        raise ValueError(f"the shape {quoted(shape)} at bytes {quoted([start, end])}")
    bits = _UNUSABLE_BITS.get(kind) or 8 * SAFETENSORS_DTYPES[kind].itemsize
    fits = 8 * (end - start) == math.prod(shape) * bits
    if not fits or math.prod(filter(None, shape)) > _MAX_SIZE:
        raise ValueError(f"{end - start} bytes for a tensor of shape {shape} and {kind}")
    refused = f"{kind} in the file, which cannot be read as numbers; use another version"
    dtype = SAFETENSORS_DTYPES.get(kind, torch.uint8)
    why = None if kind in SAFETENSORS_DTYPES else refused
    return TensorInfo(tuple(shape), dtype, path, base + start, why), end - start


def _check_names(header: dict) -> None:
    longest = max(map(len, header), default=0)
    if longest > MAX_NAME:
        raise ValueError(f"a tensor's name of {longest} characters; at most {MAX_NAME}")


def load_pickle(path: Path) -> object:
    """Load a ``.pt`` or ``.pth`` file as tensors, containers and numbers, nothing else.

    Files in torch's zip format are mapped, so that only what is read takes memory; the format of
    torch 1.5 and older is read whole.

    Raises:
        CheckpointError: truncated, damaged, or the pickle asks Python to run code; nothing of it
            has then been executed.
        MemoryError: the host has too little; PyTorch's own allocator raises RuntimeError.
    """
    try:
        check_pickle_file(path)
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*looks like a TorchScript archive")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, HostileFile) as error:
        reason = str(error)
        if not isinstance(error, HostileFile):
            found = re.search(r"GLOBAL ([\w.]{1,200})", reason)
            reason = "it holds more than plain tensors"
            if found:
                reason = f"it asks Python to run {found[1]}"
        raise CheckpointError(
            f"{path} was refused and nothing of it was executed: {reason}. "
            "Use a safetensors version of these weights"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    except Exception as error:  # damaged files raise all kinds of errors
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        if "weights_only" in str(error):  # torch advises to load these without it, which runs code
            reason = "is not a plain file of tensors (TorchScript, or older than torch 0.4)"
            advice = "Use a safetensors version of these weights"
        else:
            first = str(error).splitlines()[0] if str(error) else "it ends too early"
            first = printable(first, 300)
            reason, advice = f"is truncated or damaged: {first}", "Download it again"
        raise CheckpointError(f"{path} {reason}. {advice}") from error


def _select(content: object, select: tuple[str, ...], path: Path) -> dict:
    """Take the first sub-dictionary that ``select`` names, or the whole of a flat file."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; a dictionary of tensors is needed"
        )
    for name in select:
        if isinstance(content.get(name), dict):
            return content[name]
    nested = [shown(name) for name, value in content.items() if isinstance(value, dict)]
    if nested:
        wanted = f"none of {', '.join(select)} is in it" if select else "no name was given"
        raise CheckpointError(
            f"{path} holds several dictionaries: {', '.join(nested[:10])}; {wanted}. "
            "Choose with checkpoint.select"
        )
    return content
