"""Predictions of the planner against measurements on this machine.

``python benchmarks/planner.py`` measures the toy world and tiny models. The error of a time is
``predicted / measured - 1``; memory is that of the tensors of weights and rollout state.
``python benchmarks/planner.py --committed`` measures nothing: it compares the predictions with the
committed reports of steady steps on GPUs.
"""

import argparse
import sys
from typing import Any

import command
import report
import rollout
import table
import torch

from flashdreams.infra.assembly import resolve_device
from flashdreams.infra.config import derive_config
from flashdreams.parallel.environment import Environment
from flashdreams.planning.counts import storages
from flashdreams.planning.devices import DEVICES, GIB, this_machine
from flashdreams.planning.plans import Planner
from flashdreams.registry import discover
from flashdreams.runtime.stats import sha256_of

SLUGS = (
    "toy-world", "courtyard", "self-forcing-tiny-random", "lingbot-world-tiny-random",
    "matrix-game-2-tiny-random", "wan22-ti2v-tiny-random",
)  # fmt: skip
PRECISIONS = {table.AS_IT_IS: "native", "fp8": "fp8", "fp8_gemm": "fp8_gemm"}
"""Variant of a report -> precision passed to the planner."""
ROUNDS = 5
"""Number of predictions (each measures the machine again) and of measurements, taken in turn,
because the speed of a shared machine varies. The medians are compared."""
COLUMNS = (
    "case", "p50_ms", "predicted_ms", "time_error", "measured_mib", "predicted_mib",
    "memory_error", "binds",
)  # fmt: skip


def compare(slug: str, place: Environment, repeats: int) -> dict[str, Any]:
    """One method: prediction and measurement of an AR step with a full window, in turn."""
    subject = rollout.load_subject(slug, place)
    config = derive_config(discover().resolve(slug).pipeline)  # type: ignore[attr-defined]
    plans, times = [], []
    with torch.no_grad():
        cache = subject.new_steady_rollout()
        for _ in range(ROUNDS):
            plans += Planner(config, this_machine(DEVICES)[1]).plans(1)
            for _ in range(repeats):
                if not subject.streaming:  # its rollout is a single AR step
                    cache = subject.new_rollout()
                start = rollout.clock_s(place.device)
                subject.step(cache)
                times.append(1e3 * (rollout.clock_s(place.device) - start))
    pipeline = subject.pipeline
    held: set[int] = set()
    weights = [list(part.parameters()) for part in pipeline.components().values()]
    state = [cache.diffusion.conditional, cache.diffusion.unconditional, cache.decoder]
    measured = storages([weights, state], held)
    plan = sorted(plans, key=lambda plan: plan.ms.total)[ROUNDS // 2]
    memory = plan.memory
    predicted = memory.transformer + memory.others + memory.session
    timing = report.timing_fields(sorted(times))
    ms = timing["p50_ms"]
    return {
        "case": slug,
        "variant": "full window",
        **timing,
        "predicted_ms": plan.ms.total,
        "time_error": plan.ms.total / ms - 1,
        "measured_mib": measured / GIB * 1024,
        "predicted_mib": predicted / GIB * 1024,
        "memory_error": predicted / measured - 1,
        "binds": plan.ms.largest,
        "device": str(plan.device),
        "output_sha256": sha256_of(cache.latent),
    }


def against_reports(figures: list[table.Figure]) -> str:
    """Prediction and error for each step that was timed on a listed GPU."""
    lines = []
    for found in figures:
        row, name = found.row, found.report["device"]["name"]
        kinds = [d for n, d in DEVICES.items() if n.split("-")[0] in name]
        precision = PRECISIONS.get(row["variant"])
        if found.report["benchmark"] != "variants" or precision is None or not kinds:
            continue
        config = derive_config(
            discover().resolve(row["case"]).pipeline,  # type: ignore[attr-defined]
            diffusion_model={"transformer": {"precision": precision}},
        )
        (plan,) = Planner(config, kinds[0]).plans(1)
        error = plan.ms.total / row["p50_ms"] - 1
        where = f"{table.place(found)}, commit {row['commit'][:7]}"
        lines.append(
            f"{row['case']}, {precision}, {where}: predicted {plan.ms.total:.0f} ms, "
            f"measured {row['p50_ms']:.0f} ms, error {error:+.1%}"
        )
    return "\n".join(lines) or f"Steady steps on a GPU: {table.NOT_MEASURED}."


def main(arguments: list[str] | None = None) -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("slugs", nargs="*", default=list(SLUGS))
    parser.add_argument("--committed", action="store_true", help="compare with the reports instead")
    options = command.parse(parser, arguments)
    if options.committed:
        sys.stdout.write(against_reports(table.read_reports()) + "\n")
        return
    torch.set_num_threads(1)
    place = Environment(0, 0, 1, resolve_device(options.device))
    repeats = options.repeats or 30
    rows = [compare(slug, place, repeats) for slug in options.slugs]
    config = {"slugs": options.slugs, "repeats": repeats, "rounds": ROUNDS}
    found = report.new_report(
        "planner", place.device, config, rows, options.git_commit, ("time_error", "memory_error")
    )
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
