"""The code for browsers in the reference of the protocol, in a headless browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.architecture.sources import ROOT
from tests.unit.serving.fake_host import FakeHost
from tests.unit.serving.plain_client import web

pytestmark = pytest.mark.slow
pytest.importorskip("aiortc", reason="pip install 'flashdreams[webrtc]'")

BEFORE = """async () => {
  const video = document.body.appendChild(document.createElement('video'));
  video.muted = video.autoplay = true;
  const told = [], shown = [], types = [];
  const note = (now, {rtpTimestamp, width, height}) => {
    shown.push({rtpTimestamp, width, height});
    video.requestVideoFrameCallback(note);
  };
  video.requestVideoFrameCallback(note);
  let end;
  const over = new Promise((resolve) => { end = resolve; });
  const handle = (message) => {
    types.push(message.type);
    if (message.type === 'video.chunk_metadata') told.push(message.media_timestamp);
  };
"""
AFTER = """
  channel.onclose = end;
  const enough = setInterval(() => {
    if (shown.length < 20 || channel.readyState !== 'open') return;
    clearInterval(enough);
    channel.send(JSON.stringify({type: 'session.stop'}));
  }, 100);
  setTimeout(end, 60_000);
  await over;
  return {told, shown, types};
}"""
"""The time is for a hang; twenty pictures take a second."""


def documented_code() -> str:
    page = (ROOT / "docs/source/reference/serving_api.md").read_text("utf-8")
    (code,) = re.findall(r"^```js\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return code


def test_the_documented_code_shows_the_pictures_of_a_session(browser: Any) -> None:
    with web(FakeHost(fps=20.0, width=128, height=96)) as server:
        tab = browser.new_page()
        tab.goto(server.url + "healthz")
        found = tab.evaluate(BEFORE + documented_code() + AFTER)
        tab.close()
    assert len(found["shown"]) >= 20 and found["types"][-1] == "session.done"
    assert {(each["width"], each["height"]) for each in found["shown"]} == {(128, 96)}
    # one origin explains all timestamps, to within the tick that encoders of aiortc round by
    ticks = [each["rtpTimestamp"] - found["shown"][0]["rtpTimestamp"] for each in found["shown"]]
    near = {told + rounding for told in found["told"] for rounding in (-1, 0, 1)}
    assert any({tick % 2**32 + told for tick in ticks} <= near for told in found["told"])
