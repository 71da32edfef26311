"""Public checkpoints: where they are, how their names are read, how they fill a module."""

from typing import TYPE_CHECKING, Any

from flashdreams.runtime.checkpoint.config import (
    WRAPPER_MARKERS,
    CheckpointConfig,
    CheckpointError,
    LoRA,
    MissingWeightsError,
    concerning,
    parse_lora,
)
from flashdreams.runtime.checkpoint.keys import KeyMap
from flashdreams.runtime.checkpoint.source import (
    LocalCheckpoint,
    can_download,
    describe_missing,
    describe_size,
    ensure_local,
    find_local,
)

if TYPE_CHECKING:
    from flashdreams.runtime.checkpoint.load import LoadReport, load_checkpoint, merge_loras
    from flashdreams.runtime.checkpoint.read import TensorSlice

__all__ = [
    "WRAPPER_MARKERS",
    "CheckpointConfig",
    "CheckpointError",
    "KeyMap",
    "LoRA",
    "LoadReport",
    "LocalCheckpoint",
    "MissingWeightsError",
    "TensorSlice",
    "can_download",
    "concerning",
    "describe_missing",
    "describe_size",
    "ensure_local",
    "find_local",
    "load_checkpoint",
    "merge_loras",
    "parse_lora",
]

_NEED_PYTORCH = ("LoadReport", "TensorSlice", "load_checkpoint", "merge_loras")


def __getattr__(name: str) -> Any:
    """Import names that need PyTorch on first use: the command line needs only the rest."""
    if name not in _NEED_PYTORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashdreams.runtime.checkpoint import load

    return getattr(load, name)
