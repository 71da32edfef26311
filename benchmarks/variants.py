"""Steady AR steps of several variants of one method, optionally with another commit, in turns.

``python benchmarks/variants.py self-forcing-wan2.1-t2v-1.3b-taehv --reference .ref --json
out.json``. Every variant streams in a separate process (`streamer.py`) and waits during the others'
turns, so all use the same device at the same time; with ``--one-at-a-time`` a process builds its
pipeline only when the previous one has ended. A turn is a few AR steps without waiting in between;
``p50_ms`` is the median over turns of the time of one step, ``latency_p50_ms`` that of ``generate``
alone on an idle device. Weights that are not on this machine are one block of random numbers, the
same for every variant and commit, so that ``latent_error_*`` can compare a variant's latents with
those of the first variant, over the AR steps that fill the window.

Variants that fail or do not fit in the time limit are listed with the reason in ``not_measured``.
"""

import argparse
import json
import math
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import command
import report
import torch

from flashdreams.parallel.environment import init

HERE = Path(__file__).resolve().parents[1]
COLUMNS = (
    "case", "variant", "p50_ms", "latency_p50_ms", "host_ms", "fps", "ratio", "peak_gib",
    "latent_error_first", "latent_error_last", "attention",
)  # fmt: skip
FIELDS = (
    "fps", "frames_per_step", "latency_p50_ms", "host_ms", "ratio", "peak_gib", "setup_s",
    "warm_up_s", "latent_error_first", "latent_error_last", "attention", "weights", "commit",
    "ranks",
)  # fmt: skip
GRACE_S = 5.0
"""Time beyond the limit for the latency of a variant that has had its turns."""
BUILD_SHARE = 0.6
"""Fraction of the time limit after which no further variant is warmed up."""


@dataclass(frozen=True)
class Variant:
    """Changes to the method's default config and code."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `rollout.load_subject`."""
    is_reference: bool = False
    """Whether to run the code of the reference commit."""


VARIANTS = {
    "default": Variant(),
    "fp8": Variant({"transformer": {"precision": "fp8"}}),
    "fp8_gemm": Variant({"transformer": {"precision": "fp8_gemm"}}),
    "fp8_gemm, all widths": Variant(
        {"transformer": {"precision": "fp8_gemm", "fp8_gemm_min_width": 16}}
    ),
    "graphs off": Variant({"use_cuda_graph": False}),
    "strict": Variant({"strict": True}),
    "triton": Variant({"backend": "triton"}),
    "reference": Variant(is_reference=True),
}
"""By name; the others of a run are compared with the first."""


class NotMeasuredError(RuntimeError):
    """A variant cannot continue; the message says why."""


class Streaming:
    """A variant's process."""

    def __init__(self, name: str, spec: Mapping[str, Any]) -> None:
        self.name = name
        self.is_over = False
        self.facts: dict[str, Any] = {}
        self.times: list[float] = []
        self.host_times: list[float] = []
        self.latencies: list[float] = []
        script = Path(__file__).with_name("streamer.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def answer(self, deadline: float) -> dict[str, Any]:
        """The next answer.

        Args:
            deadline: in terms of ``time.monotonic()``.

        Raises:
            NotMeasuredError: it failed, ended, or is late.
        """
        try:
            line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise NotMeasuredError("the time limit") from None
        found = json.loads(line) if line else {"error": "its process ended"}
        if "error" in found:
            raise NotMeasuredError(found["error"])
        return found

    def tell(self, do: str, **arguments: Any) -> None:
        """Send an order; a process that has ended shows when its answer is read."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def ask(self, deadline: float, do: str, **arguments: Any) -> dict[str, Any]:
        """Send an order and wait for its answer; arguments as for `answer`."""
        self.tell(do, **arguments)
        return self.answer(deadline)

    def stop(self) -> None:
        """End the process, even during a call; its memory is free afterwards."""
        self._process.kill()
        self._process.wait()


class Run:
    """The variants of one method and their results so far."""

    def __init__(self, options: argparse.Namespace, device: torch.device, folder: str) -> None:
        self.options = options
        self.device = device
        self.folder = Path(folder)
        self.deadline = time.monotonic() + options.seconds
        self.started = time.monotonic()
        self.not_measured: dict[str, str] = {}
        self.running: list[Streaming] = []
        self.kernels: dict[str, dict[str, Any]] = {}

    def measure(self) -> None:
        """Measure all variants: concurrently and in turns, or one after the other."""
        names = self.options.variants
        self.running = [found for name in names if (found := self._start(name)) is not None]
        if self.options.one_at_a_time:
            for variant in self.running:
                self._measure_some([variant])
        else:
            self._measure_some(self.running)

    def _measure_some(self, started: Sequence[Streaming]) -> None:
        for variant in started:
            variant.tell("build")
        for variant in started:
            self._try(variant, self._warm_up)
        turns = self.options.repeats
        for number in range(turns):
            for variant in started if number % 2 == 0 else started[::-1]:
                self._try(variant, self._take_turn)
            self.write()
        for variant in started:
            self._try(variant, self._measure_latency)
        self.write()
        for variant in started if self.options.profile is not None else ():
            self._try(variant, self._profile)
        for variant in started:
            variant.stop()
        self.write()

    def _start(self, name: str) -> Streaming | None:
        variant = VARIANTS[name]
        if variant.is_reference and self.options.reference is None:
            self.not_measured[name] = "no --reference given"
            return None
        tree = self.options.reference if variant.is_reference else HERE
        spec = {
            "tree": str(tree),
            "slug": self.options.slug,
            "device": self.options.device,
            "options": dict(variant.options),
        }
        return Streaming(name, spec)

    def _try(self, variant: Streaming, part: Any) -> None:
        """Run one part of a variant's measurement; after a failure or delay no other part runs."""
        if variant.is_over:
            return
        try:
            part(variant)
        except NotMeasuredError as error:
            variant.is_over = True
            variant.stop()
            if not variant.times:
                self.not_measured[variant.name] = str(error)
            sys.stderr.write(f"{variant.name}: {error}\n")

    def _warm_up(self, variant: Streaming) -> None:
        share = 1.0 if self.options.one_at_a_time else BUILD_SHARE
        if time.monotonic() > self.started + share * self.options.seconds:
            raise NotMeasuredError("the time limit")
        variant.answer(self.deadline)
        latents = self.folder / f"{variant.name}.pt"
        variant.facts = variant.ask(self.deadline, "warm_up", latents=str(latents))
        variant.facts["latents"] = latents
        variant.ask(self.deadline, "steps", count=1)

    def _take_turn(self, variant: Streaming) -> None:
        if time.monotonic() > self.deadline and len(variant.times) > 1:
            return
        turn = variant.ask(self.deadline, "steps", count=self.options.steps)
        variant.times.append(turn["ms"])
        variant.host_times.append(turn["host_ms"])
        variant.facts["peak_gib"] = turn["peak_gib"]

    def _measure_latency(self, variant: Streaming) -> None:
        late = max(self.deadline, time.monotonic()) + GRACE_S
        variant.latencies = variant.ask(late, "latency", count=self.options.steps)["ms"]
        variant.facts |= variant.ask(late, "sha256")

    def _profile(self, variant: Streaming) -> None:
        if time.monotonic() < self.deadline:
            self.kernels[variant.name] = variant.ask(self.deadline, "profile")
            self.options.profile.write_text(profile_text(self.kernels, self.options.slug))

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant that has been timed."""
        timed = [variant for variant in self.running if variant.times]
        return [self._row(variant, timed[0]) for variant in timed]

    def _row(self, variant: Streaming, first: Streaming) -> dict[str, Any]:
        facts, count = variant.facts, min(len(variant.times), len(first.times))
        times = report.timing_fields(sorted(variant.times))
        latencies = sorted(variant.latencies)
        reference = VARIANTS[variant.name].is_reference
        commit = self.options.reference_commit if reference else self.options.git_commit
        return {
            "case": self.options.slug,
            "variant": variant.name,
            **times,
            "output_sha256": facts.get("sha256", "not measured"),
            "fps": 1e3 * facts["frames_per_step"] / times["p50_ms"],
            "latency_p50_ms": (report.percentile(latencies, 0.5) if latencies else "not measured"),
            "host_ms": report.percentile(sorted(variant.host_times), 0.5),
            **report.ratio_fields(variant.times[:count], first.times[:count]),
            **latent_errors(facts["latents"], first.facts["latents"]),
            **{n: facts[n] for n in ("frames_per_step", "peak_gib", "setup_s", "warm_up_s")},
            **{n: facts[n] for n in ("attention", "weights", "stats")},
            "commit": commit or report.git_state()[0],
            "ranks": 1,
        }

    def report(self) -> dict[str, Any]:
        """The report with the results so far."""
        chosen = {"slug", "variants", "seconds", "repeats", "steps", "one_at_a_time"}
        config = {name: value for name, value in vars(self.options).items() if name in chosen}
        rows = self.rows()
        found = report.new_report(
            "variants", self.device, config, rows, self.options.git_commit, FIELDS
        )
        return found | {"not_measured": self.not_measured}

    def write(self) -> None:
        """Write the results so far, in case the run is interrupted."""
        if self.options.json is not None and any(variant.times for variant in self.running):
            report.write(self.report(), self.options.json)


def latent_errors(latents: Path, expected: Path) -> dict[str, Any]:
    """Difference of a variant's latents from another's, relative to the root mean square.

    Args:
        latents: a list of ``[B, C, T, H, W]``, one for each AR step.
        expected: the same of the other variant.
    """
    pairs = list(zip(torch.load(latents), torch.load(expected), strict=True))

    def error(a: torch.Tensor, b: torch.Tensor) -> float | str:
        found = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        return found if math.isfinite(found) else report.NOT_FINITE

    return {"latent_error_first": error(*pairs[0]), "latent_error_last": error(*pairs[-1])}


def profile_text(kernels: Mapping[str, Mapping[str, Any]], slug: str) -> str:
    """Kernels of a step by variant, as text."""
    lines = []
    for name, found in kernels.items():
        lines.append(
            f"{slug}, {name}: one AR step, {found['wall_ms']:.1f} ms under the profiler, "
            f"{found['busy_ms']:.1f} ms in {found['launches']} kernels"
        )
        lines += [
            f"{ms:10.3f} ms {count:6d}  {kernel_name(key)}" for key, count, ms in found["kernels"]
        ]
        lines.append("")
    return "\n".join(lines)


def kernel_name(symbol: str) -> str:
    """A kernel's symbol without C++ template arguments, at most 80 characters."""
    if "FlashAttnFwd" in symbol:
        return "FlashAttention-3" + ", merge of KV splits" * ("FlashAttnFwdCombine" in symbol)
    convolution = re.match(r"(sm\d+)_xmma_fprop_implicit_gemm_.*?_(tilesize\w+?)_", symbol)
    if convolution:
        return f"cuDNN convolution, {convolution[1]}, {convolution[2]}"
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|cutlass::|c10::", "", symbol)
    inner = re.match(r"\w*elementwise_kernel<(?:\d+, )*(?:gpu_kernel_impl(?:_nocast)?<)?(.*)", name)
    name = inner[1] if inner else name
    return re.split(r"\(|, std::array", name)[0][:80]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("slug", help="a streaming method, as on the command line")
    parser.add_argument(
        "--variants", type=_variant_names, default=["default", "graphs off"],
        help=f"by semicolons, the one to compare with first: {'; '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--reference", type=Path, default=None, help="checkout of another commit")
    parser.add_argument("--reference-commit", default="unknown", help="which commit it is")
    parser.add_argument("--seconds", type=float, default=170.0, help="time limit")
    parser.add_argument("--steps", type=command.count, default=4, help="AR steps of a turn")
    parser.add_argument("--one-at-a-time", action="store_true", help="where memory is short")
    parser.add_argument("--profile", type=command.new_file, default=None, help="text of kernels")
    options = command.parse(parser, arguments)
    options.repeats = options.repeats or 6
    device = init(options.device).device
    with tempfile.TemporaryDirectory(prefix="variants-") as folder:
        run = Run(options, device, folder)
        try:
            run.measure()
            for name, reason in run.not_measured.items():
                sys.stdout.write(f"not measured: {name}: {reason}\n")
            report.finish(run.report(), options, COLUMNS)
        finally:
            for variant in run.running:
                variant.stop()


def _variant_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(";" if ";" in text else ",")]
    names = [name for name in names if name]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are: {'; '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    command.run(main)
