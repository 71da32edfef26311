"""What a command says and returns when a signal ends it."""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from flashdreams.runtime.termination import GRACE_S, Terminated, leave, raise_on_sigterm
from flashdreams.runtime.text import say

INTERRUPTED = 128 + signal.SIGINT
"""Exit code."""


def run_command(
    program: str, main: Callable[[Sequence[str]], int], grace_s: float = GRACE_S
) -> NoReturn:
    """Carry out the process's own command line and exit with its code.

    Args:
        program: its name.
        main: from the words after the program's name to an exit code.
        grace_s: time to end by itself after a signal, as for `raise_on_sigterm`.
    """
    raise_on_sigterm(grace_s, before_end=partial(say_stopped, program=program))
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt as stop:  # also one that comes while an error is reported
        code = stopped(stop, program)
    leave(code, at_once=_in_process_group())


def _in_process_group() -> bool:
    """Whether a failed run has left its process group to torchrun.

    A thread of gloo may then be freeing the tensors of its last collective. It needs the
    interpreter for that, and aborts the process where the interpreter is ending.
    """
    environment = sys.modules.get("flashdreams.parallel.environment")
    with contextlib.suppress(AttributeError):  # half imported
        return environment is not None and environment.group_size() > 1
    return False


def stopped(stop: KeyboardInterrupt, program: str) -> int:
    """Say on rank zero that a signal has ended the process, and give the exit code for it."""
    code = stop.exit_code if isinstance(stop, Terminated) else INTERRUPTED
    say_stopped(code - 128, program)
    return code


def say_stopped(number: int, program: str) -> None:
    """Say on rank zero which signal ends the process."""
    # What was broken off may be the import of torch, which crashes if it is begun again.
    environment = sys.modules.get("flashdreams.parallel.environment")
    with contextlib.suppress(AttributeError, ValueError):  # half imported, or RANK is no number
        if environment is not None and environment.process_rank() > 0:
            return
    say(f"{program}: {'interrupted' if number == signal.SIGINT else 'terminated'}")
