"""The timeline of a run: all ranks, their stages and what these sent."""

import json

import pytest

from flashdreams.runtime.trace import thread_id
from tests.harness import run_engine

CLOCK_US = 1.0
"""What times in microseconds, as floating-point numbers, are off by."""

WORDS = ["self-forcing-tiny-random", "--total-blocks", "2"]


def run(tmp_path, ranks: int) -> tuple[dict, dict]:
    trace = tmp_path / "deep" / "trace.json"
    options = ["--trace", str(trace), "--output-dir", str(tmp_path)]
    run_engine(ranks, [*WORDS, *options], tmp_path / "said")
    assert str(trace) in (tmp_path / "said").read_text()
    stats = json.loads((tmp_path / "stats_self-forcing-tiny-random.json").read_text())
    return json.loads(trace.read_text()), stats["header"]


def check_chrome_format(trace: dict) -> None:
    """Every event is one that Chrome's trace format knows, and spans of a track are nested."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= event.keys() and event["ph"] in ("X", "M")
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            continue
        assert event["cat"] and event["ts"] >= 0 and event["dur"] >= 0
        span = (event["ts"], -event["dur"])
        tracks.setdefault((event["pid"], event["tid"]), []).append(span)
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert tracks.keys() <= named
    threads = [thread for _, thread in named]
    processes = {process for process, _ in named}
    assert len(set(threads)) == len(threads) and not processes & set(threads)  # as Perfetto wants
    for spans in tracks.values():
        ends: list[float] = []
        for start, negative in sorted(spans):
            while ends and ends[-1] <= start + CLOCK_US:
                ends.pop()
            assert not ends or start - negative <= ends[-1] + CLOCK_US
            ends.append(start - negative)


def test_spans_that_overlap_are_noticed():
    """Negative control of the check."""

    def span(ts: float, dur: float) -> dict:
        return {"name": "s", "cat": "stage", "ph": "X", "ts": ts, "dur": dur, "pid": 0, "tid": 9}

    track = {"name": "thread_name", "ph": "M", "pid": 0, "tid": 9, "args": {"name": "stages"}}
    check_chrome_format({"traceEvents": [track, span(0, 100), span(10, 50), span(200, 5)]})
    with pytest.raises(AssertionError):
        check_chrome_format({"traceEvents": [track, span(0, 100), span(50, 100)]})
    with pytest.raises(AssertionError):
        check_chrome_format({"traceEvents": [span(0, 100)]})
    with pytest.raises(AssertionError):  # two ranks with one thread
        check_chrome_format({"traceEvents": [track, {**track, "pid": 1}, span(0, 100)]})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_writes_a_timeline_of_all_ranks(tmp_path, ranks):
    trace, header = run(tmp_path, ranks)
    assert trace["displayTimeUnit"] == "ms"
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in trace["traceEvents"]} == set(range(ranks))
    for rank in range(ranks):
        own = [event for event in spans if event["pid"] == rank]
        names = [event["name"] for event in own]
        assert names.count("generate") == names.count("finalize") == 2 and "load" in names
        steps = [e["args"]["autoregressive_index"] for e in own if e["name"] == "generate"]
        assert steps == [0, 1]
        assert all(event["dur"] > 0 and event["ts"] >= 0 for event in own)
    check_chrome_format(trace)
    collectives = [e for e in spans if e["cat"] == "collective"]
    assert bool(collectives) == (ranks == 2)
    assert all(e["tid"] == thread_id(e["pid"], 1) for e in collectives)
    assert all(e["args"]["bytes_sent"] >= 0 for e in collectives)
    generated = [e for e in spans if e["name"] == "generate" and e["pid"] == 0]
    for stage in generated:  # the spans within a stage add up to what it says it sent
        within = [
            e for e in collectives
            if e["pid"] == 0 and stage["ts"] <= e["ts"] <= stage["ts"] + stage["dur"]
            and e["name"] == "ulysses.all_to_all"
        ]  # fmt: skip
        told = stage["args"].get("ulysses.all_to_all", {"calls": 0, "bytes_sent": 0})
        found = {"calls": len(within), "bytes_sent": sum(e["args"]["bytes_sent"] for e in within)}
        assert found == told
    sent = [e["args"] for e in spans if e["name"] == "generate"]
    assert all(("ulysses.all_to_all" in args) == (ranks == 2) for args in sent)
    assert len(header["p50_ms_by_rank"]) == ranks and header["slowest_rank"] < ranks
    slowest = header["p50_ms_by_rank"][header["slowest_rank"]]
    assert slowest == max(header["p50_ms_by_rank"]) > 0
