"""Several tabs, a queue, and a server that dies and comes back."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.browser import Tab, difference
from tests.serving.live_server import LiveServer
from tests.serving.test_page import MOVED, REST

pytestmark = pytest.mark.slow


def test_two_tabs_run_and_a_third_waits(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    server = LiveServer(["toy-world", "--max-sessions", "2"], tmp_path)
    try:
        tabs = [open_tab(server.address) for _ in range(2)]
        for tab in tabs:
            tab.wait("ready")
        first = [tab.picture() for tab in tabs]
        tabs[0].hold("w", 1500)
        tabs[0].rest(1000)
        assert difference(first[0], tabs[0].picture()) > MOVED
        assert difference(first[1], tabs[1].picture()) < REST, "the other world rests"
        tabs[0].page.wait_for_selector("#sharing:has-text('2 sessions share')")
        third = open_tab(f"{server.address}?player=mse")
        third.wait("queued")
        assert third.text("#status") == "Queued, position 1"
        third.shot("queued", tmp_path)
        tabs[1].page.click("#stop")
        third.wait("ready")
        assert not third.complaints
    finally:
        server.stop()


def test_the_address_with_the_token_lets_in(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    server = LiveServer(["toy-world", "--token", "0123456789abcdef0123456789abcdef"], tmp_path)
    try:
        outside = open_tab(server.address)
        outside.rest(3000)
        assert "READY" not in outside.page.inner_text("body")
        tab = open_tab(f"{server.address}?token=0123456789abcdef0123456789abcdef")
        tab.wait("ready")
        assert tab.page.url == server.address, "the token is not left in the address"
    finally:
        server.stop()


def test_a_killed_server_comes_back_with_the_session(
    open_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    flags = ["toy-world", "--snapshot-every", "1"]
    server = LiveServer(flags, tmp_path)
    try:
        tab = open_tab(server.address)
        tab.wait("ready")
        tab.rest(800)
        first = tab.picture()
        tab.hold("w", 1500)
        tab.rest(3500)
        token, walked = tab.token(), tab.picture()
        assert difference(first, walked) > MOVED
        server.kill()
        tab.wait("reconnecting")
        tab.shot("reconnecting", tmp_path)
        server = LiveServer(flags, tmp_path, port=server.port)
        tab.wait("ready")
        tab.rest(1200)
        assert tab.token() == token
        assert difference(walked, tab.picture()) < REST
        tab.hold("s", 1500)
        tab.rest(800)
        assert difference(walked, tab.picture()) > MOVED
    finally:
        server.stop()
