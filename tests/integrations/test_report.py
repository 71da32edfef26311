"""What a run leaves for people to look at, and for programs to collect."""

import base64
import io
import json
import logging
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from flashdreams.parallel import logs
from flashdreams.parallel.environment import Environment
from flashdreams.runtime.run_report import MAX_POINTS, write_report

RUN = [sys.executable, "-m", "flashdreams.run", "toy-world", "--total-blocks", "3"]


def alone() -> Environment:
    return Environment(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Page(HTMLParser):
    """Texts of headings and figures, and addresses of everything that is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.mark.slow
def test_a_run_writes_a_page_with_its_figures_and_frames(tmp_path):
    done = subprocess.run(
        [*RUN, "--report", "True", "--output-dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "report_toy-world.html"
    assert str(path) in done.stdout
    page = Page(path.read_text())
    assert {"toy-world", "AR steps", "3", "First and last frame", "Memory"} <= set(page.texts)
    pictures = [address for address in page.loaded if address.startswith("data:image/png")]
    assert len(pictures) == 2
    for address in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert picture.size == (384, 384)
    assert all(address.startswith(("data:", "#")) for address in page.loaded)


@pytest.mark.slow
def test_a_run_that_is_not_asked_writes_no_page(tmp_path):
    subprocess.run([*RUN, "--output-dir", str(tmp_path)], check=True, capture_output=True)
    assert not list(tmp_path.glob("*.html"))


def test_a_page_without_a_video_and_of_many_steps(tmp_path):
    """Three times as many steps as a plot shows; text that looks like markup stays text."""
    header = {"runner_name": "<b>x</b>", "world_size": 2, "collectives": {}, "slowest_rank": 1}
    header["p50_ms_by_rank"] = [3.0, 4.0]
    row = {"total_ms": 2.0, "diffuse_ms": 1.5, "frames": 1}
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"header": header, "records": [row] * (3 * MAX_POINTS)}))
    write_report(tmp_path / "page.html", stats, "a=1", None)
    text = (tmp_path / "page.html").read_text()
    assert "<b>x</b>" not in text and len(text) < 400_000
    assert {"1", "4.0", "(slowest)"} <= {word for t in Page(text).texts for word in t.split()}


def test_log_lines_as_json_name_rank_and_error(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logs.set_up_logging(alone(), as_json=True)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("flashdreams.somewhere").exception("a line\nand another")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert (found["level"], found["rank"], found["message"]) == ("ERROR", 0, "a line\nand another")
    assert "ValueError: broken" in found["error"] and found["time"].endswith("+00:00")


@pytest.mark.parametrize(("lasts_s", "lines"), [(0.2, 2), (0.0, 0)])
def test_a_phase_is_announced_while_it_lasts(monkeypatch, caplog, lasts_s, lines):
    monkeypatch.setattr(logs, "QUIET_S", 0.05)
    level = caplog.at_level(logging.INFO, "flashdreams")
    with level, logs.announced("loading weights", alone()):
        time.sleep(lasts_s)
    assert len(caplog.messages) == lines
