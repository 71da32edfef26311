"""A stream for messages and progress bars whose loss is not an error."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast


class LossyStream:
    """Writes text to a stream, and drops text that cannot be written.

    A full disk behind ``2>`` or a terminal that has gone away would otherwise end a run in the
    middle of a progress bar, and change the exit code of one that is done.
    """

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream, such as ``sys.stderr``.

        Args:
            stream: the stream to write to; other attributes are delegated to it.
        """
        self._stream = stream
        self.begins_line = True
        """Whether what is written next begins a line; a progress bar leaves its line open."""

    def write(self, text: str) -> int:
        """Write, or drop, a text; gives its length either way."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
            self.begins_line = text.endswith("\n") if text else self.begins_line
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the system, if it takes it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Let the process run silently if it was started without them (``>&- 2>&-``).

    Where the terminal's encoding lacks a character, such as those of a Chinese default in the help
    of an option, it is written as an escape.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    errors = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = cast(TextIO, LossyStream(errors))
