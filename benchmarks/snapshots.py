"""Snapshots and forks of a rollout: seconds and bytes, compared with plain writes and copies.

``python benchmarks/snapshots.py toy-world --window 600 --json out.json``. A save is compared
with a plain file of the same size that is flushed to disk, in turns; a fork with a copy of the same
size on the device; an AR step of eight forks one by one with that of one batch of them. On a CPU,
forks are measured in CPU time and files in wall time.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import report
import rollout
import torch

from flashdreams.infra.fork import copied_bytes
from flashdreams.runtime.parts import Entry, write_part
from flashdreams.runtime.stats import sha256_of

FORKS = 8
TOLERANCE = 1e-3
"""For frames in [-1, 1]; a batch rounds in a different order."""
COLUMNS = ("case", "variant", "p50_ms", "p95_ms", "bytes", "mib_per_s", "baseline", "ratio")
FIELDS = ("bytes", "mib_per_s", "baseline", "ratio")


def measure(subject: rollout.Subject, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Save, resume, fork and step the forks of one rollout in its steady state."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows = _files(subject, device, repeats, Path(folder))
    return rows + _forks(subject, device, repeats)


def _files(
    subject: rollout.Subject, device: torch.device, repeats: int, folder: Path
) -> list[dict[str, Any]]:
    pipeline, cache = subject.pipeline, subject.new_steady_rollout()
    kept = {name: folder / name for name in ("whole", "light")}
    sizes = {
        name: pipeline.save(cache, path, light=name == "light").bytes for name, path in kept.items()
    }
    filler = torch.zeros(sizes["whole"], dtype=torch.uint8, device="cpu")

    def write() -> None:
        entry = Entry("x", tuple(filler.shape), filler.dtype, lambda: filler)
        write_part(folder / "plain", [entry])
        (folder / "plain").unlink()

    def save() -> None:
        pipeline.save(cache, folder / "again")
        shutil.rmtree(folder / "again")

    times = _in_turn(
        {
            "save": save,
            "plain file": write,
            "save, light": lambda: pipeline.save(cache, folder / "again", light=True),
            "resume": lambda: pipeline.resume(kept["whole"]).release(),
            "resume, light": lambda: pipeline.resume(kept["light"]).release(),
        },
        device,
        repeats,
        after=lambda: shutil.rmtree(folder / "again", ignore_errors=True),
    )
    hashed = sha256_of(torch.as_tensor(subject.step(pipeline.resume(kept["whole"]))))
    return [
        _row(subject, name, took, sizes["light" if "light" in name else "whole"], hashed,
             ("plain file", times["plain file"]))
        for name, took in times.items()
    ]  # fmt: skip


def _forks(subject: rollout.Subject, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    pipeline, cache = subject.pipeline, subject.new_steady_rollout()
    size = FORKS * copied_bytes(cache, pipeline.layout)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    forks, batch = cache.fork(FORKS), cache.fork_batch(FORKS)
    made: dict[str, Any] = {}

    def in_turn() -> None:
        made["in turn"] = torch.cat([torch.as_tensor(subject.step(fork)) for fork in forks])

    def together() -> None:
        index = batch.next_index
        inputs = [subject.input(index)] * FORKS if pipeline.encoder is not None else None
        made["batch"] = pipeline.generate(autoregressive_index=index, cache=batch, input=inputs)
        pipeline.finalize(autoregressive_index=index, cache=batch)

    times = _in_turn(
        {
            f"{FORKS} forks": lambda: cache.fork(FORKS),
            f"{FORKS} forks, batch": lambda: cache.fork_batch(FORKS),
            "copy": source.clone,
            "step in turn": in_turn,
            "step of a batch": together,
        },
        device,
        repeats,
        clock=lambda: rollout.clock_s(device),
    )
    difference = float((made["in turn"] - made["batch"]).abs().max())
    report.refuse_difference("forks in turn and as a batch", difference, TOLERANCE)
    hashed = sha256_of(made["in turn"])
    return [
        _row(subject, name, took, size, hashed,
             (base := "step in turn" if "step" in name else "copy", times[base]))
        for name, took in times.items()
    ]  # fmt: skip


def _in_turn(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    after: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of calls that take turns, after one untimed call each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                times[name].append(1e3 * (clock() - start))
            after()
    return times


def _row(
    subject: rollout.Subject,
    variant: str,
    times: list[float],
    size: int,
    hashed: str,
    baseline: tuple[str, list[float]],
) -> dict[str, Any]:
    fields = report.timing_fields(sorted(times))
    return {
        "case": subject.slug,
        "variant": variant,
        **fields,
        "output_sha256": hashed,
        "bytes": size,
        "mib_per_s": size / 2**20 / (1e-3 * fields["p50_ms"]),
        "baseline": baseline[0],
        "ratio": report.ratio_fields(times, baseline[1])["ratio"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    rollout.run_streaming(
        "snapshots", __doc__, arguments,
        repeats=20, measure=measure, columns=COLUMNS, fields=FIELDS,
    )  # fmt: skip


if __name__ == "__main__":
    command.run(main)
