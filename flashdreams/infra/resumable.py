"""Runs that survive a crash: snapshots in a ring, and resuming from the newest complete one."""

import json
import logging
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flashdreams.infra.controller import Controller
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.rollout import StreamInferencePipelineCache
from flashdreams.infra.snapshot import remove_unfinished
from flashdreams.infra.snapshot_header import SnapshotError, read_header
from flashdreams.parallel.environment import (
    Launch,
    OtherRankError,
    all_ranks_agree,
    from_rank_zero,
    group_rank,
    least_of_all_ranks,
)
from flashdreams.runtime.files import write_whole
from flashdreams.runtime.text import read_text, reason_of, unreadable

logger = logging.getLogger(__name__)

MARK_NAME = "run.json"
"""The file that identifies the run of a folder."""

SHARED_FOLDER_S = 10.0
"""Seconds that a rank waits to see the mark that rank zero has written."""

MAX_MARK_BYTES = 4096
_SNAPSHOT = re.compile(r"step-(\d{8})")


class Progress(NamedTuple):
    """Progress of a resumed run."""

    seed: int
    cache: StreamInferencePipelineCache
    turns: int
    """AR steps that were made."""


class ResumableRun:
    """The folder ``<output_dir>/resume_<slug>`` of one run and its snapshots.

    A run has a token; snapshots and segments are in a folder of that name. A run that starts over
    takes a new token, so it never reads the snapshots of an earlier one; these can be resumed until
    `begin`, and are deleted when its own first snapshot is complete. All calls are collective; rank
    zero alone writes.
    """

    def __init__(
        self, folder: Path, launch: Launch, *, every: int, kept: int, resume: bool
    ) -> None:
        """Determine whether this process continues a run.

        Args:
            folder: as above.
            launch: launch id and restart count of this process.
            every: AR steps between snapshots; 0 saves none.
            kept: number of snapshots to keep; older ones are deleted.
            resume: continue the run of the folder, whichever process started it.
        """
        self.folder, self.every, self.kept = folder, every, kept
        # An agent that joined later counts fewer restarts than the others.
        self._launch = replace(launch, restarts=-least_of_all_ranks(-launch.restarts))
        self.token, self.goes_on = from_rank_zero(lambda: self._find(resume))
        if every > 0 or self.goes_on:
            self._require_shared_folder()

    def _require_shared_folder(self) -> None:
        """Refuse a folder that ranks on other nodes do not share with rank zero; collective.

        Raises:
            ValueError: on a rank that does not see what rank zero has made there.
            OtherRankError: on the others.
        """
        sees = self._sees_home()
        if all_ranks_agree(sees):
            return
        if sees:
            raise OtherRankError("Another rank does not see the folder of the snapshots.")
        raise ValueError(
            f"Rank {group_rank()} on {socket.gethostname()} does not see "
            f"{self.home}, which rank zero has made. Several nodes need a file system that all of "
            "them share: name a folder on it with --output-dir, or leave --snapshot-every away."
        )

    def _sees_home(self) -> bool:
        """Whether this rank sees the run's folder; with some time for network file systems."""
        deadline = time.monotonic() + SHARED_FOLDER_S
        while not self.home.is_dir():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    @property
    def home(self) -> Path:
        """Folder of this run's snapshots and segments."""
        return self.folder / self.token

    def resume(
        self, pipeline: StreamInferencePipeline, controller: Controller | None
    ) -> Progress | None:
        """The rollout of the newest complete snapshot; None if the run starts over."""
        if not self.goes_on:
            return None
        for name in from_rank_zero(self._newest_first):
            path = self.home / name
            try:
                cache = pipeline.resume(path, controller=controller)
                run = from_rank_zero(partial(_run_of, path))
            except (SnapshotError, OtherRankError) as error:
                logger.warning("%s Trying an older snapshot.", error)
                continue
            return Progress(run["seed"], cache, run["turns"])
        return None

    def begin(self) -> None:
        """Take the place of the folder's earlier run, whose files this one replaces."""
        if not self.goes_on:
            from_rank_zero(self._write_mark)

    def _write_mark(self) -> None:
        mark = self.folder / MARK_NAME
        if self.every > 0:
            with write_whole(mark, sync=True) as file:
                file.write(json.dumps({"token": self.token, **asdict(self._launch)}).encode())
        elif mark.is_file():
            mark.unlink()

    def leave(self) -> None:
        """Remove the folders of a run that has nothing in them. On rank zero."""
        with suppress(OSError):  # they have
            self.home.rmdir()
            self.folder.rmdir()

    def choices(self) -> Mapping[str, Any] | None:
        """Numerics fingerprint of the newest snapshot with a complete header; None without one."""
        return from_rank_zero(self._read_choices) if self.goes_on else None

    def _read_choices(self) -> Mapping[str, Any] | None:
        for name in self._newest_first():
            with suppress(SnapshotError):
                return read_header(self.home / name).fingerprint
        return None

    def is_due(self, autoregressive_index: int) -> bool:
        """Whether a snapshot is due after so many AR steps."""
        return self.every > 0 and autoregressive_index % self.every == 0

    def save(
        self, pipeline: StreamInferencePipeline, cache: StreamInferencePipelineCache, run: Any
    ) -> None:
        """Save a snapshot and delete older ones; the run continues if it fails.

        Args:
            pipeline: of the rollout.
            cache: between AR steps.
            run: JSON values for ``Progress``.
        """
        path = self.home / f"step-{cache.next_index:08d}"
        try:
            from_rank_zero(lambda: self._forget(path))
            report = pipeline.save(cache, path, run=run)
            from_rank_zero(self._trim)
        except (OSError, OtherRankError) as error:
            logger.warning("No snapshot before AR step %d: %s The run continues.",
                           cache.next_index, error)  # fmt: skip
            return
        logger.info("snapshot before AR step %d: %s", cache.next_index, report)

    def finish(self) -> None:
        """End the run: keep its snapshots, delete its segments and its mark. On rank zero."""
        shutil.rmtree(self.home / "segments", ignore_errors=True)
        (self.folder / MARK_NAME).unlink(missing_ok=True)

    def _find(self, resume: bool) -> tuple[str, bool]:
        """The token, and whether that run continues; on rank zero."""
        mark = self.folder / MARK_NAME
        earlier = _read_mark(mark)
        restarted = self._launch.restarts > 0 and earlier.get("run_id") == self._launch.run_id
        token = str(earlier.get("token", ""))
        if re.fullmatch("[0-9a-f]{8}", token) and (resume or restarted):
            (self.folder / token).mkdir(exist_ok=True)
            remove_unfinished(self.folder / token)
            return token, True
        token = uuid.uuid4().hex[:8]
        if self.every > 0:
            try:
                (self.folder / token).mkdir(parents=True)
            except OSError as error:
                raise ValueError(
                    f"--output-dir: {self.folder} cannot be written: {reason_of(error)}. Name "
                    "another folder."
                ) from error
        if resume:
            logger.info("%s has no run to continue; this one starts over.", self.folder)
        return token, False

    def _newest_first(self) -> list[str]:
        return sorted((p.name for p in self._snapshots()), reverse=True)

    def _snapshots(self) -> list[Path]:
        found = self.home.iterdir() if self.home.is_dir() else ()
        return sorted(path for path in found if _SNAPSHOT.fullmatch(path.name))

    def _trim(self) -> None:
        for path in self._snapshots()[: -self.kept]:
            self._forget(path)
        for other in self.folder.iterdir():
            if other.is_dir() and other != self.home:
                shutil.rmtree(other, ignore_errors=True)

    def _forget(self, path: Path) -> None:
        """Delete a snapshot, after renaming it, so that a partial one never has its name."""
        if path.exists():
            dying = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            path.rename(dying)
            shutil.rmtree(dying, ignore_errors=True)


def _run_of(path: Path) -> dict[str, Any]:
    return dict(read_header(path).run)


def _read_mark(mark: Path) -> dict[str, Any]:
    """What an earlier process has written about its run; empty without one."""
    with unreadable(f"--output-dir: {mark}", "Remove it to start over."):
        if not mark.is_file():
            return {}
        found = json.loads(read_text(mark, MAX_MARK_BYTES))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    return found
