"""What a command says and returns when a signal ends it."""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from flashdreams.runtime.termination import Terminated, leave, raise_on_sigterm
from flashdreams.runtime.text import say

INTERRUPTED = 128 + signal.SIGINT
"""Exit code."""


def run_command(program: str, main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Carry out the command line of a process that has nothing to save, and exit with its code.

    Args:
        program: its name.
        main: from the words after the program's name to an exit code.
    """
    raise_on_sigterm(before_end=partial(say_stopped, program=program))
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt as stop:
        code = stopped(stop, program)
    leave(code)


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
