"""Termination of a process by a scheduler, a terminal, a user or a deadline."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

GRACE_S = 5.0
"""Time to close files. torchrun, SLURM and Kubernetes wait for 30 s before they kill."""

IMPORT_GRACE_S = 1.0
"""Time for an import to end before a signal takes effect."""

FINISH_S = 4.0
"""Time for what is registered with `atexit` where the main thread hangs."""

IMPORT_DEADLINE_S = 300.0
"""Limit of the imports and of reading the command line."""

EXIT_CODE = 128 + signal.SIGTERM

DEADLINE_EXIT_CODE = 75
"""Exit code of a process whose deadline has passed."""

_PERIOD_S = 0.05


class Terminated(KeyboardInterrupt):
    """The process was asked to end; treated as an interrupt from the keyboard."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """Of a process that ends for this signal."""


def raise_on_sigterm(
    grace_s: float = GRACE_S, before_end: Callable[[int], None] = lambda number: None
) -> None:
    """Let SIGTERM, SIGHUP and SIGINT raise in the main thread, once; further ones change nothing.

    SIGTERM and SIGHUP (unless it is ignored, as under nohup) raise `Terminated`, SIGINT
    `KeyboardInterrupt`. While a module is imported nothing is raised: packages swallow such errors,
    or crash when the import is repeated. The signal then waits for the end of the import, for
    ``IMPORT_GRACE_S`` seconds, after which `end_now` ends the process.

    If the main thread hangs in a collective or on a device, nothing is raised: after
    ``grace_s`` seconds `end_now` ends the process. To be called from the main thread.

    Args:
        grace_s: time for the main thread to end by itself.
        before_end: is called with the signal before the process is ended without its main thread.
    """
    if sys.platform == "win32":  # Ctrl-C only
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return
    numbers = {signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.add(signal.SIGHUP)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes to it as soon as the signal comes, whatever the main thread is doing.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    arguments = (reader, grace_s, numbers, before_end)
    threading.Thread(target=_end_after, args=arguments, daemon=True).start()
    asked: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        if _is_importing(frame):
            if asked[-1] - asked[0] > IMPORT_GRACE_S:
                before_end(number)
                end_now(128 + number)
            again = threading.Timer(_PERIOD_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    for number in numbers:
        signal.signal(number, stop)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_after(
    reader: int, grace_s: float, numbers: set[signal.Signals], before_end: Callable[[int], None]
) -> None:
    found: list[signal.Signals] = []
    while not found:
        came = os.read(reader, 64)
        found = [number for number in numbers if number in came]
    time.sleep(grace_s)
    number = found[0]
    before_end(number)
    end_now(128 + number)


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process, quickly, once all is written.

    Args:
        code: exit code.
        at_once: end it as `end_now` does, without the interpreter's own end.
    """
    # The interpreter's own end may be cut short by a second signal.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # not all of them on Windows
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if at_once:
        end_now(code)
    # Otherwise the interpreter looks through all of PyTorch for rubbish once more, for a second.
    gc.freeze()
    sys.exit(code)


def end_now(code: int, limit_s: float = FINISH_S) -> None:
    """End the process whatever its main thread is doing, after the functions of `atexit`.

    So a hung run leaves the same files as an interrupted one.

    Args:
        code: exit code.
        limit_s: time for the registered functions, which may hang as well.
    """
    # As multiprocessing does it in its children.
    finisher = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    finisher.start()
    finisher.join(limit_s)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def ends_after(limit_s: float, report: Callable[[], None]) -> Iterator[None]:
    """End the process if the ``with`` block takes longer than a limit.

    Args:
        limit_s: the limit.
        report: says what hung.
    """

    def expire() -> None:
        report()
        end_now(DEADLINE_EXIT_CODE)

    timer = threading.Timer(limit_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
