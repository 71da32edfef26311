"""The timeline of a run: all ranks, their stages and what these sent."""

import json
import os
import subprocess
import sys

import pytest

WORDS = ["self-forcing-tiny-random", "--total-blocks", "2"]


def run(tmp_path, ranks: int) -> tuple[dict, dict]:
    launch = ["-m", "flashdreams.run"]
    if ranks > 1:
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            *launch,
        ]
    trace = tmp_path / "deep" / "trace.json"
    options = ["--trace", str(trace), "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launch, *WORDS, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(trace) in done.stdout
    stats = json.loads((tmp_path / "stats_self-forcing-tiny-random.json").read_text())
    return json.loads(trace.read_text()), stats["header"]


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
    sent = [e["args"] for e in spans if e["name"] == "generate"]
    assert all(("ulysses.all_to_all" in args) == (ranks == 2) for args in sent)
    assert len(header["p50_ms_by_rank"]) == ranks and header["slowest_rank"] < ranks
    slowest = header["p50_ms_by_rank"][header["slowest_rank"]]
    assert slowest == max(header["p50_ms_by_rank"]) > 0
