"""A disk that is full, for one file."""

from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import pytest

needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no /dev/full"
)


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """Let what a module opens again under a name be a device without space."""
    original = module.open_partial  # type: ignore[attr-defined]

    def open_partial(path: Path, suffix: str) -> tuple[BinaryIO, Path, Path]:
        partial = path.with_name(f"{path.stem}{suffix}")
        if partial.name != name:
            return original(path, suffix)
        partial.symlink_to("/dev/full")
        return partial.open("wb"), partial, path

    monkeypatch.setattr(module, "open_partial", open_partial)
