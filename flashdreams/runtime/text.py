"""Size-limited text from files and in messages."""

import contextlib
import os
import re
import selectors
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flashdreams.infra.config import quoted

MAX_MESSAGE_CHARACTERS = 4000
"""Most characters of one error message."""

PIPE_S = 30.0
"""Seconds to wait for a named pipe."""

_PLAIN_NAME = re.compile(r"[\w./+-]{1,200}", re.ASCII)


def read_text(path: Path, most_bytes: int, encoding: str = "utf-8") -> str:
    """Read a text file that must not be larger than a limit; also a pipe or a device.

    Waits at most `PIPE_S` seconds for a named pipe.

    Args:
        path: the file.
        most_bytes: the limit; no more than this and one byte is read.
        encoding: of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger, or not text; states only which, for the caller to name the file.
    """
    if stat.S_ISFIFO(path.stat().st_mode):
        content = _read_pipe(path, most_bytes + 1)
    else:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def check_regular(path: Path) -> None:
    """Refuse, before opening it, a file that may block, such as a pipe, or never end.

    Raises:
        OSError: it does not exist.
        ValueError: it is not a regular file; states only that, for the caller to name it.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")


def _read_pipe(path: Path, most_bytes: int) -> bytes:
    """What is written into a named pipe until it is closed, or the limit is reached."""
    found, end = bytearray(), time.monotonic() + PIPE_S
    # A blocking open would wait for a writer without a limit.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb", buffering=0) as file, selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(found) < most_bytes:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise ValueError(f"it is a pipe that was not closed within {PIPE_S:g} s")
            block = file.read(most_bytes - len(found))
            if not block:
                break
            found += block
    return bytes(found)


def reason_of(error: BaseException) -> str:
    """What the system says of an error, without a path, which the message has already; or all."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def unreadable(what: str, remedy: str) -> Iterator[None]:
    """Turn the error of a file that cannot be read into one line.

    Args:
        what: names the file, such as ``--prompt-path x.txt``.
        remedy: a sentence.

    Raises:
        ValueError: the line.
    """
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {reason_of(error)}. {remedy}") from error


def shown(name: object) -> str:
    """A name from a file unchanged if it is short and plain, else quoted and cut."""
    text = str(name) if isinstance(name, (str, int)) else quoted(name)
    return text if _PLAIN_NAME.fullmatch(text) else quoted(name)


def printable(text: str, most: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Text for a terminal: control characters escaped, and no longer than ``most`` characters.

    Line breaks and characters of all languages are kept.
    """
    text = _cut(text, most)
    escaped = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return escaped if len(escaped) == len(text) else _cut(escaped, most)


def _cut(text: str, most: int) -> str:
    """Beginning and end of a text that is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    half = (most - 60) // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def say(text: str, beside: bool = False) -> None:
    """Print a line on stderr on a new line, even with a progress bar.

    A closed terminal is not an error.

    Args:
        text: the line, already `printable`.
        beside: another process may have a progress bar on the same terminal.
    """
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    with contextlib.suppress(OSError, ValueError):
        for bar in list(getattr(bars, "_instances", ())):
            bar.close()
    # A bar that its own thread is just closing may not have ended its line yet.
    beside = beside or not getattr(sys.stderr, "begins_line", True)
    with contextlib.suppress(OSError, ValueError):
        print("\n" * beside + text, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print an informational line of a run on stdout.

    A closed pipe or a full disk is not an error of the run. Control characters, and those
    that the stream cannot encode, are escaped.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
