"""Logs of served sessions, in the format of ``flashdreams-run --replay``."""

import base64
import hashlib
import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from flashdreams.infra.run_log import RunLog, sample_of, turn_row
from flashdreams.infra.runner import Runner
from flashdreams.infra.session import Command, Session, Step, Turn
from flashdreams.runtime.files import readable_write_errors
from flashdreams.runtime.stats import sha256_of
from flashdreams.runtime.transfer import copy_to_host

MAX_COPIES = 4
"""Maximum number of copied latents not yet hashed; beyond it the loop waits for the oldest."""

logger = logging.getLogger(__name__)


class SessionLogs:
    """One file for each session: ``log_<slug>_<hash of its token>.jsonl``; on rank zero.

    Commands between AR steps have separate lines with the number of the next turn. One thread
    hashes latents and writes the logs; an error ends the log of that session, not the session.
    """

    def __init__(self, runner: Runner[Any, Any], folder: Path, kept: int) -> None:
        """Store the arguments; writes nothing.

        Args:
            runner: runner of the served method.
            folder: folder of the logs; created with the first log.
            kept: number of logs to keep, newest first; logs in use are never deleted.
        """
        self.runner, self.folder, self.kept = runner, folder, kept
        self._logs: dict[str, RunLog] = {}
        self._copies: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session-log")

    def path(self, session: str) -> Path:
        """Path of a session's log; it does not reveal the token."""
        name = hashlib.sha256(session.encode()).hexdigest()[:16]
        return self.folder / f"log_{self.runner.config.runner_name}_{name}.jsonl"

    def begin(self, session: Session, prompt: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Log a session from its first turn on.

        Args:
            session: a session before its first AR step.
            prompt: its own prompt; None: the server's.
            tensors: its own ``text`` and ``image``.
        """
        self.flush()
        self._forget_old()
        header = self._header(session.seed, prompt if "text" in tensors else None, tensors)
        self._follow(session, RunLog(self.path(session.name), lambda: header))

    def resume(self, session: Session) -> None:
        """Continue the log of a resumed session; lines after its ``turns`` are dropped."""
        self.flush()
        log = RunLog(self.path(session.name), dict)
        try:
            steps = log.resume(session.turns)
        except (OSError, ValueError):
            steps = -1
        if steps < session.turns:  # a replay would miss commands
            logger.warning("The log of a session is missing or has gaps; it is not continued.")
            log.close()
            return
        self._follow(session, log)

    def _follow(self, session: Session, log: RunLog) -> None:
        def note(number: int, turn: Turn) -> None:
            if turn.commands:
                row = turn_row(number, turn.autoregressive_index, turn.commands)
                self._thread.submit(self._append, session.name, row)

        self._logs[session.name], session.on_turn = log, note

    def note(self, session: Session, command: Command) -> None:
        """Log a command that was carried out between AR steps."""
        row = turn_row(session.turns, session.cache.next_index, (command,))
        row["between_steps"] = True
        self._thread.submit(self._append, session.name, row)

    def note_snapshot(self, session: Session) -> None:
        """Log that a snapshot has all commands so far."""
        self._thread.submit(self._append, session.name, {"snapshot": session.turns})

    def note_step(self, session: Session, step: Step) -> None:
        """Queue the latent of an AR step for hashing."""
        latent, number = step.cache.latent, session.turns - 1
        if session.name not in self._logs or latent is None:
            return
        while len(self._copies) >= MAX_COPIES:
            wait([self._copies.popleft()])
        copy, arrived = copy_to_host(latent)
        self._copies.append(self._thread.submit(self._hash, session.name, number, copy, arrived))

    def _hash(
        self, session: str, number: int, latent: Tensor, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        row = {"step": number, "latent_sha256": sha256_of(latent), "sample": sample_of(latent)}
        self._append(session, row)

    def _append(self, session: str, row: Mapping[str, Any]) -> None:
        log = self._logs.get(session)
        if log is None:
            return
        try:
            with readable_write_errors(log.path, log.path):
                if not self.folder.is_dir():
                    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # users' prompts
                log.append(row)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s The session continues without its log.", error)
            self._close(session)

    def close(self, session: str) -> None:
        """End the log of a session that left the device; ``resume`` can continue it."""
        self._thread.submit(self._close, session)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._thread.submit(lambda: None).result()

    def _close(self, session: str) -> None:
        log = self._logs.pop(session, None)
        if log is not None:
            log.close()

    def _header(self, seed: int, text: str | None, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        header = self.runner.recorder.log_header(replace(self.runner.config, seed=seed))
        opening: dict[str, Any] = {} if text is None else {"text": text}
        own = {name: x.contiguous() for name, x in tensors.items() if name == "image"}
        if own:
            opening["tensors"] = base64.b64encode(save(own)).decode()
        return header | {"opening": opening, "served": True}

    def _forget_old(self) -> None:
        """Delete the oldest logs to make room for one more."""
        busy = {log.path for log in self._logs.values()}
        found = sorted(self.folder.glob("log_*.jsonl"), key=_age) if self.folder.is_dir() else []
        free = [path for path in found if path not in busy]
        for path in free[: max(0, len(found) + 1 - self.kept)]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("An old log stays: %s", error)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another server has deleted it
        return 0.0
