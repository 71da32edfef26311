"""The benchmarks of kernels and attention run anywhere and leave nothing out."""

import copy
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script's module, found as when it is run by path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for module in ("report", "tiles", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize(
    "name,variant", [("kernels", "unfused"), ("attention", "sdpa"), ("tiles", "library")]
)
def test_benchmark_writes_a_whole_report(
    name: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = tmp_path / "results" / "report.json"
    options = ["--device", "cpu", "--repeats", "2", "--json", str(path), "--git-commit", "abc"]
    load(name, monkeypatch).main(options)
    report = json.loads(path.read_text())
    assert report["benchmark"] == name and report["git_commit"] == "abc"
    assert report["versions"]["torch"] and report["device"]["type"] == "cpu"
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["error"] < 1e-5 and len(row["output_sha256"]) == 64
    assert variant in {row["variant"] for row in report["rows"]}
    assert report["rows"][0]["case"] in capsys.readouterr().out


def test_a_report_that_leaves_something_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("report", monkeypatch)
    row = {name: 1 for name in report.ROW_FIELDS}
    whole = {name: "x" for name in report.HEADER_FIELDS} | {"git_dirty": False, "rows": [row]}
    report.check_report(whole)
    for name in report.HEADER_FIELDS:
        with pytest.raises(ValueError, match=f"lacks {name}; it was not written"):
            report.check_report({key: whole[key] for key in whole if key != name})
    for name in report.ROW_FIELDS:
        broken = copy.deepcopy(whole)
        del broken["rows"][0][name]
        with pytest.raises(ValueError, match=rf"lacks rows\[0\]\.{name};"):
            report.check_report(broken)
    with pytest.raises(ValueError, match="lacks rows"):
        report.check_report(whole | {"rows": []})


def test_values_that_are_not_finite_are_written_as_such_and_win_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = load("tiles", monkeypatch)
    right = torch.ones(1, 4)
    calls = {"right": lambda: right, "wrong": lambda: right / 0, "other": lambda: 2 * right}
    monkeypatch.setattr(
        tiles.report, "time_calls", lambda call, *_: [1.0 if call() is right else 0.5]
    )
    case = tiles.Case("case", 1, right[0], {}, calls, "wrong")
    rows = tiles.measure(case, torch.device("cpu"), 1)
    verdicts = {row["variant"]: row["verdict"] for row in rows}
    assert verdicts == {"right": "wins", "wrong": "in the table", "other": ""}
    path = tmp_path / "rows.json"
    tiles.report.write({"rows": rows}, path)
    assert [row["error"] for row in json.loads(path.read_text())["rows"]] == [0, "not finite", 1]
    shown = load("session_table", monkeypatch).describe({"error": "not finite"})
    assert list(shown) == ["error not finite"]


def test_percentiles_are_values_that_occurred(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("report", monkeypatch)
    times = [float(i) for i in range(1, 101)]
    assert [report.percentile(times, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert report.percentile([3.0], 0.99) == 3
    assert report.percentile([1.0, 2.0], 0.5) == 1 and report.percentile([1.0, 2.0], 0.51) == 2
