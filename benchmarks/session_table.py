"""One Markdown table of what a run of ``gpu_session.sh`` measured and did not measure.

``python benchmarks/session_table.py RESULTS`` reads the reports of a folder, the log of the GPU
tests and the list of sections. Every row names its GPU.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import command
from report import NOT_FINITE

COLUMNS = ("section", "case", "variant", "ms", "ratio", "more", "card")
MORE = {
    "latency_p50_ms": "latency {:.0f} ms",
    "host_ms": "host {:.0f} ms",
    "fps": "{:.1f} frames/s",
    "peak_gib": "{:.1f} GiB",
    "attention": "attention {}",
    "latent_error_last": "latents {:.1e}",
    "latent_error_rms": "latents {:.1e}",
    "psnr_truth_db": "{:.2f} dB to the truth",
    "tflops": "{:.0f} TFLOP/s",
    "gib_per_s": "{:.0f} GiB/s",
    "error": "error {:.1e}",
    "speedup": "{:.2f}x",
    "conv_ratio": "{:.3f}x its convolutions",
    "max_difference": "difference {:.1e}",
    "memory_ratio": "memory {:.3f}",
    "verdict": "{}",
}
"""Row fields to show, with their format."""
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
OUTCOME = re.compile(
    rf"^(?:(?P<name>\S+::\S.*?) (?P<outcome>{OUTCOMES})\b"
    rf"|\[gw\d+\] \[ *\d+%\] (?P<of_worker>{OUTCOMES}) (?P<on_worker>\S+::\S.*?)\s*$)",
    re.MULTILINE,
)
"""A line of ``pytest -v``, with or without parallel workers."""


def read_section(path: Path) -> Iterator[tuple[str, ...]]:
    """Table rows of one report, including the variants that it lists as not measured."""
    report = json.loads(path.read_text(encoding="utf-8"))
    card = report["device"]["name"]
    for row in report["rows"]:
        ratio = row.get("ratio", row.get("paired_ratio"))
        cells = (row["case"], row["variant"], f"{row['p50_ms']:.4g}", _number(ratio, "{:.3f}"))
        yield path.stem, *cells, ", ".join(describe(row)), card
    for name, reason in report.get("not_measured", {}).items():
        yield path.stem, report["config"].get("slug", ""), name, "not measured", "", reason, card


def describe(row: Mapping[str, Any]) -> Iterator[str]:
    """The remaining fields of a row as text."""
    for name, form in MORE.items():
        value = row.get(name)
        if value not in (None, "") and (form.endswith("{}") or isinstance(value, int | float)):
            yield form.format(value)
        elif value == NOT_FINITE:
            yield f"{name} {value}"


def tests_of(log: str) -> dict[str, list[str]]:
    """Names of tests by outcome, from the output of ``pytest -v``."""
    found: dict[str, list[str]] = {}
    for line in OUTCOME.finditer(log):
        outcome = line["outcome"] or line["of_worker"]
        found.setdefault(outcome.lower(), []).append(line["name"] or line["on_worker"])
    return found


def table(folder: Path) -> str:
    """The table of a folder, after the versions and before the other sections."""
    reports = sorted(folder.glob("*.json"))
    lines = [_header(json.loads(path.read_text(encoding="utf-8"))) for path in reports[:1]]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---|--:|--:|---|---|"]
    order = [line.split("\t") for line in _text(folder / "sections.tsv").splitlines()]
    names = [name for name, *_ in order]
    reports.sort(key=lambda path: names.index(path.stem) if path.stem in names else len(names))
    for path in reports:
        lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in read_section(path)]
    lines.append("")
    for outcome, tests in tests_of(_text(folder / "gpu_tests.log")).items():
        listed = f": {', '.join(tests)}" if outcome in ("failed", "error") else ""
        lines.append(f"- GPU tests, {outcome}: {len(tests)}{listed}")
    for name, state, seconds in order:
        known = state == "done" or "not measured" in state or (folder / f"{name}.json").exists()
        measured = "" if known else " (not measured)"
        lines.append(f"- {name}: {state}, {seconds} s{measured}")
    return "\n".join(lines) + "\n"


def _header(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    device = report["device"]["name"]
    return f"{device}, {report['date'][:10]}, commit {report['git_commit'][:12]}; {versions}\n"


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="RESULTS of gpu_session.sh")
    sys.stdout.write(table(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    command.run(main)
