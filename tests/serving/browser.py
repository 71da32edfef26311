"""Headless Chromium for tests of the page: where it is, and what a page shows."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (
    ["apt-get", "update", "-q"],
    ["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"],
)
READY_MS = 60_000
COUNT_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const {value, startTime, sources} of list.getEntries()) {
    const names = sources.map(({node}) => node?.id || node?.className || node?.nodeName);
    window.shifts.push([value, Math.round(startTime), names.join(' ')]);
  }
}).observe({type: 'layout-shift', buffered: true});
"""

PICTURE = """() => {
  const shown = document.querySelector('#stage > :is(canvas, video):not([hidden])');
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [256, 256];
  copy.getContext('2d').drawImage(shown, 0, 0, 256, 256);
  return copy.toDataURL('image/png');
}"""


def find_chromium() -> str:
    """A Chromium on the path, installed if need be; the test is skipped if there is none."""
    pytest.importorskip("playwright", reason="comes with: pip install -e '.[test]'")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        try:
            for command in INSTALL:
                subprocess.run(command, check=True, capture_output=True, timeout=240)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"Chromium cannot be installed here: {error}")
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs Chromium on the path: apt-get install chromium")
    return found


@contextmanager
def started() -> Iterator[Any]:
    """A browser."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A tab with the page of a live session; complaints of the browser are collected."""

    def __init__(
        self, browser: Any, address: str, width: int = 1280, height: int = 800, scheme: str = "dark"
    ) -> None:
        is_phone = width < 600
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            is_mobile=is_phone,
            has_touch=is_phone,
            accept_downloads=True,
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(COUNT_SHIFTS)
        self.page.goto(address)

    def _on_console(self, message: Any) -> None:
        # What a server that is away answers is no mistake of the page.
        if message.type in ("error", "warning") and "net::ERR" not in message.text:
            self.complaints.append(message.text)

    def wait(self, state: str, timeout_ms: int = READY_MS) -> None:
        """Until the status line says so; the error tells what it says instead."""
        try:
            self.page.wait_for_selector(f'#status[data-state="{state}"]', timeout=timeout_ms)
        except Exception as error:
            told = self.page.inner_text("#status"), self.page.inner_text("#messages")
            raise AssertionError(f"not {state}, but {told}; {self.complaints}") from error

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.page.inner_text(selector))

    def figure(self, name: str) -> float:
        """The number of a live figure."""
        return float(self.text(f"#{name}").split()[0].replace("\N{EN DASH}", "nan"))

    def focus(self) -> None:
        """Give the stage the focus."""
        self.page.locator("#stage").focus()

    def hold(self, key: str, ms: int) -> None:
        """Hold a key for so long."""
        self.focus()
        self.page.keyboard.down(key)
        self.page.wait_for_timeout(ms)
        self.page.keyboard.up(key)

    def rest(self, ms: int) -> None:
        """Let time pass."""
        self.page.wait_for_timeout(ms)

    def picture(self) -> np.ndarray:
        """What the stage shows: ``[64, 64, 3]``, from 0 to 1."""
        png = base64.b64decode(self.page.evaluate(PICTURE).partition(",")[2])
        image = Image.open(io.BytesIO(png)).convert("RGB").resize((64, 64), Image.Resampling.BOX)
        return np.asarray(image, dtype=np.float64) / 255

    def token(self) -> str:
        """The session's token, as the page remembers it."""
        script = "JSON.parse(sessionStorage.getItem('flashdreams-session')).token"
        return str(self.page.evaluate(script))

    def shot(self, name: str, folder: Path) -> Path:
        """Keep a picture of the whole page."""
        folder = Path(os.environ.get("FLASHDREAMS_SCREENSHOTS", folder))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        """Close the tab."""
        self.context.close()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two pictures, from 0 to 1."""
    return float(np.abs(one - other).mean())
