"""Small and large, dark and light, by keyboard and for screen readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import Tab
from tests.serving.live_server import LiveServer

pytestmark = pytest.mark.slow

CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if ((colour[3] ?? 1) > 0.7) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !node.checkVisibility()) continue;
    if (node.closest('#stage, :disabled, .skip, noscript')) continue;
    const [one, two] = [light(numbers(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) low.push(`${text}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
"""Texts whose contrast is below 4.5, with it (WCAG 2.2, 1.4.3)."""

NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, [tabindex]')]
  .filter((node) => node.checkVisibility())
  .filter((node) => !(node.ariaLabel || node.innerText?.trim() || node.labels?.length))
  .map((node) => node.outerHTML)"""

SMALL = """() => [...document.querySelectorAll('button, input:not([type=file]), select, summary')]
  .filter((node) => node.checkVisibility())
  .map((node) => [node.id || node.className, node.getBoundingClientRect()])
  .filter(([, box]) => box.width < 24 || box.height < 20)
  .map(([name, box]) => `${name} ${box.width}x${box.height}`)"""

OUTSIDE = """() => [...document.querySelectorAll('.pad, #actions button')]
  .filter((node) => node.checkVisibility())
  .filter((node) => {
    const [box, view] = [node, node.closest('#view')].map((one) => one.getBoundingClientRect());
    return box.left < view.left || box.right > view.right;
  })
  .map((node) => node.textContent)"""
"""Pads and buttons that stick out of the view."""


@pytest.mark.parametrize("width, height, scheme", [(1280, 800, "dark"), (390, 844, "light")])
def test_readable_and_whole(
    open_tab: Callable[..., Tab],
    steered_world: LiveServer,
    screenshots: Path,
    width: int,
    height: int,
    scheme: str,
) -> None:
    tab = open_tab(steered_world.address, width=width, height=height, scheme=scheme)
    tab.wait("ready")
    tab.hold("w", 400)
    tab.rest(2500)
    page = tab.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(SMALL) == []
    shifts = page.evaluate("window.shifts")
    assert sum(value for value, *_ in shifts) < 0.02, shifts
    stage = page.locator("#stage").bounding_box()
    assert stage["width"] == pytest.approx(stage["height"], abs=1), "the world's own shape"
    assert stage["width"] >= 0.4 * min(width, height)
    tab.shot(f"page-{width}-{scheme}", screenshots)
    page.locator("summary").click()
    page.locator("#opening").scroll_into_view_if_needed()
    tab.shot(f"page-{width}-{scheme}-opening", screenshots)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_grey_that_is_hard_to_read_is_found(browser: Any) -> None:
    """Negative control."""
    page = browser.new_page()
    page.set_content("<p style='color: #999; background: #fff'>grey</p>")
    assert page.evaluate(CONTRAST) == ["grey: 2.85"]
    page.close()


def test_everything_is_reached_by_keyboard_and_nothing_holds_the_focus(
    open_tab: Callable[..., Tab], steered_world: LiveServer
) -> None:
    tab = open_tab(steered_world.address)
    tab.wait("ready")
    page = tab.page
    wanted = set(
        page.evaluate(
            """[...document.querySelectorAll('button, input, select, textarea, summary, #stage')]
            .filter((node) => node.checkVisibility() && !node.disabled)
            .map((node) => node.dataset.name = node.id || node.innerText)"""
        )
    )
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    reached = set()
    for _ in range(len(wanted) + 8):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.dataset.name ?? ''")
        reached.add(name)
        if name and name != "stage":
            ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid", f"{name} does not show its focus"
    assert wanted <= reached
    tab.focus()
    for key in ("w", "ArrowLeft", "Tab"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.id") != "stage", "Tab leaves the world"


def test_a_pad_is_held_by_keyboard(open_tab: Callable[..., Tab], steered_world: LiveServer) -> None:
    tab = open_tab(steered_world.address)
    tab.wait("ready")
    pad = tab.page.get_by_role("button", name="w: forward")
    pad.focus()
    tab.page.keyboard.down(" ")
    assert pad.get_attribute("aria-pressed") == "true"
    tab.page.keyboard.up(" ")
    assert pad.get_attribute("aria-pressed") == "false"


def test_fingers_hold_pads_and_drag_the_view(
    open_tab: Callable[..., Tab], steered_world: LiveServer
) -> None:
    tab = open_tab(steered_world.address, width=390, height=844)
    tab.wait("ready")
    pad = tab.page.get_by_role("button", name="w: forward")
    box = pad.bounding_box()
    session = tab.context.new_cdp_session(tab.page)
    point = {"x": box["x"] + 10, "y": box["y"] + 10}
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    tab.rest(100)
    assert pad.get_attribute("aria-pressed") == "true"
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    tab.rest(100)
    assert pad.get_attribute("aria-pressed") == "false"
    stage = tab.page.locator("#stage").bounding_box()
    before = tab.page.evaluate("scrollY")
    for kind, dy in (("touchStart", 0), ("touchMove", -40), ("touchMove", -90)):
        point = {"x": stage["x"] + 150, "y": stage["y"] + 200 + dy}
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert tab.page.evaluate("scrollY") == before, (
        "a finger on the picture looks, it does not scroll"
    )


def test_pads_and_buttons_stay_beside_one_another_at_any_width(
    open_tab: Callable[..., Tab], steered_world: LiveServer
) -> None:
    tab = open_tab(steered_world.address)
    tab.wait("ready")
    for width in (700, 900, 1000, 1179, 1180, 1280):
        tab.page.set_viewport_size({"width": width, "height": 760})
        assert tab.page.evaluate(OUTSIDE) == [], width
    tab.page.locator("#pause").evaluate(
        "(node) => node.style.minWidth = '2000px'"
    )  # negative control
    assert tab.page.evaluate(OUTSIDE)
