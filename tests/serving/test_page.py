"""The page with the real server and the toy world, in a headless browser.

Pictures are compared as 64x64 pixels from 0 to 1 by their mean absolute difference. While the
camera rests the toy world's pictures differ by less than ``REST``, and after half a second of
walking by more than ``MOVED``.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
from PIL import Image

from tests.serving.browser import Tab, difference
from tests.serving.live_server import LiveServer

pytestmark = pytest.mark.slow
REST = 0.012
MOVED = 0.02
OpenTab = Callable[..., Tab]


@pytest.fixture
def tab(open_tab: OpenTab, toy_world: LiveServer) -> Tab:
    tab = open_tab(toy_world.address)
    tab.wait("ready")
    tab.rest(800)
    return tab


def test_holding_a_key_moves_the_world_and_nothing_else_does(tab: Tab) -> None:
    first = tab.picture()
    tab.rest(1000)
    assert difference(first, tab.picture()) < REST
    tab.page.locator("#prompt").focus()
    tab.page.keyboard.type("w")
    tab.rest(1000)
    assert difference(first, tab.picture()) < REST, "keys belong to the box that has the focus"
    tab.hold("w", 1200)
    tab.rest(800)
    assert difference(first, tab.picture()) > MOVED
    walked = tab.picture()
    tab.rest(1000)
    assert difference(walked, tab.picture()) < REST, "the key was let go"


def test_keys_steer_before_anything_was_clicked(tab: Tab) -> None:
    first = tab.picture()
    tab.page.keyboard.down("w")
    tab.rest(1200)
    tab.page.keyboard.up("w")
    assert difference(first, tab.picture()) > MOVED


def test_arrow_keys_and_pads_turn(tab: Tab) -> None:
    first = tab.picture()
    tab.hold("ArrowRight", 800)
    tab.rest(800)
    turned = tab.picture()
    assert difference(first, turned) > MOVED
    pad = tab.page.locator(".pad", has_text="turn left")
    pad.hover()
    tab.page.mouse.down()
    tab.rest(200)
    assert pad.get_attribute("aria-pressed") == "true"
    tab.rest(600)
    tab.page.mouse.up()
    tab.rest(800)
    assert pad.get_attribute("aria-pressed") == "false"
    assert difference(turned, tab.picture()) > MOVED


def test_a_prompt_changes_the_world_and_a_bad_one_says_why(tab: Tab) -> None:
    first = tab.picture()
    tab.page.fill("#prompt", "night sky, red floor, red north wall, red east wall, red pillars")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("#prompt-help:has-text('Applied in chunk')")
    tab.rest(1500)
    assert difference(first, tab.picture()) > 2 * MOVED
    tab.page.fill("#prompt", "plaid floor")
    tab.page.click("#prompt-apply")
    tab.page.wait_for_selector(".message.error")
    assert "plaid" in tab.text("#messages")
    assert tab.text("#prompt-help") == "Not applied."
    assert tab.text("#status") == "READY"
    tab.page.fill("#prompt", "red floor")
    tab.page.click("#prompt-apply")
    tab.page.wait_for_selector(".message.error", state="detached", timeout=10_000)


def test_moments_are_kept_and_gone_back_to(tab: Tab) -> None:
    first = tab.picture()
    for kind, name in (("save", "gate"), ("fork", "second")):
        tab.page.fill("#moment-name", name)
        tab.page.click(f"#{kind}")
        tab.page.wait_for_selector(f"#moments-list li:has-text('{name}')")
    for name in ("gate", "second"):
        tab.hold("w", 1000)
        tab.rest(500)
        assert difference(first, tab.picture()) > MOVED
        tab.page.click(f"[aria-label='Rewind to {name}']")
        tab.page.wait_for_selector(f".message:has-text('Rewound to “{name}”')")
        tab.rest(1200)
        assert difference(first, tab.picture()) < REST
    tab.hold("w", 1000)
    tab.page.click("#reset")
    tab.rest(1500)
    assert difference(first, tab.picture()) < MOVED


def test_a_recording_is_a_video_of_what_was_shown(tab: Tab) -> None:
    tab.page.click("#record")
    tab.hold("w", 2500)
    with tab.page.expect_download() as download:
        tab.page.click("#record")
    with av.open(str(download.value.path())) as file:
        frames = list(file.decode(video=0))
        times = [float(frame.pts * frame.time_base) for frame in frames]
    assert len(frames) >= 8
    assert times[0] == 0
    assert times == pytest.approx([count / 16 for count in range(len(times))], abs=1e-3)
    assert difference(
        frames[0].to_ndarray(format="rgb24") / 255, frames[-1].to_ndarray(format="rgb24") / 255
    ) > MOVED  # fmt: skip


def test_pause_and_stop_and_begin(tab: Tab) -> None:
    tab.page.click("#pause")
    tab.wait("paused")
    tab.rest(2500)
    assert tab.text("#status") == "Paused" and tab.figure("figure-fps") != 16
    tab.page.click("#pause")
    tab.wait("ready")
    token = tab.token()
    assert not tab.page.locator("#moments-list").evaluate("(list) => list.inert")
    tab.page.click("#stop")
    tab.wait("ended")
    assert tab.page.locator("#moments-list").evaluate("(list) => list.inert")
    tab.page.click("#begin")
    tab.wait("ready")
    assert tab.token() != token


PLAYERS_BEGUN_AGAIN = """async () => {
  const { CodecPlayer } = await import('./page/pictures.js');
  const { FilmPlayer } = await import('./page/film.js');
  const listener = { onShown() {}, onDropped() {}, onFailure() {} };
  const codec = 'avc1.42c01f', shown = [];
  const player = new CodecPlayer(document.createElement('canvas'), listener);
  player.playout.push = (picture, frame) => shown.push(frame);
  const give = (frame) => player.onPicture({ timestamp: frame, close() {} });
  player.begin({ codec, fps: 16 });
  [player.epoch, player.firstOfEpoch] = [1, 100];  // as a reset at frame 100 leaves it
  give(99);
  give(100);
  player.begin({ codec, fps: 16 });
  give(0);
  player.stop();
  const film = new FilmPlayer(document.createElement('video'), listener);
  film.seekTo = 6.25;
  film.begin({ codec, fps: 16 });
  film.stop();
  return [shown, film.seekTo ?? null];
}"""


def test_nothing_of_a_stream_before_holds_back_a_new_one(tab: Tab) -> None:
    """Pictures from before a reset are left out (frame 99), those of the next stream are shown."""
    assert tab.page.evaluate(PLAYERS_BEGUN_AGAIN) == [[100, 0], None]


def test_a_reload_goes_on_with_the_session(tab: Tab) -> None:
    tab.hold("w", 1200)
    tab.rest(800)
    token, walked = tab.token(), tab.picture()
    tab.page.reload()
    tab.wait("ready")
    tab.rest(800)
    assert tab.token() == token
    assert difference(walked, tab.picture()) < REST


@pytest.mark.parametrize("way", ["mse", "jpeg"])
def test_other_ways_to_show_video(open_tab: OpenTab, toy_world: LiveServer, way: str) -> None:
    tab = open_tab(f"{toy_world.address}?player={way}")
    tab.wait("ready")
    tab.rest(1500)
    first = tab.picture()
    tab.hold("w", 1200)
    tab.rest(1500)
    assert difference(first, tab.picture()) > MOVED
    assert tab.figure("figure-p50") > 0
    assert not tab.complaints


def test_a_new_session_begins_with_what_was_chosen(tab: Tab, tmp_path: Path) -> None:
    image = np.zeros((48, 96, 3), np.uint8)
    image[:, :, 0] = 220
    Image.fromarray(image).save(tmp_path / "red.png")
    token, first = tab.token(), tab.picture()
    tab.page.click("summary")
    tab.page.set_input_files("#first-frame", tmp_path / "red.png")
    tab.page.wait_for_selector("#first-frame-preview[src]")
    tab.page.fill("#opening-prompt", "night sky, red floor")
    tab.page.fill("#seed", "7")
    messages: list[str] = []
    tab.page.on(
        "websocket", lambda socket: socket.on("framesent", lambda text: messages.append(text))
    )
    tab.page.click("#opening-form button[type=submit]")
    tab.page.wait_for_selector("#prompt-help")
    tab.wait("ready")
    tab.rest(500)
    start = json.loads(messages[0])
    assert start["type"] == "session.start" and start["seed"] == 7
    assert start["prompt"] == "night sky, red floor" == tab.page.input_value("#prompt")
    sent = base64.b64decode(start["image_reference"]["image_url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (96, 48), "smaller than the world: not enlarged"
    assert tab.token() != token
    assert difference(first, tab.picture()) > MOVED


def test_a_tab_that_was_duplicated_begins_a_session_of_its_own(tab: Tab) -> None:
    with tab.context.expect_page() as opened:
        tab.page.evaluate("window.open(location.href)")  # takes the session's storage along
    other = opened.value
    other.wait_for_selector('#status[data-state="ready"]')
    script = "JSON.parse(sessionStorage.getItem('flashdreams-session')).token"
    assert other.evaluate(script) != tab.token()
    tab.rest(1500)
    assert tab.text("#status") == "READY"


def test_a_page_that_nobody_sees_pauses_its_session(tab: Tab) -> None:
    show = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.page.evaluate(show % "true" + tell)
    tab.wait("paused", 15_000)
    tab.page.evaluate(show % "false" + tell)
    tab.wait("ready")
    tab.hold("w", 500)


def test_figures_are_live(tab: Tab) -> None:
    for _ in range(5):
        tab.hold("w", 200)
        tab.rest(300)
    tab.rest(1500)
    assert 1 < tab.figure("figure-fps") < 40
    assert 0 < tab.figure("figure-p50") <= tab.figure("figure-p99")
    assert tab.figure("figure-chunk") > 0 and tab.figure("figure-memory") > 50
    assert tab.page.locator("#stage-list li").count() >= 2
    assert "session" in tab.text("#sharing")


def test_nothing_comes_from_outside_and_nothing_complains(tab: Tab, toy_world: LiveServer) -> None:
    hosts = {urlsplit(address).netloc for address in tab.requests if address.startswith("http")}
    assert hosts == {f"localhost:{toy_world.port}"}
    assert not tab.complaints


def test_a_script_in_the_page_is_not_run(tab: Tab) -> None:
    """Negative control of the policy that the page states."""
    tab.page.evaluate(
        """() => { const script = document.createElement('script');
        script.textContent = 'window.ran = true'; document.body.append(script); }"""
    )
    assert tab.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in tab.complaints)


def test_the_address_works_from_the_first_load_on(browser, tmp_path: Path) -> None:
    """A page that is opened while the model still loads says so and begins by itself."""
    server = LiveServer(["toy-world"], tmp_path)
    try:
        tab = Tab(browser, server.address)
        assert tab.text("#status") in ("Loading", "Warming up", "Connecting")
        tab.shot("loading", tmp_path)
        tab.wait("ready")
        tab.rest(1500)
        shifts = tab.page.evaluate("window.shifts")
        assert sum(value for value, *_ in shifts) < 0.02, shifts
        tab.close()
    finally:
        server.stop()
