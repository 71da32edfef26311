"""Access to the golden numbers of the models' official code, where a machine has them."""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "FLASHDREAMS_GOLDENS_DIR"
CASES = 139
"""Test cases that read golden numbers. Whoever adds or removes one changes it."""

_readers: set[str] = set()


def golden_path(folder: str, file: str) -> Path:
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} is not set: golden numbers are not on this machine")
    path = Path(root) / folder / file
    if not path.is_file():
        pytest.fail(f"{VARIABLE} is set, but {path} is missing.")
    _readers.add(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
    return path


def load_golden(folder: str, file: str) -> dict[str, "Tensor"]:
    from safetensors.torch import load_file

    return load_file(golden_path(folder, file))


def golden_config(folder: str) -> dict:
    return json.loads(golden_path(folder, "config.json").read_text())


class GoldenCases:
    """Pytest plugin: a run of all tests fails unless all golden cases have run and passed.

    A run of all tests is one whose command line selects nothing, like that of ``.ci/run``.
    """

    HARMLESS = frozenset({"-q", "-v", "-s", "-x"})
    """Arguments that select nothing; ``PYTEST_ADDOPTS`` is not looked at."""
    MARK = ("reads golden numbers", True)
    """A property of the report of such a case, which reaches the process that counts."""

    def __init__(self, cases: int = CASES) -> None:
        self.cases = cases
        self.passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if item.nodeid in _readers:
            report.user_properties.append(self.MARK)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and self.MARK in report.user_properties:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a worker of pytest-xdist has run a part; the process that started it counts
        selects = not self.HARMLESS.issuperset(session.config.invocation_params.args)
        if selects or session.exitstatus != pytest.ExitCode.OK or not os.environ.get(VARIABLE):
            return
        if len(self.passed) != self.cases:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            session.config.get_terminal_writer().line(
                f"\n{len(self.passed)} golden cases have run and passed, not {self.cases}. Were "
                "some skipped? If cases were added or removed, change CASES in tests/goldens.py.",
                red=True,
            )
