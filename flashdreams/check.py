"""The check of a method: ``flashdreams-check <slug>``, also ``python -m flashdreams.check``."""

if __name__ == "__main__":  # before the imports below, which take time
    from flashdreams.runtime.first_signals import begin_command

    begin_command("flashdreams-check")

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from flashdreams.parallel.stopping import run_command
from flashdreams.runtime.command_text import lost_output_in_one_line, read_options
from flashdreams.runtime.text import printable, say

PROGRAM = "flashdreams-check"
PASSED, FAILED, WRONG_USAGE = 0, 1, 2
"""Exit codes."""


@dataclass(kw_only=True)
class CheckOptions:
    """Check that registered methods satisfy the contract: on a CPU, in seconds, without downloads.

    Large methods are run at toy size, with their own classes, and built at full size on the meta
    device. Every failure says what to change.
    """

    slugs: Annotated[Positional[Sequence[str]], arg(metavar="[SLUG ...]")] = ()
    """Slugs of the methods; default: all registered methods."""
    only: Sequence[str] = ()
    """Names of the checks to run, such as "two ranks"; default: all."""
    names: bool = False
    """Print the names of the checks and exit."""


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    run_command(PROGRAM, main)


@lost_output_in_one_line(PROGRAM)
def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        0 all methods pass, 1 one fails, 2 the command line is wrong.
    """
    try:
        options = read_options(CheckOptions, argv, PROGRAM)
    except ValueError as error:
        say(printable(f"{PROGRAM}: error: {error}"))
        return WRONG_USAGE
    from flashdreams.checking.checks import NAMES, check_method
    from flashdreams.registry import PluginError, discover

    if options.names:
        print("\n".join(NAMES))
        return PASSED
    try:
        registry = discover()
        configs: list[Any] = [registry.resolve(slug) for slug in options.slugs or registry]
        reports = []
        for config in configs:
            reports.append(check_method(config, tuple(options.only)))
            print(reports[-1], flush=True)
    except (ValueError, PluginError) as error:
        say(printable(f"{PROGRAM}: error: {error}"))
        return WRONG_USAGE
    return PASSED if all(report.passed for report in reports) else FAILED


if __name__ == "__main__":
    entry_point()
