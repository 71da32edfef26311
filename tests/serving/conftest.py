"""A browser, a server and a tab for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashdreams.registry import VARIABLE
from tests.serving.browser import Tab, started
from tests.serving.live_server import LiveServer

STEERED = "steered-world=tests.serving.steered_world:RUNNER_CONFIGS"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: Playwright leaves an event loop running in this thread until it is closed."""
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(["toy-world"], tmp_path_factory.mktemp("toy"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def steered_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("steered")
    server = LiveServer(["steered-world"], folder, **{VARIABLE: STEERED})
    yield server
    server.stop()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    return tmp_path / "screenshots"


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens tabs that are closed after the test; their sessions end, so that each has its room."""
    tabs: list[Tab] = []

    def open_tab(address: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, address, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()
