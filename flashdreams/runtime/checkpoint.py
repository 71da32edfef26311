"""Strict loading of public checkpoints into modules, tensor by tensor."""

from flashdreams.runtime.checkpoint_config import (
    WRAPPER_MARKERS,
    CheckpointConfig,
    CheckpointError,
)

__all__ = ["WRAPPER_MARKERS", "CheckpointConfig", "CheckpointError"]
