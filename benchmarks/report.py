"""Timing and reports of the benchmarks.

A report is one JSON file with what was measured, where, and with which code and versions. A missing
field is an error, because figures without it cannot be compared.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import flashdreams_kernels
import torch
from torch import Tensor

import flashdreams
from flashdreams.runtime.cuda_graph import CudaCapture

HEADER_FIELDS = (
    "benchmark",
    "date",
    "git_commit",
    "git_dirty",
    "config",
    "config_sha256",
    "versions",
    "device",
)
ROW_FIELDS = ("case", "variant", "repeats", "p50_ms", "p95_ms", "p99_ms", "output_sha256")
PACKAGES = ("torch", "triton", "numpy", "diffusers")
MEASURED = ("flashdreams", "kernels", "benchmarks", ":!benchmarks/results")
"""Paths in which an uncommitted change means that figures belong to no commit."""
NOT_FINITE = "not finite"
"""Stands for NaN and infinity in a report."""
FLUSH_BYTES = 2**28
"""Bytes written between timed calls on a GPU, so that no call finds its data in the L2 cache."""


def time_calls(function: Callable[[], Tensor], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of single calls after warm-up, in ascending order.

    On CUDA the call is captured as a graph, so that only work on the device counts, and each
    replay starts with a cold L2 cache.

    Args:
        function: the call to time; its inputs must keep their addresses.
        device: device it runs on.
        repeats: number of timed calls.
    """
    if device.type != "cuda":
        for _ in range(2):
            function()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    captured = CudaCapture(device).capture(function)
    captured.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in events:
        flush.zero_()
        begin.record()
        captured.replay()
        end.record()
    torch.cuda.synchronize(device)
    return sorted(begin.elapsed_time(end) for begin, end in events)


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as ``share`` of all values."""
    rank = -(-round(share * 1000) * len(ascending) // 1000)
    return ascending[max(0, rank - 1)]


def timing_fields(ascending: Sequence[float]) -> dict[str, Any]:
    """Fields of a row about its times."""
    return {
        "repeats": len(ascending),
        "p50_ms": percentile(ascending, 0.50),
        "p95_ms": percentile(ascending, 0.95),
        "p99_ms": percentile(ascending, 0.99),
    }


def ratio_fields(times: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Fields of a row about its times relative to another variant, pair by pair.

    Args:
        times: milliseconds in the order of the calls.
        baseline: milliseconds of the calls made in turn with them.
    """
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [percentile(ratios, share) for share in (0.25, 0.75)],
    }


def refuse_difference(what: str, difference: float, bound: float) -> None:
    """Refuse to compare the times of two sides with different outputs.

    Args:
        what: names of the sides, for the message.
        difference: difference of their outputs.
        bound: largest difference that rounding can explain.

    Raises:
        RuntimeError: the difference is larger.
    """
    if not difference <= bound:
        raise RuntimeError(
            f"{what}: the outputs differ by {difference:.1e}, more than {bound:.0e}. The sides do "
            "not do the same work, so their times say nothing."
        )


def new_report(
    benchmark: str,
    device: torch.device,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    git_commit: str | None = None,
    row_fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Build a report.

    Args:
        benchmark: name of the benchmark.
        device: device of the run.
        config: all settings.
        rows: the results.
        git_commit: the code's commit; None asks git.
        row_fields: required fields of every row in addition to :data:`ROW_FIELDS`.

    Raises:
        ValueError: a field is missing or empty, or the commit of the code is unknown.
    """
    commit, dirty = git_state() if git_commit is None else (git_commit, False)
    report = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": dirty,
        "config": dict(config),
        "config_sha256": config_sha256(config),
        "versions": _versions(),
        "device": describe_device(device),
        "rows": [dict(row) for row in rows],
    }
    check_report(report, row_fields)
    return report


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a config, which identifies reports with the same config."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_report(report: Mapping[str, Any], row_fields: Sequence[str] = ()) -> None:
    """Refuse an incomplete report.

    Args:
        report: the report to write.
        row_fields: required fields of every row in addition to :data:`ROW_FIELDS`.

    Raises:
        ValueError: names the fields that are missing or empty.
    """
    missing = [name for name in HEADER_FIELDS if report.get(name) in (None, "", {})]
    rows = report.get("rows") or []
    if not rows:
        missing.append("rows")
    wanted = (*ROW_FIELDS, *row_fields)
    for index, row in enumerate(rows):
        missing += [f"rows[{index}].{name}" for name in wanted if row.get(name) in (None, "")]
    if missing:
        raise ValueError(f"The report lacks {', '.join(missing)}; it was not written.")


def git_state() -> tuple[str, bool]:
    """The commit of the measured code, and whether there are uncommitted changes.

    Raises:
        ValueError: git does not know the commit of the code.
    """
    folder = Path(__file__).resolve().parents[1]
    for package in (flashdreams, flashdreams_kernels):
        place = Path(str(package.__file__)).resolve().parent
        if not place.is_relative_to(folder):
            raise ValueError(
                f"{package.__name__} is imported from {place}, not from {folder}, whose commit "
                f"would be noted. Set PYTHONPATH={folder}:{folder}/kernels, or give --git-commit."
            )

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            raise FileNotFoundError("a checkout of something else")
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *MEASURED)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{folder} is no git checkout; give --git-commit SHA.") from error
    return commit, bool(changed)


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and properties of a device."""
    if device.type != "cuda":
        return {
            "type": device.type,
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def finish(
    report: Mapping[str, Any],
    options: argparse.Namespace,
    columns: Sequence[str],
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Print the table; write the JSON and the picture if requested.

    Args:
        report: a checked report.
        options: options from `command.parse`.
        columns: row fields to print in the table.
        draw: draws the picture; None: there is none.
    """
    device = report["device"]
    sys.stdout.write(f"{report['benchmark']} on {device['name']} at {report['git_commit'][:12]}\n")
    sys.stdout.write(table(report["rows"], columns))
    if options.json is not None:
        write(report, options.json)
    if draw is not None and options.plot is not None:
        draw(report, options.plot)


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON; creates its folder. NaN and infinity become ``"not finite"``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(_writable(report), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _writable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return NOT_FINITE
    if isinstance(value, Mapping):
        return {name: _writable(x) for name, x in value.items()}
    return [_writable(x) for x in value] if isinstance(value, list | tuple) else value


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; missing fields are dashes."""
    cells = [list(columns)]
    cells += [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = ""
    for line in cells:
        padded = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text += "  ".join(padded).rstrip() + "\n"
    return text


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
