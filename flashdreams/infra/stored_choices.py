"""Numerics choices of an earlier run, reused instead of measured."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashdreams.attention.backends import BACKENDS, why_unusable
from flashdreams.attention.choose import AUTO
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.snapshot_header import read_header
from flashdreams.parallel.mesh import Mesh
from flashdreams.runtime.text import check_regular, reason_of, shown

MAX_LINE_BYTES = 2**25
"""Longest line of a log; the first one has a config and, for a served session, an image."""


@dataclass(frozen=True)
class StoredAttention:
    """The attention of an earlier run."""

    name: str
    """Of the backend."""
    processors: int | None = None
    """Multiprocessors for which its KV splits were chosen; None reads the device."""


def find_attention(
    stored: Mapping[str, Any], transformer: Transformer, mesh: Mesh, device: torch.device
) -> tuple[StoredAttention | None, list[str]]:
    """The attention of an earlier run, if it can be used here.

    Args:
        stored: numerics fingerprint of that run.
        transformer: that will run it.
        mesh: the ranks.
        device: where it runs.

    Returns:
        What to use, None to choose again; and a line for a choice that is not used.
    """
    name, shape = stored.get("attention_backend"), transformer.attention_shape(1)
    asked = transformer.config.attention_backend
    if not isinstance(name, str) or shape is None:
        return None, []
    if name == asked and mesh.config.strict:
        return None, []
    if asked not in (AUTO, name):
        reason = f"the config sets {asked}"
    elif name not in BACKENDS:
        reason = "no backend of this release has that name"
    elif mesh.config.strict:
        reason = "strict ranks take the first backend whose bits do not depend on the ranks"
    elif mesh.config.context_backend == "xfuser" and mesh.sequence.size > 1:
        reason = "xfuser brings its own attention"
    else:
        reason = why_unusable(name, device, transformer.dtype, shape.head_dim) or ""
    if reason:
        return None, [f"attention_backend {shown(name)} is not used: {reason}"]
    processors = stored.get("attention_processors")
    return StoredAttention(name, processors if isinstance(processors, int) else None), []


def read_choices(path: Path) -> Mapping[str, Any]:
    """The numerics fingerprint in a log of a run or in a snapshot.

    Args:
        path: ``log_<slug>.jsonl``, or the folder of a snapshot.

    Raises:
        ValueError: it is neither.
    """
    if os.path.isdir(path):  # unlike path.is_dir(), never an error
        return read_header(path).fingerprint
    try:
        check_regular(path)
        with path.open("rb") as file:
            found = json.loads(file.readline(MAX_LINE_BYTES))["fingerprint"]
        if not isinstance(found, dict):
            raise TypeError("its fingerprint is not a mapping")
    except OSError as error:
        raise ValueError(f"--numerics-from {path} cannot be read: {reason_of(error)}.") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--numerics-from {path} is neither a log of a run (log_<slug>.jsonl) nor the folder "
            "of a snapshot. Use one of these, or omit the option."
        ) from error
    return found
