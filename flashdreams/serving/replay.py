"""Control logs: the inputs of a user in a live session, with their times."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdreams.runtime.text import read_text, reason_of
from flashdreams.serving.client import LiveClient

MAX_LOG_BYTES = 2**24
"""Maximum size of a control log: about 200,000 messages."""


@dataclass(frozen=True)
class Logged:
    """One message of a control log."""

    at: float
    """Seconds after the first picture."""
    message: Mapping[str, Any]
    """A message of the protocol; events get new identifiers."""


def read_log(path: Path) -> list[Logged]:
    """Read a control log: JSON lines such as ``{"t": 1.5, "keys": "w"}``.

    A line with ``"type"`` is a message of the protocol; in any other line, all fields but ``"t"``
    are values of a ``session.control``.

    Raises:
        ValueError: a line is neither, and is named; or the file cannot be read.
    """
    try:
        lines = read_text(path, MAX_LOG_BYTES, "utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--log {path} cannot be read: {reason_of(error)}.") from error
    return [
        parse_line(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def parse_line(line: str, place: str) -> Logged:
    """One line of a control log.

    Args:
        line: JSON.
        place: position of the line, for an error.

    Raises:
        ValueError: it is not such a line.
    """
    try:
        fields = json.loads(line)
        at = float(fields.pop("t"))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:  # fmt: skip
        raise ValueError(f'{place}: wanted JSON such as {{"t": 1.5, "keys": "w"}}.') from error
    if not 0 <= at < float("inf"):
        raise ValueError(f'{place}: "t" is in seconds after the first picture; got {at}.')
    if "type" not in fields:
        fields = {"type": "session.control", "values": fields}
    return Logged(at, fields)


async def replay(client: LiveClient, log: Sequence[Logged], begin: float) -> None:
    """Send the messages of a log when they are due.

    Args:
        client: client with a started session.
        log: in any order.
        begin: ``time.monotonic`` of the first picture.
    """
    for number, logged in enumerate(sorted(log, key=lambda logged: logged.at)):
        await asyncio.sleep(max(0.0, begin + logged.at - time.monotonic()))
        message = dict(logged.message)
        if message["type"] == "session.control":
            message["event_id"] = f"log-{number}"
        await client.send(message)
