"""The command line of the client: ``flashdreams-client http://127.0.0.1:8000``."""

if __name__ == "__main__":  # before the imports below, which take time
    from flashdreams.runtime.first_signals import begin_command

    begin_command("flashdreams-client")

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flashdreams.runtime.command_text import lost_output_in_one_line, read_options
from flashdreams.runtime.files import check_target, write_whole
from flashdreams.runtime.text import printable, say
from flashdreams.serving.client import LiveClient, Received, SessionError
from flashdreams.serving.replay import Logged, read_log, replay

PROGRAM = "flashdreams-client"
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(kw_only=True)
class ClientOptions:
    """Join a live session from a shell: record it, replay a control log, measure it."""

    url: Annotated[Positional[str], arg(metavar="[URL]")] = "http://127.0.0.1:8000"
    """Address of the server."""
    token: str | None = None
    """Token, if the server requires one."""
    seconds: float = 10.0
    """Duration in seconds, from the first frame."""
    prompt: str | None = None
    """Prompt of the session; None: the server's default."""
    seed: int | None = None
    """Seed of the session; None: the server's default."""
    num_frames: int | None = None
    """Number of frames after which the session ends; None: it ends after ``--seconds``."""
    format: Literal["m4s", "jpeg"] = "m4s"
    """Video format: H.264 in fragmented MP4, or one JPEG per frame."""
    log: Path | None = None
    """Control log to replay: JSON lines such as {"t": 1.5, "keys": "w"}."""
    record: Path | None = None
    """Write the video to this .mp4 file."""
    json: bool = False
    """Print the measurements as JSON."""

    def __post_init__(self) -> None:
        if self.record is not None and self.format != "m4s":
            raise ValueError("--record writes what arrives as mp4, so it needs --format m4s.")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds {self.seconds}: must be positive and finite.")


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio replaces it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))


@lost_output_in_one_line(PROGRAM)
def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        0 done, 1 the session failed, 2 the command line is wrong or no server answers.
    """
    try:
        options = read_options(ClientOptions, argv, PROGRAM)
        log = [] if options.log is None else read_log(options.log)
        if options.record is not None:
            check_target(options.record, "--record")
        report = asyncio.run(visit(options, log))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ConnectionRefusedError, socket.gaierror):
        return _say(
            f"No server answers at {options.url}; is flashdreams-serve running?", WRONG_USAGE
        )
    except (SessionError, ConnectionError) as error:
        return _say(error, FAILED)
    except (ValueError, OSError, ImportError) as error:
        return _say(error, WRONG_USAGE)
    except Exception as error:  # another kind of server may send anything
        return _say(f"the server's answer makes no sense ({type(error).__name__}: {error})", FAILED)
    print(json.dumps(report) if options.json else _text(report))
    return DONE


async def visit(options: ClientOptions, log: Sequence[Logged]) -> dict[str, object]:
    """Join a session for ``--seconds``.

    Returns:
        The measurements.

    Raises:
        SessionError: the session was refused or has failed.
    """
    async with LiveClient(options.url, options.token) as client:
        await client.start(
            keep=options.record is not None,
            prompt=options.prompt,
            seed=options.seed,
            num_frames=options.num_frames,
            format=options.format,
        )
        await _watch(client, options.seconds, log)
        if client.done is None:
            await client.stop()
        if options.record is not None:
            with write_whole(options.record) as file:
                file.write(client.binary)
        return client.figures.report()


async def _watch(client: LiveClient, seconds: float, log: Sequence[Logged]) -> None:
    pictures = client.pictures()
    first = await anext(pictures, None)
    if first is None:
        return
    replaying = asyncio.create_task(replay(client, log, first.at))
    try:
        left = first.at + seconds - time.monotonic()
        with contextlib.suppress(asyncio.TimeoutError):  # also if no more pictures arrive
            await asyncio.wait_for(_take_all(pictures), left)
    finally:
        replaying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await replaying


async def _take_all(pictures: AsyncIterator[Received]) -> None:
    async for _ in pictures:
        pass


def _text(report: dict[str, object]) -> str:
    return printable("\n".join(f"{name:>18}: {value}" for name, value in report.items()))


def _say(error: object, code: int) -> int:
    say(printable(f"{PROGRAM}: error: {error}"))
    return code


if __name__ == "__main__":
    entry_point()
