"""A plug-in's own keys, look, slider, switch, choice and text box, without code in the page."""

from collections.abc import Callable

import pytest

from tests.serving.browser import Tab, difference
from tests.serving.live_server import LiveServer
from tests.serving.test_page import MOVED, REST

pytestmark = pytest.mark.slow


@pytest.fixture
def tab(open_tab: Callable[..., Tab], steered_world: LiveServer) -> Tab:
    tab = open_tab(steered_world.address)
    tab.wait("ready")
    tab.rest(800)
    return tab


def test_all_that_the_controller_declares_is_drawn(tab: Tab) -> None:
    pads = tab.page.locator(".pad").all_inner_texts()
    assert sorted(text.split("\n")[-1] for text in pads) == ["back", "forward", "roll over"]
    names = {
        tab.page.get_by_role(role, name=name).count()
        for role, name in (
            ("slider", "Walking speed"),
            ("switch", "Frozen"),
            ("combobox", "Pace"),
            ("textbox", "Sign"),
            ("slider", "Look sensitivity"),
        )
    }
    assert names == {1}
    assert tab.text("#field-frozen-help") == "No key moves the camera."


def test_mouse_turns_the_view_by_dragging_and_by_pointer_lock(tab: Tab) -> None:
    page = tab.page
    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    first = tab.picture()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=6)
    page.mouse.up()
    tab.rest(1000)
    dragged = tab.picture()
    assert difference(first, dragged) > MOVED
    page.mouse.move(x - 100, y, steps=6)
    tab.rest(800)
    assert difference(dragged, tab.picture()) < REST, "the button was let go"
    page.mouse.click(x, y)
    tab.rest(500)
    if page.evaluate("document.pointerLockElement?.id") != "stage":
        pytest.skip("this browser gives no pointer lock here; dragging was tested")
    page.mouse.move(x - 150, y, steps=6)
    tab.rest(1000)
    assert difference(dragged, tab.picture()) > MOVED
    page.evaluate("document.exitPointerLock()")


def test_arrow_keys_look_where_no_key_turns(tab: Tab) -> None:
    first = tab.picture()
    tab.hold("ArrowLeft", 600)
    tab.rest(1000)
    assert difference(first, tab.picture()) > MOVED


def test_fields_act_on_the_world_and_survive_a_reload(tab: Tab) -> None:
    first = tab.picture()
    tab.page.check("#field-frozen")
    tab.hold("w", 1000)
    tab.rest(800)
    assert difference(first, tab.picture()) < REST, "frozen"
    tab.page.uncheck("#field-frozen")
    tab.page.locator("#field-speed").fill("4")
    tab.page.select_option("#field-pace", label="run")
    tab.page.fill("#field-sign", "inn")
    tab.hold("w", 500)
    tab.rest(800)
    assert difference(first, tab.picture()) > MOVED
    tab.page.reload()
    tab.wait("ready")
    assert tab.page.input_value("#field-speed") == "4"
    assert tab.page.input_value("#field-sign") == "inn"
    assert tab.page.locator("#field-pace option:checked").inner_text() == "run"


def test_what_the_controller_refuses_is_said_in_its_words(tab: Tab) -> None:
    tab.page.fill("#field-sign", "wrong")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector(".message.error")
    assert "is no inn" in tab.text("#messages")
    assert tab.text("#status") == "READY"
