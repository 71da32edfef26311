"""A disk that is full, for one file."""

from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import pytest

needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no /dev/full"
)


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """Let what a module opens anew under a name be a device without space."""
    original = module.open_new  # type: ignore[attr-defined]

    def open_new(path: Path) -> BinaryIO:
        if path.name != name:
            return original(path)
        path.symlink_to("/dev/full")
        return path.open("wb")

    monkeypatch.setattr(module, "open_new", open_new)
