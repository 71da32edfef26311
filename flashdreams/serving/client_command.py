"""The command line of the client: ``flashdreams-client http://127.0.0.1:8000``."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from flashdreams.runtime.files import check_target, write_whole
from flashdreams.runtime.text import printable
from flashdreams.serving.client import LiveClient, SessionError
from flashdreams.serving.replay import Logged, read_log, replay

PROGRAM = "flashdreams-client"
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(kw_only=True)
class ClientOptions:
    """Join a live session from a shell: record it, replay a control log, measure it."""

    url: Positional[str] = "http://127.0.0.1:8000"
    """Of the server's page."""
    token: str | None = None
    """Where the server asks for one."""
    seconds: float = 10.0
    """How long to stay, from the first picture on."""
    prompt: str | None = None
    """None takes the server's."""
    seed: int | None = None
    """None takes the server's."""
    num_frames: int | None = None
    """Pictures after which the session is done; None: it is stopped after ``seconds``."""
    format: Literal["m4s", "jpeg"] = "m4s"
    """H.264 in fragmented MP4, or one JPEG a picture."""
    log: Path | None = None
    """Control log to replay: JSON lines such as {"t": 1.5, "keys": "w"}."""
    record: Path | None = None
    """Write the video here, as mp4."""
    json: bool = False
    """Print the figures as JSON."""

    def __post_init__(self) -> None:
        if self.record is not None and self.format != "m4s":
            raise ValueError("--record writes what arrives as mp4, so it needs --format m4s.")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds {self.seconds}: must be positive and finite.")


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Carry out one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        0 done, 1 the session failed, 2 the command line is wrong or nobody listens there.
    """
    try:
        options = tyro.cli(ClientOptions, args=list(argv), prog=PROGRAM)
        log = [] if options.log is None else read_log(options.log)
        if options.record is not None:
            check_target(options.record, "--record")
        report = asyncio.run(visit(options, log))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SessionError as error:
        return _say(error, FAILED)
    except ConnectionRefusedError:
        return _say(f"Nobody listens at {options.url}; is flashdreams-serve started?", WRONG_USAGE)
    except ConnectionError as error:
        return _say(error, FAILED)
    except (ValueError, OSError, ImportError) as error:
        return _say(error, WRONG_USAGE)
    except Exception as error:  # whatever the messages of a server that is none lead to
        return _say(f"the server's answer makes no sense ({type(error).__name__}: {error})", FAILED)
    print(json.dumps(report) if options.json else _text(report))
    return DONE


async def visit(options: ClientOptions, log: Sequence[Logged]) -> dict[str, object]:
    """Join a session for ``--seconds``.

    Returns:
        The figures.

    Raises:
        SessionError: it was refused, or has failed.
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
    replaying: asyncio.Task[None] | None = None
    end = float("inf")
    try:
        async for picture in client.pictures():
            if replaying is None:
                replaying = asyncio.create_task(replay(client, log, picture.at))
                end = picture.at + seconds
            if time.monotonic() >= end:
                return
    finally:
        if replaying is not None:
            replaying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await replaying


def _text(report: dict[str, object]) -> str:
    return printable("\n".join(f"{name:>18}: {value}" for name, value in report.items()))


def _say(error: object, code: int) -> int:
    print(printable(f"{PROGRAM}: error: {error}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    entry_point()
