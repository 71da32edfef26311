"""Time and memory of AR steps 1 to 300: flat once the window is full.

``python benchmarks/growth.py toy-world --json out.json --plot out.png``. On a CPU, times are
CPU time, so that other processes do not count, and memory is the resident size of the process; on a
GPU, memory is what PyTorch has allocated.

``time_ratio`` compares the rollout's last steps with its first steady ones. These are some time
apart, and the speed of a shared machine may change in between. So the old rollout then alternates
with a new one whose window has just filled: ``paired_ratio`` is the median of old to new, pair by
pair. The limit applies to it and to the memory.
"""

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import command
import psutil
import report
import rollout
import torch

from flashdreams.runtime.stats import sha256_of

BAR = 1.03
"""Largest allowed ratio of the last steady steps to the first."""
COLUMNS = (
    "case", "variant", "p50_ms", "p95_ms", "p99_ms", "paired_ratio", "time_ratio",
    "memory_ratio", "bar",
)  # fmt: skip
FIELDS = (
    "paired_ratio", "time_ratio", "memory_ratio", "bar", "within_bar", "first_steady_step",
    "compared_steps", "times_ms", "memory_mib",
)  # fmt: skip


def memory_mib(device: torch.device) -> float:
    """Memory in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def measure(subject: rollout.Subject, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Stream one rollout and compare its first steady steps with its last.

    Raises:
        ValueError: a method with a single chunk, or too few steps for two groups after the window
            is full.
    """
    first = subject.steps_to_fill
    compared = (steps - first) // 4
    if not subject.streaming:
        raise ValueError(f"{subject.slug} makes one chunk; growth shows in a streaming method.")
    if compared < 1:
        raise ValueError(
            f"{subject.slug} needs more than {first + 4} AR steps to show growth, got {steps}."
        )
    warm = subject.new_rollout()
    for _ in range(2):
        subject.step(warm)
    cache, times, memory, chunk = subject.new_rollout(), [], [], None
    for _ in range(steps):
        start = rollout.clock_s(device)
        chunk = subject.step(cache)
        times.append(1e3 * (rollout.clock_s(device) - start))
        memory.append(memory_mib(device))
    medians = {
        name: [statistics.median(part) for part in (found[first:][:compared], found[-compared:])]
        for name, found in (("time", times), ("memory", memory))
    }
    ratios = {f"{name}_ratio": last / begin for name, (begin, last) in medians.items()}
    ages = {"young": subject.new_steady_rollout(), "old": cache}
    calls = {age: partial(subject.step, rolling) for age, rolling in ages.items()}
    paired = rollout.time_in_turn(calls, device, compared)
    paired_ratio = report.ratio_fields(paired["old"], paired["young"])["ratio"]
    row = {
        "case": subject.slug,
        "variant": f"{steps} steps",
        **report.timing_fields(sorted(times[first:])),
        "output_sha256": sha256_of(torch.as_tensor(chunk)),
        **ratios,
        "paired_ratio": paired_ratio,
        "bar": BAR,
        "within_bar": max(paired_ratio, ratios["memory_ratio"]) <= BAR,
        "first_steady_step": first,
        "compared_steps": compared,
        "times_ms": [round(t, 3) for t in times],
        "memory_mib": [round(m, 2) for m in memory],
    }
    return [row]


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Time and memory over the AR steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for row in found["rows"]:
        upper.plot(row["times_ms"], ".", markersize=3, label=row["case"])
        lower.plot(row["memory_mib"], label=row["case"])
        for axes in (upper, lower):
            axes.axvline(row["first_steady_step"], color="grey", linestyle=":", linewidth=1)
    upper.set_ylabel("ms per AR step")
    lower.set_ylabel("memory, MiB")
    lower.set_xlabel("AR step; the dotted line is where the window has filled")
    for axes in (upper, lower):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    upper.set_title(f"growth, {found['device']['name']}, {found['date'][:10]}")
    upper.legend()
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    rollout.run_streaming(
        "growth", __doc__, arguments,
        repeats=300, measure=measure, columns=COLUMNS, fields=FIELDS, draw=draw,
    )  # fmt: skip


if __name__ == "__main__":
    command.run(main)
