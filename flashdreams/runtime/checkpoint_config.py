"""Old location of `flashdreams.runtime.checkpoint`; will be removed in 0.3."""

import warnings

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError

__all__ = ["CheckpointConfig", "CheckpointError"]

warnings.warn(
    f"{__name__} moved to flashdreams.runtime.checkpoint; this name will be removed in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
