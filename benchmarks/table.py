"""Tables of measured figures for the README and the site, from the committed reports only.

``python benchmarks/table.py`` prints the README's, ``python benchmarks/table.py --write README.md``
puts it between the README's two marks; the site takes the others when it is built. GPU figures
come first, and each of their rows names the GPU. If several reports have a cell, the fastest one is
used, for ratios and GPU rows the newest one. A figure that is in no report is "not measured".
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command
import report

from flashdreams.infra.runner import RunnerConfig
from flashdreams.registry import discover

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOT_MEASURED = "not measured"
PACKAGE = "flashdreams.integrations."
PLAIN = "default attention, eager"
"""Default settings of a run, which are not shown."""
AS_CONFIGURED = "as configured"
AS_IT_IS = "default"
"""The variant of a method without changed flags."""
DEVICES = ("cpu", "cuda")


class Figure(NamedTuple):
    """One row of a report, with the report that it comes from."""

    report: Mapping[str, Any]
    row: Mapping[str, Any]


class Ratio(NamedTuple):
    """A ratio that a benchmark reports."""

    benchmark: str
    variant: str | None
    """Variant of the row that has it; None: any."""
    field: str
    meaning: str


RATIOS = (
    Ratio("overhead", "engine", "ratio", "time of the engine to a bare loop over its modules"),
    Ratio("growth", None, "paired_ratio", "time of a step of an old rollout to a young one's"),
    Ratio("growth", None, "memory_ratio", "memory after the last step to that after the first"),
    Ratio(
        "peers", "diffusers", "ratio", "time of `diffusers`, which has no KV cache, to this package"
    ),
    Ratio("decode", "chunk at once", "ratio", "time of a chunk decoded at once to frame by frame"),
    Ratio("decode", "fast", "ratio", "time of a chunk as a GPU decodes it, to frame by frame"),
    Ratio("decode", "fast", "conv_ratio", "the same to its convolutions alone"),
    Ratio("decode", "fast, graph", "ratio", "time of a chunk in a CUDA graph, to frame by frame"),
)


def read_reports(folder: Path = RESULTS) -> list[Figure]:
    """Every row of every report in a folder and its subfolders.

    Raises:
        ValueError: a report is incomplete, or its code belongs to no commit.
    """
    found = []
    for file in sorted(folder.rglob("*.json")):
        read = json.loads(file.read_text(encoding="utf-8"))
        try:
            report.check_report(read)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if read["git_dirty"]:
            raise ValueError(f"{file} was measured with uncommitted changes; run it again.")
        found += [Figure(read, row) for row in read["rows"]]
    return found


def shipped_slugs() -> dict[str, str]:
    """The package's slugs with trained weights, with their descriptions."""
    registry = discover()
    own = {s: c for s, c in registry.items() if registry.origin(s).reference.startswith(PACKAGE)}
    return {
        slug: config.description
        for slug, config in own.items()
        if isinstance(config, RunnerConfig) and "random" not in slug
    }


def speed(figures: Sequence[Figure], slug: str, device: str) -> str:
    """The fastest committed run of a slug on a kind of device."""
    mine = [f for f in figures if f.row["case"] == slug and _is(f, "fps", device)]
    mine += [
        f
        for f in figures
        if (f.row["case"], f.row["variant"]) == (slug, AS_IT_IS) and _is(f, "variants", device)
    ]
    if not mine:
        return NOT_MEASURED
    best = max(mine, key=lambda f: f.row["fps"])
    row = best.row
    how = [f"{_short(row['p50_ms'])} ms per step (p99 {_short(row['p99_ms'])})"]
    variant = row["variant"].rpartition(", ")[0]
    how += [variant] if variant not in (PLAIN, "") else []
    how += ["random weights"] if row["weights"] != AS_CONFIGURED else []
    how += [f"{row['ranks']} ranks"] if row["ranks"] > 1 else []
    return f"**{row['fps']:.3g} frames/s**, {', '.join(how)}; {place(best)}"


def place(figure: Figure) -> str:
    """Device and date of a figure."""
    device = figure.report["device"]
    name = device["name"].replace("(R)", "").replace("(TM)", "")
    threads = device.get("threads")
    shared = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    return f"{name}{shared}, {figure.report['date'][:10]}"


def speeds(figures: Sequence[Figure], slugs: Mapping[str, str]) -> str:
    """Table of slugs and their speed, measured ones first."""
    devices = DEVICES[::-1]
    cells = {slug: [speed(figures, slug, device) for device in devices] for slug in slugs}
    lines = ["| slug | what it does | on a GPU | on a CPU |", "|---|---|---|---|"]
    for slug in sorted(slugs, key=lambda slug: cells[slug] == [NOT_MEASURED] * len(DEVICES)):
        lines.append(f"| `{slug}` | {slugs[slug].rstrip('.')} | {' | '.join(cells[slug])} |")
    return "\n".join(lines)


def steady_steps(figures: Sequence[Figure]) -> str:
    """Table of AR steps on GPUs: variants of a method and other commits, timed in turns."""
    mine = sorted(
        (f for f in figures if _is(f, "variants", "cuda")), key=lambda f: f.report["date"]
    )
    if not mine:
        return f"Steady AR steps on a GPU: {NOT_MEASURED}."
    random = any(f.row["weights"] != AS_CONFIGURED for f in mine)
    apart = "latents of random weights differ by" if random else "latents differ by"
    newest = {(f.row["case"], place(f).rpartition(", ")[0], f.row["variant"]): f for f in mine}
    lines = [
        "| method | variant | ms per AR step | time to the default | frames/s | latency, ms | GiB "
        f"| {apart} | commit | card |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for found in newest.values():
        row = found.row
        cells = [f"`{row['case']}`", row["variant"], f"**{row['p50_ms']:.0f}**"]
        cells += [f"x {row['ratio']:.3f}", f"{row['fps']:.1f}", _figure(row["latency_p50_ms"])]
        cells += [f"{row['peak_gib']:.1f}", _figure(row["latent_error_last"], ".1e")]
        cells += [row["commit"][:7], place(found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def attention_rates(figures: Sequence[Figure]) -> str:
    """Table of the FLOP rate of every attention backend by window, from the newest GPU report."""
    mine = [f for f in figures if _is(f, "attention", "cuda")]
    if not mine:
        return f"Rates of the backends on a GPU: {NOT_MEASURED}."
    newest = max(mine, key=lambda f: f.report["date"])
    rows = newest.report["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    rates = {(row["case"], row["variant"]): f"{row['tflops']:.0f}" for row in rows}
    lines = [f"| backend | {' | '.join(cases)} |", f"|---|{'--:|' * len(cases)}"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = [rates.get((case, name), NOT_MEASURED) for case in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    where = f"{place(newest)}, commit {newest.report['git_commit'][:7]}"
    return "\n".join([*lines, "", f"10^12 operations per second by visible frames; {where}."])


def readme(figures: Sequence[Figure], slugs: Mapping[str, str]) -> str:
    """The README's tables: the GPU table if there is one, then the speed of every slug.

    If there is a GPU table, slugs that were not measured share one line.
    """
    if not any(_is(f, "variants", "cuda") for f in figures):
        return speeds(figures, slugs)
    measured = {f.row["case"] for f in figures if f.report["benchmark"] in ("fps", "variants")}
    known = {slug: text for slug, text in slugs.items() if slug in measured}
    others = ", ".join(f"`{slug}`" for slug in slugs if slug not in measured)
    parts = [steady_steps(figures), speeds(figures, known)]
    return "\n\n".join([*parts, f"{NOT_MEASURED.capitalize()}: {others}."] if others else parts)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _figure(value: Any, form: str = ".0f") -> str:
    return f"{value:{form}}" if isinstance(value, int | float) else str(value)


def ratios(figures: Sequence[Figure]) -> str:
    """Table of the engine's overhead, growth over a rollout, and comparisons with peers."""
    lines = ["| ratio | of | on a CPU | on a GPU |", "|---|---|---|---|"]
    for wanted in RATIOS:
        mine = [f for f in figures if f.report["benchmark"] == wanted.benchmark]
        mine = [f for f in mine if wanted.variant in (None, f.row["variant"])]
        for case in dict.fromkeys(f.row["case"] for f in mine):
            here = [f for f in mine if f.row["case"] == case]
            cells = (_ratio(here, wanted, device) for device in DEVICES)
            name = f"`{case}`" if "-" in case else case
            lines.append(f"| {wanted.meaning} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def precisions(figures: Sequence[Figure]) -> str:
    """Table of error and cost of lower precision, from the newest report on each device."""
    lines = [
        "| case | variant | PSNR to the truth, dB | PSNR to float32, dB | error of first latents "
        "| of last | KV cache, MiB | time on a CPU | on a GPU |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_device = {d: _newest([f for f in figures if _is(f, "precision", d)]) for d in DEVICES}
    shown: dict[tuple[str, str], Mapping[str, Any]] = {}
    for device in reversed(DEVICES):
        shown |= by_device[device]
    last = ""
    for key, row in shown.items():
        cells = [f"`{key[0]}`" if key[0] != last else "", key[1]]
        last = key[0]
        same = row["latent_error_max"] == 0
        cells.append(_number(row.get("psnr_truth_db"), ".2f"))
        cells.append(_number(None if same else row.get("psnr_float32_db"), ".2f"))
        cells += [_number(row[f"latent_error_{end}"], ".1e") for end in ("first", "last")]
        cells.append(_number(row["kv_cache_mib"], ".3g"))
        for found in by_device.values():
            cells.append(f"x {found[key]['ratio']:.2f}" if key in found else NOT_MEASURED)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _newest(figures: Sequence[Figure]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows by case and variant; later reports replace earlier ones."""
    ordered = sorted(figures, key=lambda f: f.report["date"])
    return {(f.row["case"], f.row["variant"]): f.row for f in ordered}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _ratio(figures: Sequence[Figure], wanted: Ratio, device: str) -> str:
    mine = [f for f in figures if _is(f, wanted.benchmark, device)]
    if not mine:
        return NOT_MEASURED
    newest = max(mine, key=lambda f: f.report["date"])
    return f"**{newest.row[wanted.field]:.3f}**; {place(newest)}"


def _is(figure: Figure, benchmark: str, device: str) -> bool:
    found = figure.report
    return bool(found["benchmark"] == benchmark and found["device"]["type"] == device)


def replace_region(text: str, content: str) -> str:
    """A text with new content between its two marks.

    Raises:
        ValueError: a mark is missing, in the wrong place, or occurs more than once.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END in before:
        raise ValueError(f"The text must hold {BEGIN!r} and {END!r} once each, in this order.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Print the README's tables, or write them into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", type=Path, default=None, help="file with the two marks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the reports")
    options = parser.parse_args(arguments)
    text = readme(read_reports(options.results), shipped_slugs())
    if options.write is None:
        sys.stdout.write(text + "\n")
    else:
        before = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_region(before, text), encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
