"""What a command does before it has imported anything; imports next to nothing itself."""

import contextlib
import os
import signal
import sys
from types import FrameType


def begin_command(program: str) -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the process with one line, until others handle them.

    So does a working directory that was deleted: libraries of PyTorch crash in one.

    Nothing is to be cleaned up yet, and what is being imported must not see an exception: some
    packages swallow it, others crash. To be called from the main thread.

    Args:
        program: that says so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        with contextlib.suppress(OSError):  # nobody listens
            os.write(2, f"{program}: {word}\n".encode())
        os._exit(128 + number)

    try:
        os.getcwd()
    except OSError as error:
        sys.stderr.write(f"{program}: error: the working directory: {error.strerror}\n")
        sys.exit(2)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)
