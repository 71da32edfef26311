"""What SIGTERM does to a run: schedulers send it before they take a machine away."""

import os
import signal
import threading
import time
from types import FrameType

GRACE_S = 5.0
"""Time to close files. torchrun, SLURM and Kubernetes wait for 30 s before they kill."""

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """Somebody has asked the process to end; treated as an interrupt from the keyboard."""


def raise_on_sigterm(grace_s: float = GRACE_S) -> None:
    """Let SIGTERM raise `Terminated` in the main thread, once; further ones change nothing.

    A main thread that hangs in a collective or waits for a device raises nothing: after
    ``grace_s`` seconds the process ends as it is. To be called from the main thread.
    """
    if os.name != "posix":
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes to it as soon as the signal comes, whatever the main thread is doing.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_after, args=(reader, grace_s), daemon=True).start()
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def _end_after(reader: int, grace_s: float) -> None:
    while signal.SIGTERM not in os.read(reader, 64):
        pass
    time.sleep(grace_s)
    os._exit(EXIT_CODE)
