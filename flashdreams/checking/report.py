"""What the checks of a method found: one line each, and what to change."""

import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import flashdreams

Verdict = Literal["pass", "note", "FAIL", "skip"]

WIDTH = 100
"""Columns of the report."""


class Problem(Exception):
    """A check failed; the message says what is wrong and what to change."""


class Note(Exception):
    """Something that a method works without, and which feature it lacks."""


class Skipped(Exception):
    """A check that does not apply to the method, or cannot run; the message says why."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    check: str
    """Its name."""
    verdict: Verdict
    """``"note"``: the method runs, but lacks a feature."""
    text: str
    """The observation; for a failure, what to change."""
    seconds: float = 0.0
    """How long it took."""


@dataclass(frozen=True)
class Report:
    """The outcome of all checks of one method."""

    slug: str
    size: str
    """What ran: the method as registered, or how it was scaled down."""
    results: Sequence[Result]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.verdict != "FAIL" for result in self.results)

    def __str__(self) -> str:
        lines = [f"{self.slug}: {self.size}"]
        for result in self.results:
            head = f"  {result.verdict:4}  {result.check:20}  "
            wrapped = textwrap.wrap(result.text, WIDTH - len(head), break_on_hyphens=False)
            first, *rest = wrapped or [""]
            lines += [f"{head}{first}".rstrip(), *(" " * len(head) + line for line in rest)]
        counts = {v: sum(r.verdict == v for r in self.results) for v in ("pass", "note", "FAIL")}
        seconds = sum(result.seconds for result in self.results)
        verdict = "passed" if self.passed else "FAILED"
        lines.append(
            f"  {verdict}: {counts['pass']} passed, {counts['note']} with a note, "
            f"{counts['FAIL']} failed, {seconds:.1f} s"
        )
        return "\n".join(lines)


def describe_error(error: BaseException) -> str:
    """An exception in one line, with the place in the method that raised it.

    The place is the innermost one outside of torch and this package; else the innermost outside of
    torch.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_below(frame.filename, Path(torch.__file__).parent)
    ]
    own = Path(flashdreams.__file__).parent
    outside = [f for f in frames if not _is_below(f.filename, own) or "integrations" in f.filename]
    place = (outside or frames)[-1:]
    where = f" ({Path(place[0].filename).name}:{place[0].lineno} in {place[0].name})" * bool(place)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{where}"


def _is_below(filename: str, folder: Path) -> bool:
    return Path(filename).is_relative_to(folder)
