"""Golden cases cannot get lost where the golden numbers are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tests.goldens import VARIABLE

TESTS = """
import pytest
from tests.goldens import golden_path

@pytest.mark.parametrize("case", ["a", "b"])
def test_case(case):
    golden_path("folder", "file")

def test_without_goldens():
    pass
"""
CONFTEST = """
from tests.goldens import GoldenCases

def pytest_configure(config):
    config.pluginmanager.register(GoldenCases(2))
"""


def run_pytest(
    folder: Path, tests: str, *arguments: str, goldens: bool = True, options: str = ""
) -> tuple[int, str]:
    """Exit code and output of a run over some tests, of which two cases read golden numbers."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    outer = (VARIABLE, "PYTEST_ADDOPTS", "PYTEST_XDIST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTEST_ADDOPTS"] = options
    if goldens:
        environment[VARIABLE] = str(folder)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


WORKERS = "-p xdist.plugin -n 2 --dist loadgroup"
"""Two processes, of which each runs a part."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    return tmp_path


def test_a_whole_run_with_all_golden_cases_passes(folder: Path) -> None:
    assert run_pytest(folder, TESTS)[0] == 0
    assert run_pytest(folder, TESTS, goldens=False)[0] == 0, "skipped where there are none"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('["a", "b"]', '["a"]', 1),
        ('["a", "b"]', '["a", "b", "c"]', 3),
        ('"file")', '"file")\n    if case == "b": pytest.skip()', 1),
        ('    golden_path("folder", "file")', "    pytest.skip()", 0),
        ("import pytest", 'import pytest\npytest.importorskip("absent")', 0),
    ],
)
def test_a_whole_run_with_other_cases_fails(folder: Path, old: str, new: str, found: int) -> None:
    """Negative control."""
    other = TESTS.replace(old, new)
    keep = "\ndef test_other(): pass\n"
    (folder / "test_more.py").write_text(keep)
    code, output = run_pytest(folder, other)
    assert code == 1 and f"{found} golden cases have run and passed, not 2" in output
    assert run_pytest(folder, other, "-k", "case or without or other")[0] == 0, "not all tests"


def test_the_cases_of_all_workers_are_counted_together(folder: Path) -> None:
    pytest.importorskip("xdist")
    code, output = run_pytest(folder, TESTS, options=WORKERS)
    assert code == 0 and "created: 2/2 workers" in output
    code, output = run_pytest(folder, TESTS.replace('["a", "b"]', '["a"]'), options=WORKERS)
    assert code == 1 and "1 golden cases have run and passed, not 2" in output
    code, output = run_pytest(folder, TESTS, options=WORKERS, goldens=False)
    assert code == 0 and "1 passed, 2 skipped" in output


def test_a_golden_file_that_is_missing_is_a_failure(folder: Path) -> None:
    (folder / "folder" / "file").unlink()
    code, output = run_pytest(folder, TESTS)
    assert code == 1 and "2 failed, 1 passed" in output and "is missing" in output


def test_ci_runs_all_tests_with_the_goldens() -> None:
    """Behind an argument to pytest the golden cases would not be counted."""
    assert f"export {VARIABLE}" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text().splitlines()
    (command,) = [line for line in readme if line.startswith("pip install -e '.[test]'")]
    assert command.endswith("&& python -m pytest")
