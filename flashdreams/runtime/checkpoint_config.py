"""The former place of what is now in `flashdreams.runtime.checkpoint`; goes in 0.3."""

import warnings

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError

__all__ = ["CheckpointConfig", "CheckpointError"]

warnings.warn(
    f"{__name__} moved to flashdreams.runtime.checkpoint; this name goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
