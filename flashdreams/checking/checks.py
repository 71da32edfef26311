"""All checks of one method, in order."""

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flashdreams.checking.config_checks import check_config, check_meta
from flashdreams.checking.graph_checks import check_devices, check_graphs
from flashdreams.checking.rank_checks import check_ranks, warm_forkserver
from flashdreams.checking.report import (
    Note,
    Problem,
    Report,
    Result,
    Skipped,
    Verdict,
    describe_error,
)
from flashdreams.checking.rollout_checks import (
    check_bad_input,
    check_bfloat16,
    check_chunk_split,
    check_default_dtype,
    check_determinism,
    check_inputs,
    check_interleaving,
    check_large_noise,
    check_shapes,
    check_snapshot,
)
from flashdreams.checking.state_checks import check_modules, check_state_styles
from flashdreams.checking.subject import Bench, Chunk, Subject, new_subject
from flashdreams.infra.runner import RunnerConfig


@dataclass(frozen=True)
class Prepared:
    """What a check works on."""

    subject: Subject
    bench: Bench
    base: list[Chunk]
    """A rollout with seed 0, made before anything else."""


WITHOUT_ROLLOUT: dict[str, Callable[[Subject], str]] = {
    "config round trip": check_config,
    "meta build": check_meta,
}
"""Name -> check."""

WITH_ROLLOUT: dict[str, Callable[[Prepared], str]] = {
    "shapes and frames": lambda p: check_shapes(p.subject, p.bench),
    "determinism": lambda p: check_determinism(p.bench, p.base),
    "inputs": lambda p: check_inputs(p.bench, p.base),
    "chunk split": lambda p: check_chunk_split(p.bench),
    "interleaving": lambda p: check_interleaving(p.bench, p.base),
    "state on modules": lambda p: check_modules(p.bench),
    "state styles": lambda p: check_state_styles(p.bench),
    "snapshot": lambda p: check_snapshot(p.bench, p.base),
    "default type": lambda p: check_default_dtype(p.subject, p.bench, p.base),
    "bfloat16": lambda p: check_bfloat16(p.subject),
    "devices": lambda p: check_devices(p.bench),
    "graph safety": lambda p: check_graphs(p.bench),
    "large noise": lambda p: check_large_noise(p.bench),
    "bad input": lambda p: check_bad_input(p.bench, p.base),
    "two ranks": lambda p: check_ranks(p.subject, p.bench),
}
"""Name -> check; each makes its own rollouts."""

NAMES = (*WITHOUT_ROLLOUT, "rollout", *WITH_ROLLOUT)
"""Of all checks, in order."""


def check_method(config: RunnerConfig, only: tuple[str, ...] = ()) -> Report:
    """Check one registered method, on the CPU.

    Args:
        config: as registered, at full size.
        only: names of the checks to make; empty for all.

    Returns:
        One result per check. Errors of the method become results, not exceptions.

    Raises:
        ValueError: an unknown name of a check.
    """
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise ValueError(f"Unknown check {unknown[0]!r}. Checks: {', '.join(NAMES)}.")
    wanted = only or NAMES
    if "two ranks" in wanted:
        warm_forkserver()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="flashdreams-check-") as folder, _quiet():
        try:
            subject = new_subject(config, Path(folder))
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else describe_error(error)
            text = f"the method cannot be built at toy size: {text}"
            return Report(config.runner_name, "nothing ran", [Result("set-up", "FAIL", text)])
        for name, check in WITHOUT_ROLLOUT.items():
            if name in wanted:
                results.append(_timed(name, lambda c=check: c(subject)))  # type: ignore[misc]
        prepared, first = _prepare(subject)
        if first.verdict == "FAIL" or "rollout" in wanted:
            results.append(first)
        for name, with_rollout in WITH_ROLLOUT.items():
            if name not in wanted:
                continue
            if prepared is None:
                results.append(Result(name, "skip", "needs a rollout"))
            else:
                results.append(_timed(name, lambda c=with_rollout: c(prepared)))  # type: ignore[misc]
        return Report(config.runner_name, subject.size, results)


def _prepare(subject: Subject) -> tuple[Prepared | None, Result]:
    """The built method and its first rollout; None if it fails."""
    kept: list[Prepared] = []

    def build() -> str:
        bench = subject.open()
        kept.append(Prepared(subject, bench, bench.roll()))
        return f"built; {bench.steps} AR steps run"

    return (kept[0] if (result := _timed("rollout", build)).verdict == "pass" else None), result


def _timed(name: str, check: Callable[[], str]) -> Result:
    start = time.perf_counter()
    verdict: Verdict = "pass"
    try:
        with torch.no_grad():
            text = check()
    except Problem as problem:
        verdict, text = "FAIL", str(problem)
    except Note as note:
        verdict, text = "note", str(note)
    except Skipped as skipped:
        verdict, text = "skip", str(skipped)
    except Exception as error:
        verdict = "FAIL"
        text = f"it fails with {describe_error(error)}"
    return Result(name, verdict, text, time.perf_counter() - start)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars, log lines and warnings of the many small runs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
