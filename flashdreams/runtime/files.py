"""Files that get their final name only when they are whole, and errors that people can read."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing; what had the name before, also a link, is removed, not followed.

    Raises:
        OSError: the file cannot be made; its directory must exist.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666), "wb")


class OutputGuard:
    """Notices that a file which a run still writes has been removed, renamed or replaced."""

    def __init__(self, path: Path) -> None:
        """Look at the file, which exists.

        Raises:
            OSError: it does not.
        """
        self.path = path
        self._place = self._look()

    def check(self) -> None:
        """Refuse to go on writing into a file that nobody will find; takes microseconds.

        Raises:
            FileNotFoundError: the name is gone, or belongs to another file.
        """
        try:
            same = self._look() == self._place
        except OSError:
            same = False
        if not same:
            reason = "it was removed, renamed or replaced while the run went on"
            raise FileNotFoundError(errno.ENOENT, reason, str(self.path))

    def _look(self) -> tuple[int, int]:
        status = os.lstat(self.path)
        return status.st_dev, status.st_ino


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name at the end of the ``with`` block.

    It is written beside its place. If the block fails, it is removed, and what had the name before
    stays.

    Args:
        path: the file; its directory is made where it does not exist.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open_new(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def readable_write_errors(path: Path, partial_path: Path) -> Iterator[None]:
    """Turn a failed write into one line that says what to do.

    Args:
        path: the file that was to be written.
        partial_path: the file that has what was written before.

    Raises:
        OSError: the line, in the place of the system's error.
    """
    try:
        yield
    except OSError as error:
        kept = f" What was written before is in {partial_path}." if partial_path.exists() else ""
        raise OSError(
            f"{path} could not be written: {error.strerror or error}. Free some space or choose "
            f"another directory (--output-dir).{kept}"
        ) from error
