"""State of sessions on disk, from which another process can continue them."""

import contextlib
import functools
import glob
import hashlib
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from flashdreams.infra.identity import describe_config, hash_weights
from flashdreams.infra.snapshot import remove_unfinished
from flashdreams.infra.snapshot_header import SnapshotError, check_identity, read_header
from flashdreams.runtime.files import InUseError, open_owned, write_whole
from flashdreams.runtime.text import reason_of
from flashdreams.serving.interface import Refused
from flashdreams.serving.live import LiveSession

logger = logging.getLogger(__name__)

_SESSION = re.compile(r"[\w-]{16,64}", re.ASCII)
_SNAPSHOT = re.compile(r"state-(\d{8})")
_OPENING = "opening.safetensors"
_IN_USE = ".in-use"
"""File that a running server locks; without file locks no server waits for another."""
ADOPT_S = 30.0
"""How long a server that takes over a session waits for the old one to write it."""


class SessionFolder:
    """``<state_dir>/<session>``: its newest snapshot ``state-<n>``, its initial tensors, ``saves``.

    On rank zero. A session's name is its token, so only the owner may list the folder.
    """

    def __init__(self, root: Path, pipeline: Any) -> None:
        """Make the folder.

        Args:
            root: the folder.
            pipeline: config of the served pipeline; snapshots of other pipelines are not touched.

        Raises:
            ValueError: it cannot be created.
        """
        self.root = root
        self._pipeline = pipeline
        self._claim: BinaryIO | None = None
        with self._written():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def snapshot_path(self, session: str, number: int) -> Path:
        """Path of a snapshot."""
        return self.root / session / f"state-{number:08d}"

    def keep_opening(self, live: LiveSession) -> bool:
        """Write the initial tensors of a session, once, for a reset after a restart.

        Returns:
            Whether they are on disk; if not, the reason is logged.
        """
        from safetensors.torch import save

        path = self.root / live.id / _OPENING
        try:
            if live.tensors and live.opening_sha256 is None:
                data = save({n: x.contiguous() for n, x in live.tensors.items()})
                path.parent.mkdir(exist_ok=True, mode=0o700)
                with write_whole(path) as file:
                    file.write(data)
                live.opening_sha256 = hashlib.sha256(data).hexdigest()
        except OSError as error:
            logger.warning("A session lives without a copy on disk: %s", error)
            return False
        return True

    def forget_older(self, newest: Path) -> None:
        """Delete all snapshots of a session but the newest; failures are logged."""
        try:
            paths = list(newest.parent.iterdir())
        except OSError as error:
            logger.warning("Older snapshots of a session stay: %s", error)
            return
        for path in paths:
            if _SNAPSHOT.fullmatch(path.name) and path != newest:
                self._remove(path)

    def forget(self, session: str) -> None:
        """Delete all data of a session; failures are logged."""
        self._remove(self.root / session)

    def find(self) -> list[LiveSession]:
        """The sessions that can be continued.

        Damaged snapshots and those of other methods are logged and not changed.
        """
        remove_unfinished(self.root)
        found = []
        for folder in sorted(self.root.iterdir()):
            if _SESSION.fullmatch(folder.name) and folder.is_dir():
                remove_unfinished(folder)
                remove_unfinished(folder / "saves")
                kept = self.read(folder)
                found += [] if kept is None else [kept]
        return found

    def claim(self) -> None:
        """Lock the folder, so that other servers do not take over its sessions.

        Raises:
            ValueError: another server holds the lock, or the folder cannot be written.
        """
        with self._written():
            self._claim = open_owned(self.root / _IN_USE)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            in_use = isinstance(error, InUseError)
            reason = f"cannot be written: {reason_of(error)}"
            raise ValueError(
                f"--state-dir {self.root}{': another server uses it' if in_use else f' {reason}'}. "
                "Name another folder."
            ) from error

    def give_up(self) -> None:
        """Release the lock: all sessions are on disk, and another server may take them over."""
        if self._claim is not None:
            self._claim.close()

    def adopt(self, session: str, among: Path) -> LiveSession | None:
        """Take over a session from the folder of another server.

        Its folder is renamed, so that only one of several servers gets it. If the other server
        still runs or is writing its sessions, this waits until it has ended.

        Args:
            session: its identifier, as sent by a client.
            among: folder of the servers' folders.

        Returns:
            None: there is none, or its snapshot is damaged or of another method.

        Raises:
            Refused: the other server still has it.
        """
        if not _SESSION.fullmatch(session):  # before it is used as the name of a folder
            return None
        for folder in sorted(among.glob(f"*/{glob.escape(session)}")):
            if folder.parent == self.root:
                continue
            _await_end(folder.parent)
            if self.read(folder) is None:
                continue
            own = self.root / session
            try:
                folder.rename(own)
            except OSError as error:  # another server was faster
                logger.warning("A session cannot be taken over: %s", reason_of(error))
                continue
            remove_unfinished(own)
            remove_unfinished(own / "saves")
            return self.read(own)
        return None

    @functools.cached_property
    def _identity(self) -> tuple[Any, Any]:
        return describe_config(self._pipeline), hash_weights(self._pipeline)

    def read(self, folder: Path) -> LiveSession | None:
        """The session of a folder; None: it cannot be continued, and the reason is logged."""
        try:
            names = [path.name for path in folder.iterdir() if _SNAPSHOT.fullmatch(path.name)]
        except OSError as error:
            logger.warning("A session cannot be continued: %s", error)
            return None
        saves = folder / "saves"
        for name in sorted(names, reverse=True):  # the newest first
            try:
                header = read_header(folder / name)
                check_identity(header, *self._identity, folder / name)
                if header.run["session"] != folder.name:
                    raise SnapshotError("it is of another session")
                return LiveSession.from_json(
                    header.run,
                    snapshot=folder / name,
                    snapshots=int(name.removeprefix("state-")),
                    tensors=_read_opening(folder / _OPENING, header.run["opening_sha256"]),
                    saves=sorted(p.name for p in saves.iterdir()) if saves.is_dir() else [],
                )
            except (SnapshotError, OSError, LookupError) as error:
                logger.warning("A session cannot be continued: %s", error)
        return None

    def _remove(self, path: Path) -> None:
        dying = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.rename(dying)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("What is kept of a session stays on disk: %s", error)
            return
        shutil.rmtree(dying, ignore_errors=True)


def _await_end(folder: Path) -> None:
    """Wait until no server holds the lock of a folder of sessions."""
    limit = time.monotonic() + ADOPT_S
    while True:
        try:
            open_owned(folder / _IN_USE).close()
            return
        except InUseError:
            if time.monotonic() > limit:
                raise Refused("Another server has this session, and still runs.") from None
        except OSError:  # its folder has gone
            return
        time.sleep(0.1)


def _read_opening(path: Path, sha256: str | None) -> dict[str, Tensor]:
    from safetensors.torch import load

    if sha256 is None:
        return {}
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SnapshotError(f"{path} is damaged: its checksum is another one")
    return load(data)
