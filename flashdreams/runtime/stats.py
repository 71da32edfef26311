"""Statistics of a run: checksums, memory and the file that holds them."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BYTES_PER_GIB = 2**30


def write_stats(
    path: str | Path, header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``{"header": ..., "records": [...]}`` as JSON, whole or not at all.

    The file is written beside its place and then moved there, so a run that fails leaves what was
    there before.

    Args:
        path: the file; its directory is made where it does not exist.
        header: what holds for the run.
        records: one per AR step.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold; the text names its place.
        TypeError: a value that JSON does not know, e.g. a tensor.
        OSError: the file cannot be written.
    """
    content = {"header": dict(header), "records": [dict(record) for record in records]}
    _refuse_non_finite(content, "")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    try:
        import resource
    except ImportError:
        return {}
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
    return {"mem_peak_gib": peak / BYTES_PER_GIB}


def _refuse_non_finite(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, which JSON cannot hold; use null (None) instead.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_non_finite(item, f"{path}[{index}]")
