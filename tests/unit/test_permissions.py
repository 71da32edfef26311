"""Folders and files that a user may not search, read or write."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from flashdreams.infra.diffusion.given import load_initial_latent
from flashdreams.infra.prompt import load_prompt_embeds
from flashdreams.infra.recorder import claimed_output
from flashdreams.infra.resumable import ResumableRun
from flashdreams.infra.stored_choices import read_choices
from flashdreams.parallel.environment import Launch
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, ensure_local
from flashdreams.runtime.files import readable_write_errors
from flashdreams.serving.restart import SessionFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "setresuid"), reason="needs Unix permissions")
pytest.importorskip("matplotlib")  # before root's rights go, with which it may be found
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of this process, which loses root's rights for the test."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        if is_root:
            os.chown(name, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, 0)
        try:
            yield Path(name)
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
            for path in (Path(name), *Path(name).rglob("*")):
                path.chmod(0o700)


@pytest.fixture
def closed(folder: Path) -> Path:
    """A file in a folder that may not be searched."""
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0)
    return folder / "closed" / "x.safetensors"


def _resume(path: Path) -> None:
    ResumableRun(path.parent, Launch("", 0), every=0, kept=1, resume=True)


READERS: list[tuple[type[Exception], Callable[[Path], object]]] = [
    (CheckpointError, lambda path: ensure_local(CheckpointConfig(source=str(path)))),
    (CheckpointError, lambda path: ensure_local(CheckpointConfig(source=str(path.parent)))),
    (CheckpointError, load_prompt_embeds),
    (ValueError, read_choices),
    (ValueError, _resume),
]


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_a_folder_that_may_not_be_searched_is_one_line(
    kind: type[Exception], read: Callable[[Path], object], closed: Path
) -> None:
    with pytest.raises(kind, match=r"closed.* cannot be read: Permission denied"):
        read(closed)


def test_latents_that_may_not_be_read_are_not_called_missing(folder: Path) -> None:
    path = folder / "x.safetensors"
    path.touch(mode=0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        load_initial_latent(path, (1, 1, 1, 1, 1), "--initial-latent", 1)


@pytest.mark.parametrize("name", ["log_toy.jsonl", "toy.partial.mp4", "toy.mp4"])
def test_a_file_of_the_run_that_may_not_be_written_is_refused(name: str, folder: Path) -> None:
    config = SimpleNamespace(output_dir=folder, runner_name="toy", trace=None)
    (folder / name).touch(mode=0o444)
    refused = pytest.raises(ValueError, match=f"{name}, .*, is not writable. Remove it")
    with refused, claimed_output(config):
        pass
    (folder / name).chmod(0o644)
    with claimed_output(config):
        assert (folder / ".toy.lock").exists()


def test_a_download_to_a_folder_that_may_not_be_written_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(folder / "weights"))
    weights = CheckpointConfig(
        source="https://localhost/x.safetensors", sha256="0" * 64, download=True
    )
    folder.chmod(0o500)
    with pytest.raises(CheckpointError, match=f"{folder} is not writable. Set TORCH_HOME"):
        ensure_local(weights)


def test_an_output_folder_that_is_closed_during_the_run_is_one_line(closed: Path) -> None:
    said = r"x\.safetensors could not be written: Permission denied\. Choose another directory"
    with pytest.raises(OSError, match=said), readable_write_errors(closed, closed):
        closed.open("xb")


def test_a_folder_of_sessions_that_may_not_be_written_is_refused(closed: Path) -> None:
    with pytest.raises(ValueError, match=r"--state-dir .*closed.* be written: Permission denied"):
        SessionFolder(closed, None)


def test_a_session_that_may_not_be_read_does_not_keep_a_server_from_starting(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "a-session-of-another-user").mkdir(mode=0)
    assert SessionFolder(folder, None).find() == []
    assert "A session cannot be continued: [Errno 13] Permission denied" in caplog.text


class _NoCache:
    """Stands for matplotlib where neither the home nor a temporary folder is writable."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "matplotlib":
            raise OSError("Matplotlib requires access to a writable cache directory")


def test_a_video_without_any_folder_for_a_cache_is_refused_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(output_dir=tmp_path, runner_name="toy", trace=None)
    with claimed_output(config):
        pass  # negative control
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_NoCache(), *sys.meta_path])
    with pytest.raises(ValueError, match="Set MPLCONFIGDIR to one"), claimed_output(config):
        pass
