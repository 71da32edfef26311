"""Statistics of a run: checksums, memory and the file that contains them."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from torch import Tensor

from flashdreams.runtime.files import OutputGuard, give_name, open_owned, open_partial, write_whole

BYTES_PER_GIB = 2**30
_HOST_SHORTAGE = re.compile(r"DefaultCPUAllocator: can't allocate memory|bad_alloc|out of memory")


class StatsWriter:
    """The stats of a run: first as lines, ``{"header": ..., "records": [...]}`` at its end.

    ``<name>.partial.jsonl`` begins with the header; every further line is one record, written at
    once, so that a process that is killed leaves them. `finish` makes ``<name>.json`` of them.
    """

    def __init__(self, path: str | Path, header: Callable[[], Mapping[str, Any]]) -> None:
        """Prepare, without writing.

        Args:
            path: the final file, ``.json``; its directory is made where it does not exist.
            header: returns the header; called at the first record and at the end.
        """
        self.path = Path(path)
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial.jsonl")
        self._header = header
        self._lines: BinaryIO | None = None
        self._guard: OutputGuard
        self._count = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, as one line.

        Raises:
            ValueError: a value is NaN or infinite, which JSON cannot hold; it names the place.
            TypeError: a value that JSON cannot represent, e.g. a tensor.
            OSError: the line cannot be written.
        """
        line = _to_json(record, f"records[{self._count}]")
        if self._lines is None:
            opened = open_partial(self.path, ".partial.jsonl")
            self._lines, self.partial_path, self.path = opened
            self._guard = OutputGuard(self.partial_path)
            self._lines.write(_to_json(self._header(), "header") + b"\n")
        self._guard.check()
        self._lines.write(line + b"\n")
        self._lines.flush()
        self._count += 1

    def resume(self, count: int) -> None:
        """Continue after the first records of the partial file; later ones are deleted.

        Raises:
            ValueError: it has fewer.
            OSError: it cannot be read or written.
        """
        lines = self.partial_path.read_bytes().splitlines(keepends=True)[: count + 1]
        if len(lines) <= count or not lines[-1].endswith(b"\n"):
            raise ValueError(f"{self.partial_path} has fewer than {count} records.")
        # Never empty in between: a process that is killed here is to be continued as well.
        self._lines = open_owned(self.partial_path, keep=sum(map(len, lines)))
        self._guard = OutputGuard(self.partial_path)
        self._count = count

    def finish(self) -> None:
        """Write the final file, whole or not at all, and remove the one with the lines.

        Raises:
            ValueError: a value of the header is NaN or infinite.
            OSError: the file cannot be written; the lines are left.
        """
        try:  # the lines stay open, and so this writer's, until the end
            self.write()
            if self._lines is not None:
                give_name(self._lines, self.partial_path, None)
        finally:
            self.close()

    def write(self) -> None:
        """Write the final file with the records so far, whole or not at all; leave the lines.

        Raises:
            As `finish`.
        """
        header = _to_json(self._header(), "header", indent=2).replace(b"\n", b"\n  ")
        with write_whole(self.path) as file:
            file.write(b'{\n  "header": ' + header + b',\n  "records": [')
            if self._lines is not None:
                self._copy_records(file)
            file.write(b"\n  ]\n}\n")

    def close(self) -> None:
        """Close the file with the lines and leave it."""
        if self._lines is not None:
            with suppress(OSError):  # what a full disk did not take is lost, and reported before
                self._lines.close()

    def _copy_records(self, file: BinaryIO) -> None:
        """A line at a time: a long run has more records than fit into memory."""
        with self.partial_path.open("rb") as lines:
            next(lines)  # the header, as it was at the begin
            for index, line in enumerate(lines):
                file.write((b"," if index else b"") + b"\n    " + line.rstrip(b"\n"))


def sha256_of(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's values in row-major order, as the raw bytes of its type.

    Neither shape nor type enters the checksum; a tensor on another device is copied to the host,
    which waits for it.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def memory_stats(device: torch.device | str) -> dict[str, float]:
    """Memory in GiB, under names that begin with ``mem_``.

    Returns:
        On CUDA ``mem_allocated_gib`` (live tensors now), ``mem_reserved_gib`` (held by PyTorch's
        allocator now) and ``mem_peak_gib`` (most ever allocated). On a CPU ``mem_peak_gib``, the
        largest resident size of this process so far; empty where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return {
            "mem_allocated_gib": torch.cuda.memory_allocated(device) / BYTES_PER_GIB,
            "mem_reserved_gib": torch.cuda.memory_reserved(device) / BYTES_PER_GIB,
            "mem_peak_gib": torch.cuda.max_memory_allocated(device) / BYTES_PER_GIB,
        }
    if sys.platform == "win32":
        return {"mem_peak_gib": psutil.Process().memory_info().peak_wset / BYTES_PER_GIB}
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
    return {"mem_peak_gib": peak / BYTES_PER_GIB}


def free_bytes(device: torch.device | str) -> int:
    """Bytes that may still be allocated on a device.

    On CUDA the driver's free memory plus the allocator's unused memory; on a CPU the memory that
    the system can give out without swapping.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no type of its own for the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_HOST_SHORTAGE.search(str(error)))


def _to_json(value: Mapping[str, Any], path: str, indent: int | None = None) -> bytes:
    _refuse_non_finite(value, path)
    return json.dumps(dict(value), indent=indent, allow_nan=False).encode()


def _refuse_non_finite(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, which JSON cannot represent; use null (None).")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_non_finite(item, f"{path}[{index}]")
