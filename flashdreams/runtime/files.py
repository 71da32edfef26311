"""Files that get their final name only when they are whole, and errors that people can read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def write_whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a file that gets its name at the end of the ``with`` block.

    It is written beside its place. If the block fails, it is removed, and what had the name before
    stays.

    Args:
        path: the file; its directory is made where it does not exist.
        sync: wait until the disk has it before it gets its name.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
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
