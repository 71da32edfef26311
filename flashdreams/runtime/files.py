"""Files with one writer that get their final name when complete, and readable errors."""

import errno
import os
import stat
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flashdreams.runtime.text import reason_of

if sys.platform != "win32":
    import fcntl

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Error numbers of a file system without locks."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class InUseError(OSError):
    """Another process, or another writer of this one, is writing the same file."""


def open_owned(path: Path, keep: int = 0) -> BinaryIO:
    """Open a file for writing that nobody else writes as long as it stays open.

    A link with that name is removed, not followed.

    The lock belongs to the open file: a killed process leaves none, and it moves with the file when
    that is renamed. File systems without locks provide none.

    Args:
        path: the file; its directory is made where it does not exist.
        keep: bytes at its beginning that stay, behind which is written; the rest is deleted.

    Raises:
        InUseError: another writer has it.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        if path.is_symlink():
            path.unlink()
        file = open(path, "r+b", opener=_create)  # noqa: SIM115 (its caller closes it)
        try:
            _lock(file, path)
            if os.fstat(file.fileno()).st_nlink > 1:
                path.unlink()
            elif _has_name(file, path):
                size = os.fstat(file.fileno()).st_size
                if size < keep:
                    raise OSError(errno.EIO, "it was replaced while it was read", str(path))
                if size > keep:
                    file.truncate(keep)
                file.seek(keep)
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its owner renamed or removed it in between


def open_partial(path: Path, suffix: str) -> tuple[BinaryIO, Path, Path]:
    """Open a file for partial output before it gets its final name.

    Args:
        path: the final name.
        suffix: replacement of its extension, e.g. ``".partial.mp4"``.

    Returns:
        The file as from `open_owned`, its name ``<stem><suffix>``, and its final name. Both names
        have a number before their extension if others are writing files with these names.

    Raises:
        OSError: it cannot be written.
    """
    for number in ("", *(f".{n}" for n in range(2, 100))):
        partial = path.with_name(f"{path.stem}{number}{suffix}")
        with suppress(InUseError):
            return open_owned(partial), partial, path.with_name(f"{path.stem}{number}{path.suffix}")
    raise InUseError(errno.EBUSY, f"99 others are writing {path}", str(path))


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(file: BinaryIO, path: Path) -> None:
    if sys.platform != "win32" and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{path} is being written by another run"
            raise InUseError(error.errno, message, str(path)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def give_name(file: BinaryIO, path: Path, name: Path | None) -> None:
    """Rename or remove a file that this process owns.

    Args:
        file: from `open_owned`; it stays open, and so nobody else's, except on Windows, which
            neither locks it nor renames an open file.
        path: its name.
        name: its new name, replacing a file that has it; None: the file is removed.

    Raises:
        OSError: it cannot be done.
    """
    if sys.platform == "win32":
        file.close()
    if name is None:
        path.unlink(missing_ok=True)
    else:
        path.replace(name)


class OutputGuard:
    """Detects that a file which a run is writing has been removed, renamed or replaced."""

    def __init__(self, path: Path) -> None:
        """Look at the file, which exists.

        Raises:
            OSError: it does not.
        """
        self.path = path
        self._place = self._look()

    def check(self) -> None:
        """Refuse to continue writing into a file that has lost its name; takes microseconds.

        Raises:
            FileNotFoundError: the name does not exist, or belongs to another file.
        """
        try:
            same = self._look() == self._place
        except OSError:
            same = False
        if not same:
            reason = "it was removed, renamed or replaced during the run"
            raise FileNotFoundError(errno.ENOENT, reason, str(self.path))

    def _look(self) -> tuple[int, int]:
        status = os.lstat(self.path)
        return status.st_dev, status.st_ino


@contextmanager
def write_whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a file that gets its final name at the end of the ``with`` block.

    It is written in the same folder. If the block fails, it is removed, and an existing file
    stays.

    Args:
        path: the file; its directory is made where it does not exist.
        sync: sync it to disk before it gets its name.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process number would not be enough: two machines may share the folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_target(path: Path, option: str, taken: Collection[Path] = ()) -> None:
    """Refuse a file that could not get its name at the end, before anything is made for it.

    Args:
        path: of `write_whole`; its directory is made where it does not exist.
        option: what names it.
        taken: other files that the program writes.

    Raises:
        ValueError: one line with the reason.
    """
    reason = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device would be replaced by a file
            reason = "it exists and is not a regular file"
        elif path.resolve() in {other.resolve() for other in taken}:
            reason = "the run writes another file of this name"
        elif not os.access(path.parent, os.W_OK):
            reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = reason_of(error)
    if reason is not None:
        raise ValueError(f"{option} {path} cannot be written: {reason}. Name another file.")


def remedy(error: OSError) -> str:
    """What to do about a file that could not be written."""
    full = error.errno in _FULL or os.strerror(errno.ENOSPC) in str(error)
    if full:
        return "Free some space or choose another directory (--output-dir)."
    return "Choose another directory (--output-dir)."


@contextmanager
def readable_write_errors(path: Path, partial_path: Path | None = None) -> Iterator[None]:
    """Turn a failed write into one line that says what to do.

    Args:
        path: the file that was to be written.
        partial_path: the file that has what was written before; None: there is none.

    Raises:
        OSError: the line, instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        kept = ""
        if partial_path is not None and os.path.exists(partial_path):
            kept = f" What was written so far is in {partial_path}."
        raise OSError(
            f"{path} could not be written: {reason_of(error)}. {remedy(error)}{kept}"
        ) from error
