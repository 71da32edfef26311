"""A run where the system renames and removes no file that is open, as Windows does."""

import os
import types
from pathlib import Path

import pytest

from flashdreams import run
from flashdreams.integrations.toy_world import config
from flashdreams.runtime import files

pytestmark = [
    pytest.mark.skipif(
        not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
        reason="needs the toy world's weights",
    ),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc"),
]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were open when they should have been renamed or removed."""
    found: list[str] = []

    def refusing(inner):
        def call(path, *arguments, **options):
            for entry in Path("/proc/self/fd").iterdir():
                if entry.exists() and os.path.exists(path) and entry.samefile(path):
                    found.append(os.path.basename(path))
                    raise PermissionError(13, "it is used by another process", str(path))
            return inner(path, *arguments, **options)

        return call

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return found


def result(folder: Path) -> int:
    options = ["--total-blocks", "3", "--device", "cpu", "--save-latents", "True"]
    return run.main(["toy-world", *options, "--output-dir", str(folder)])


def test_all_files_get_their_names(tmp_path: Path, monkeypatch, refused: list[str]) -> None:
    monkeypatch.setattr(files, "sys", types.SimpleNamespace(platform="win32"))
    assert result(tmp_path) == 0
    assert {path.suffix for path in tmp_path.iterdir()} >= {".mp4", ".json", ".safetensors"}
    assert not list(tmp_path.glob("*.partial*"))
    assert set(refused) <= {".toy-world.lock"}, "stays open, and is left where it cannot be removed"


def test_elsewhere_a_file_stays_its_owners_until_it_has_its_name(
    tmp_path: Path, refused: list[str]
) -> None:
    """The negative control."""
    assert result(tmp_path) == 1
    assert refused
