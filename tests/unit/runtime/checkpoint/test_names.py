"""The names of the package: which of them import PyTorch, and the former place of two."""

import importlib
import subprocess
import sys

import pytest

from flashdreams.runtime import checkpoint
from tests.architecture.sources import ROOT


def _imports_torch(code: str) -> bool:
    command = [sys.executable, "-c", f"import sys; {code}; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_every_listed_name_is_there_and_no_other() -> None:
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
    with pytest.raises(AttributeError, match="no attribute 'open_tensor'"):
        checkpoint.open_tensor  # noqa: B018


@pytest.mark.slow
def test_a_config_is_read_without_pytorch() -> None:
    package = "from flashdreams.runtime.checkpoint"
    assert not _imports_torch(f"{package}.config import CheckpointError")
    assert not _imports_torch(f"{package} import CheckpointConfig, KeyMap, find_local")
    assert _imports_torch(f"{package} import load_checkpoint")  # negative control


def test_the_former_place_of_the_config_warns() -> None:
    sys.modules.pop("flashdreams.runtime.checkpoint_config", None)
    with pytest.warns(DeprecationWarning, match=r"moved to flashdreams\.runtime\.checkpoint; "):
        former = importlib.import_module("flashdreams.runtime.checkpoint_config")
    assert former.CheckpointConfig is checkpoint.CheckpointConfig
    assert former.CheckpointError is checkpoint.CheckpointError
