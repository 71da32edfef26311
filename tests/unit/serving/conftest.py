from pathlib import Path

import pytest

from tests.live import toy_runner


@pytest.fixture(scope="package")
def runner(tmp_path_factory: pytest.TempPathFactory):
    """The toy world, loaded once."""
    runner = toy_runner(tmp_path_factory.mktemp("served"))
    yield runner
    runner._output.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a server's snapshots."""
    return tmp_path / "sessions"
