"""The log of a run: its commands and hashes, so that it can be replayed."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from flashdreams.infra.fingerprint import differences
from flashdreams.infra.session import Command
from flashdreams.infra.stored_choices import MAX_LINE_BYTES
from flashdreams.runtime.files import open_owned
from flashdreams.runtime.text import check_regular, quoted, reason_of

LOG_FORMAT = 1
"""Number of the form of the lines; another one is refused."""

SAMPLES = 256
"""Values of each latent that the log keeps, evenly spread, to measure the error of a replay."""

BIT_NEUTRAL = ("degrees", "decode")
"""Entries in which two strict runs may differ and still have the same bits."""


class LogError(ValueError):
    """A log that cannot be replayed."""


class ReplayError(ValueError):
    """A replay whose hashes had to match its log and did not."""


def command_to_json(command: Command) -> dict[str, Any]:
    """A command as JSON values; without the embeddings of a prompt whose text is known."""
    row: dict[str, Any] = {"kind": command.kind, "values": dict(command.values)}
    if command.at_frame is not None:
        row["at_frame"] = command.at_frame
    if command.tensors and "text" not in command.values:
        tensors = {name: x.contiguous() for name, x in command.tensors.items()}
        row["tensors"] = base64.b64encode(save(tensors)).decode()
    return row


def command_from_json(row: Mapping[str, Any]) -> Command:
    """The inverse of ``command_to_json``."""
    tensors = load(base64.b64decode(row["tensors"])) if "tensors" in row else {}
    return Command(
        kind=row["kind"], at_frame=row.get("at_frame"), values=row["values"], tensors=tensors
    )


def turn_row(number: int, autoregressive_index: int, commands: Iterable[Command]) -> dict[str, Any]:
    """The line of a turn: the commands before an AR step.

    A save is logged as a fork, so that a replay needs no folder and leaves no snapshots behind.
    """
    told = [replace(c, kind="fork") if c.kind == "save" else c for c in commands]
    return {
        "turn": number,
        "autoregressive_index": autoregressive_index,
        "commands": [command_to_json(command) for command in told],
    }


def sample_of(latent: Tensor) -> str:
    """`SAMPLES` values of a latent, float32, in base64."""
    flat = latent.detach().float().cpu().numpy().reshape(-1)
    return base64.b64encode(flat[_sampled_places(flat.size)].astype("<f4").tobytes()).decode()


@lru_cache(maxsize=8)
def _sampled_places(count: int) -> np.ndarray:
    """Indices of `sample_of` among so many values; a server needs them after every AR step."""
    places = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float32, device="cpu")
    return places.long().numpy()


def largest_difference(a: str, b: str) -> float | None:
    """Largest difference of two samples; None if their latents have different sizes."""
    x, y = (np.frombuffer(base64.b64decode(text), dtype="<f4") for text in (a, b))
    return float(np.abs(x - y).max()) if len(x) == len(y) else None


class RunLog:
    """Appends to ``log_<slug>.jsonl``: a header, then a line per turn with commands and per step.

    Lines are flushed at once, so they survive a killed process.
    """

    def __init__(self, path: Path, header: Callable[[], Mapping[str, Any]]) -> None:
        """Prepare, without writing.

        Args:
            path: the file, replaced at the first line; its directory is made.
            header: gives the first line's values.
        """
        self.path = self.partial_path = path
        self._header = header
        self._file: BinaryIO | None = None

    @property
    def has_lines(self) -> bool:
        """Whether anything was written."""
        return self._file is not None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            OSError: it cannot be written.
        """
        if self._file is None:
            self._file = open_owned(self.path)
            self._write({"format": LOG_FORMAT, **self._header()})
        self._write(row)

    def resume(self, turns: int) -> int:
        """Continue after the first turns of the existing file; later lines are deleted.

        Commands between those turns and the next one are kept, as far as they precede the last line
        ``{"snapshot": turns}``, if there is one.

        Returns:
            Number of AR steps in the kept lines.
        """
        keep = snapshot = steps = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            row = json.loads(line) if line.endswith(b"\n") else {"turn": turns}
            last = turns if row.get("between_steps") else turns - 1
            if row.get("turn", row.get("step", -1)) > last:
                break
            keep += len(line)
            steps += "step" in row
            if row.get("snapshot") == turns:
                snapshot = keep
        # Never empty in between: a process that is killed here is to be continued as well.
        self._file = open_owned(self.path, snapshot or keep)
        return steps

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # what did not fit on a full disk is lost, and was reported
                self._file.close()

    def finish(self) -> None:
        """Close the file, which is already complete."""
        self.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()


@dataclass
class Replay:
    """A log that is replayed, and its comparison with the replay."""

    header: Mapping[str, Any]
    turns: Mapping[int, list[Command]]
    """Commands, by the number of their turn."""
    steps: Mapping[int, Mapping[str, Any]]
    """Hash and sample of each step, by the number of its turn."""
    opening: Mapping[str, Any] = field(default_factory=dict)
    """Conditions of a served session that replace those of its server: ``text``, ``image``."""
    compared: int = 0
    different: list[int] = field(default_factory=list)
    """Steps with another hash."""
    largest: float = 0.0
    """Largest difference of sampled latent values."""

    def compare(self, row: Mapping[str, Any]) -> None:
        """Compare a step of the replay with the log."""
        logged = self.steps.get(row["step"])
        if logged is None:
            return
        self.compared += 1
        if row["latent_sha256"] == logged["latent_sha256"]:
            return
        self.different.append(row["step"])
        same_size = row.get("latent_shape") == logged.get("latent_shape", row.get("latent_shape"))
        found = largest_difference(row["sample"], logged["sample"]) if same_size else None
        self.largest = max(self.largest, float("inf") if found is None else found)

    def verdict(self, header: Mapping[str, Any]) -> str:
        """One line with the result.

        Args:
            header: of the replay's own log.

        Raises:
            ReplayError: hashes differ that had to be equal: the same method with an equal numerics
                fingerprint, or both strict.
        """
        same = f"replay: {self.compared - len(self.different)} of {self.compared} AR steps have "
        same += "the hashes of the log"
        if not self.different:
            return f"{same}."
        names = [
            line
            for part in ("inputs", "method", "fingerprint")
            for line in differences(dict(self.header[part]), dict(header[part]))
        ]
        strict = self.header["fingerprint"].get("strict") and header["fingerprint"].get("strict")
        neutral = BIT_NEUTRAL if strict else ()
        reasons = [name for name in names if name.split(":")[0] not in neutral]
        first = f"{same}; the first that differs is {self.different[0]}"
        if self.largest == float("inf"):
            first += ", whose latents have another size"
        else:
            first += f", and the largest difference of sampled latent values is {self.largest:.3g}"
        if not reasons:
            raise ReplayError(
                f"{first}. Method and numerics are those of the log, so the hashes had to be equal"
                ", unless a program drove the rollout by other means than Runner.open_session: its "
                "prompt and commands are in no log."
            )
        return f"{first}. The runs differ in {'; '.join(reasons[:5])}."


def _read_opening(row: Mapping[str, Any]) -> dict[str, Any]:
    tensors = load(base64.b64decode(row["tensors"])) if "tensors" in row else {}
    return {"text": [row["text"]], **tensors} if "text" in row else dict(tensors)


def _check_kinds(row: Mapping[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} cannot be {quoted(row[name])}")


def _rows(file: BinaryIO) -> Iterator[Any]:
    """The lines of a log, one at a time, so that reading stops at the first invalid one."""
    while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("a line is not an object")
        yield row
    if len(line) == MAX_LINE_BYTES:
        raise ValueError(f"a line is longer than {MAX_LINE_BYTES} bytes")


def read_log(path: Path) -> Replay:
    """Read a log; an incomplete last line is ignored.

    Raises:
        LogError: it cannot be read, or is not a log.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            rows = list(_rows(file))
        header = rows[0] if rows else {}
        if header.get("format", LOG_FORMAT) != LOG_FORMAT:
            raise LogError(
                f"{path} has log format {header['format']}; this release reads {LOG_FORMAT}."
            )
        if not {"format", "config", "fingerprint", "inputs", "method"} <= header.keys():
            raise ValueError("its first line is not that of a run")
        turns: dict[int, list[Command]] = {}
        for row in (row for row in rows[1:] if "turn" in row):
            told = [command_from_json(command) for command in row["commands"]]
            turns.setdefault(row["turn"], []).extend(told)
        steps = {row["step"]: row for row in rows[1:] if "step" in row}
        _check_kinds(header, config=str | None, fingerprint=dict, inputs=dict, method=dict)
        _check_kinds({"opening": header.get("opening", {})}, opening=dict)
        for row in (row for row in rows[1:] if "turn" in row):
            _check_kinds(row, turn=int)
        for row in steps.values():
            _check_kinds(row, step=int, latent_sha256=str)
            largest_difference(row["sample"], row["sample"])
        return Replay(header, turns, steps, _read_opening(header.get("opening", {})))
    except LogError:
        raise
    except OSError as error:
        raise LogError(f"--replay {path} cannot be read: {reason_of(error)}.") from error
    except Exception as error:  # safetensors has its own errors
        reason = f"a line has no {error}" if isinstance(error, KeyError) else error
        raise LogError(
            f"--replay {path} is not a log of a run ({reason}). Runs write log_<slug>.jsonl into "
            "their output folder."
        ) from error
