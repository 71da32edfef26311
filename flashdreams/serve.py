"""Live sessions: ``flashdreams-serve <slug>``, also ``python -m flashdreams.serve <slug>``."""

if __name__ == "__main__":  # before the imports below, which take time
    from flashdreams.runtime.first_signals import begin_command

    begin_command("flashdreams-serve")

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import FrameType
from typing import Any

from tyro.conf import OmitArgPrefixes

from flashdreams.parallel.siblings import watch_siblings
from flashdreams.parallel.stopping import run_command, stopped
from flashdreams.run import (
    DONE,
    RUN_FAILED,
    WRONG_USAGE,
    UsageError,
    code_before_run,
    read_config,
    report,
    with_advice,
)
from flashdreams.runtime.command_text import lost_output, read_options
from flashdreams.runtime.standard_error import prepare_streams
from flashdreams.runtime.text import say, tell
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.web.settings import WebSettings

PROGRAM = "flashdreams-serve"
PACKAGES = ("fastapi", "uvicorn", "websockets", "pydantic", "av", "prometheus_client")
"""What the extra ``serve`` brings."""
DRAIN_S = 25.0
"""Time to write all sessions to disk when the process is asked to end; Kubernetes waits for 30."""


@dataclass(kw_only=True)
class ServeOptions:
    """Serve live sessions of a method: flashdreams-serve SLUG [flags of flashdreams-run SLUG].

    The flags of the method apply to all sessions; flashdreams-run SLUG --help lists them, and
    flashdreams-run --help lists the slugs. Under torchrun, rank zero serves and all ranks run the
    same AR steps.
    """

    web: OmitArgPrefixes[WebSettings] = field(default_factory=WebSettings)
    limits: OmitArgPrefixes[ServingLimits] = field(default_factory=ServingLimits)


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    watch_siblings()
    prepare_streams()
    run_command(PROGRAM, main, DRAIN_S)


def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        The exit code: 0 drained, 1 what was started failed, 2 the command line, the config or the
        installation is wrong and nothing was started, 130 interrupted and 143 terminated before
        anything was served. Errors are one line on stderr.
    """
    debug = "--debug" in argv
    try:
        read = read_command_line([word for word in argv if word != "--debug"])
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except SystemExit as exit:  # of tyro: --help, or an error that it has printed
        return DONE if exit.code in (None, 0) else WRONG_USAGE
    except BrokenPipeError as error:
        return lost_output(error, PROGRAM)
    except Exception as error:
        return report(error, WRONG_USAGE, debug, program=PROGRAM)
    return DONE if read is None else _serve(*read, debug)


def read_command_line(argv: Sequence[str]) -> tuple[ServeOptions, Any] | None:
    """The options of the server and the config of the method that it serves.

    Args:
        argv: the words after the program's name.

    Returns:
        None if the command line only asked for something to be printed.

    Raises:
        ValueError: it is invalid, or the method cannot be served.
        ImportError: the extra is not installed.
    """
    options, rest = read_options(ServeOptions, argv, PROGRAM, return_unknown_args=True)
    replays = [word for word in rest if word.partition("=")[0] == "--replay"]
    if replays:
        raise UsageError("--replay writes a file: use flashdreams-run --replay FILE.")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} not installed; a server needs: pip install 'flashdreams[serve]'"
        )
    config = read_config(rest, PROGRAM)
    if config is None:
        return None
    from flashdreams.serving.server import check_served

    check_served(config)
    config = config.for_serving()
    places = options.limits.max_sessions or 1
    pipeline = replace(config.pipeline, max_rollouts=max(config.pipeline.max_rollouts, places))
    return options, replace(config, pipeline=pipeline)


def _serve(options: ServeOptions, config: Any, debug: bool) -> int:
    """Start the web server, load the method and serve until the process is asked to end."""
    from flashdreams.parallel.agent import watch_agent
    from flashdreams.parallel.environment import process_rank

    web = None
    try:
        watch_agent()
        if process_rank() == 0:
            from flashdreams.serving.restart import SessionFolder
            from flashdreams.serving.web.server import WebServer

            folder = SessionFolder(options.limits.folder_of(config), config.pipeline)
            folder.claim()  # before the weights, which take longer
            folder.give_up()
            web = WebServer(options.web)
            web.start()
            say(f"{PROGRAM}: loading {config.runner_name}; {web.url} shows the progress")
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except (ValueError, TypeError) as error:
        return report(error, WRONG_USAGE, debug, program=PROGRAM)
    code = _load_and_run(options, config, web, debug)
    try:
        if web is not None:
            web.stop()
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    return code


def _load_and_run(options: ServeOptions, config: Any, web: Any, debug: bool) -> int:
    from flashdreams.serving.server import Server

    try:
        runner = config.setup()
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except Exception as error:
        code = code_before_run(error)
        return report(with_advice(error, config), code, debug, program=PROGRAM)
    ready = False
    try:
        if web is not None:
            web.gate.enter("warming")
        server = Server(runner, options.limits)

        def drain() -> None:
            if web is not None:
                web.gate.enter("draining")
            server.drain()

        drain_on_signals(drain)
        ready = True
        if web is not None and server.host is not None:
            kept = len(server.host.sessions)  # of an earlier process: clients come after serve()
            found = f", {kept} saved session{'s' * (kept > 1)} to resume" if kept else ""
            web.serve(server.host)
            places = "1 place" if server.host.places == 1 else f"{server.host.places} places"
            tell(f"READY {web.url} {config.runner_name} on {runner.device}, {places}{found}")
        server.run()
        runner.end_serving()
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except Exception as error:
        runner.abort()
        explained = runner.explain(error)
        failure = explained if isinstance(explained, Exception) else error
        code = RUN_FAILED if ready else code_before_run(error)
        return report(with_advice(failure, config), code, debug, program=PROGRAM)
    return DONE


def drain_on_signals(drain: Callable[[], None]) -> None:
    """Let the first SIGTERM, SIGINT or SIGHUP drain the server, and the second SIGINT end it.

    Args:
        drain: returns at once; on other ranks than zero it does nothing, for these follow.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        drain()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, handle)


if __name__ == "__main__":
    entry_point()
