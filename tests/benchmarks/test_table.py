"""The README's figures are those of the committed reports."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    """The script, imported as running it by path would."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("table")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in {"table", "report"} - before:
        sys.modules.pop(name, None)


def fps_report(slug: str, fps: float, device: str, **changes: Any) -> dict[str, Any]:
    times = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"), 1e3 / fps)
    row = {
        "case": slug, "variant": "triton, graphs, 2 = cfg 1 x ulysses 2", "repeats": 30, **times,
        "output_sha256": "0" * 64, "fps": fps, "weights": "random for transformer", "ranks": 2,
    }  # fmt: skip
    return {
        "benchmark": "fps", "date": "2026-12-01T10:00:00+00:00", "git_commit": "0" * 40,
        "git_dirty": False, "config": {"slug": slug}, "config_sha256": "0" * 64,
        "versions": {"torch": "2.13"}, "device": {"type": device, "name": "NVIDIA H200"},
        "rows": [row], **changes,
    }  # fmt: skip


def write(folder: Path, *reports: dict[str, Any]) -> Path:
    for index, found in enumerate(reports):
        (folder / f"{index}.json").write_text(json.dumps(found))
    return folder


def test_readme_holds_what_the_reports_say(table: ModuleType) -> None:
    """If this fails: python benchmarks/table.py --write README.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    written = table.replace_region(
        readme, table.readme(table.read_reports(), table.shipped_slugs())
    )
    assert written == readme
    assert len(readme.splitlines()) <= 150


def test_writing_puts_new_figures_between_the_marks(table: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    reports = write(tmp_path, fps_report("toy-world", 81.0, "cpu"))
    table.main(["--write", str(page), "--results", str(reports)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "**81 frames/s**" in text


def test_every_slug_with_trained_weights_has_a_row(table: ModuleType) -> None:
    rows = table.speeds([], table.shipped_slugs()).splitlines()[2:]
    assert len(rows) == 30 and all(row.count("| not measured |") == 1 for row in rows)
    assert not any("random" in row for row in rows)


def test_cell_names_the_fastest_run_its_way_device_and_date(
    table: ModuleType, tmp_path: Path
) -> None:
    slow, fast = (fps_report("toy-world", fps, "cuda") for fps in (20.0, 25.0))
    figures = table.read_reports(write(tmp_path, fast, slow))
    assert table.speed(figures, "toy-world", "cuda") == (
        "**25 frames/s**, 40 ms per step (p99 40), triton, graphs, random weights, 2 ranks; "
        "NVIDIA H200, 2026-12-01"
    )
    assert table.speed(figures, "toy-world", "cpu") == "not measured"
    assert table.speed(figures, "lingbot-world-fast", "cuda") == "not measured"


def variants_report(ms: float, device: str = "cuda", **row: Any) -> dict[str, Any]:
    found = fps_report("lingbot-world-fast", 12e3 / ms, device, benchmark="variants")
    found["rows"][0] |= {
        "variant": "default", "ratio": 1.0, "latency_p50_ms": 300.0, "peak_gib": 10.0,
        "latent_error_last": 0.0, "ranks": 1, "p50_ms": ms, "commit": "0" * 40, **row,
    }  # fmt: skip
    return found


def test_steps_on_a_gpu_come_first_and_name_their_card(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    fp8 = variants_report(270.0, variant="fp8", ratio=0.8, latency_p50_ms="not measured")
    figures = table.read_reports(write(tmp_path / "gpu", variants_report(340.0), fp8).parent)
    steps, speeds, others = table.readme(figures, table.shipped_slugs()).split("\n\n")
    rows = steps.splitlines()[2:]
    assert all(row.endswith("| 0000000 | NVIDIA H200, 2026-12-01 |") for row in rows)
    assert "| default | **340** | x 1.000 |" in rows[0] and "| not measured |" in rows[1]
    (row,) = speeds.splitlines()[2:]
    assert "frames/s**, 340 ms per step" in row, "a flag makes no method faster"
    (tmp_path / "slow").mkdir()
    slow = table.read_reports(write(tmp_path / "slow", variants_report(1712.0)))
    assert "1712 ms per step" in table.speed(slow, "lingbot-world-fast", "cuda")
    assert others.startswith("Not measured: ") and "`toy-world`" in others


def test_without_a_gpu_the_readme_is_the_table_of_slugs(table: ModuleType, tmp_path: Path) -> None:
    figures = table.read_reports(write(tmp_path, variants_report(340.0, "cpu")))
    slugs = table.shipped_slugs()
    assert table.readme(figures, slugs) == table.speeds(figures, slugs)
    assert table.steady_steps(figures) == "Steady AR steps on a GPU: not measured."


def test_rates_of_attention_are_those_of_the_newest_report(
    table: ModuleType, tmp_path: Path
) -> None:
    def attention(rate: float, day: int, device: str = "cuda") -> dict[str, Any]:
        found = fps_report("3 frames", 20.0, device, benchmark="attention")
        found["rows"][0] |= {"variant": "sdpa", "tflops": rate}
        found["rows"].append(found["rows"][0] | {"case": "6 frames", "variant": "triton"})
        return found | {"date": f"2026-12-0{day}T10:00:00+00:00"}

    figures = table.read_reports(write(tmp_path, attention(500.0, 2), attention(400.0, 1)))
    rows = table.attention_rates(figures).splitlines()
    assert rows[2:4] == ["| sdpa | 500 | not measured |", "| triton | not measured | 500 |"]
    assert rows[-1].endswith("NVIDIA H200, 2026-12-02, commit 0000000.")
    only_cpu = table.read_reports(
        write(tmp_path, attention(1.0, 3, "cpu"), attention(1.0, 3, "cpu"))
    )
    assert "not measured" in table.attention_rates(only_cpu)


def test_newest_ratio_is_shown(table: ModuleType, tmp_path: Path) -> None:
    def overhead(ratio: float, day: int) -> dict[str, Any]:
        found = fps_report("toy-world", 20.0, "cuda", benchmark="overhead")
        found["rows"][0] |= {"variant": "engine", "ratio": ratio}
        return found | {"date": f"2026-12-0{day}T10:00:00+00:00"}

    figures = table.read_reports(write(tmp_path, overhead(1.5, 1), overhead(1.01, 2)))
    (row,) = table.ratios(figures).splitlines()[2:]
    assert row.endswith("| `toy-world` | not measured | **1.010**; NVIDIA H200, 2026-12-02 |")


@pytest.mark.parametrize(
    ("change", "message"), [({"git_dirty": True}, "uncommitted"), ({"versions": {}}, "versions")]
)
def test_reports_that_cannot_be_made_again_are_refused(
    table: ModuleType, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        table.read_reports(write(tmp_path, fps_report("toy-world", 20.0, "cpu") | change))


@pytest.mark.parametrize("text", ["no marks", "<!-- measured: end --><!-- measured: begin -->"])
def test_text_without_marks_in_order_is_refused(table: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="once each, in this order"):
        table.replace_region(text, "new")
