"""What clients are told before there is a loop to serve them, and after."""

import re
import time
from typing import Literal, get_args

from flashdreams.serving.interface import Host

Phase = Literal["loading", "warming", "ready", "draining", "failed"]

_PATH = re.compile(r"(?<![\w:/])(?:[A-Za-z]:\\|~?/)[^\s,;:'\"()]*[\\/][^\s,;:'\"()]*")
TEXT_CHARACTERS = 600


class Gate:
    """The loop of turns, while it takes sessions."""

    def __init__(self, host: Host | None = None) -> None:
        """Begin.

        Args:
            host: of a loop that is ready; None: the model still loads.
        """
        self._host = host
        self._phase: Phase = "loading" if host is None else "ready"
        self.since = time.monotonic()
        """When the phase began."""

    @property
    def phase(self) -> Phase:
        """What the server does at present."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        """Say what it does; draining ends all conversations."""
        if phase not in get_args(Phase):
            raise ValueError(f"Unknown phase {phase!r}; allowed: {', '.join(get_args(Phase))}.")
        self._phase, self.since = phase, time.monotonic()

    @property
    def host(self) -> Host | None:
        """The loop; None unless sessions can be opened and taken up."""
        return self._host if self._phase == "ready" else None

    def serve(self, host: Host) -> None:
        """The loop is there."""
        self._host, self.phase = host, "ready"

    def words(self) -> str:
        """What the server does at present, for people."""
        return {
            "loading": "The model is being loaded.",
            "warming": "The model is being warmed up.",
            "ready": "Ready.",
            "draining": "The server is shutting down; sessions continue when it is back.",
            "failed": "The server has failed; see its log.",
        }[self._phase]


def for_clients(text: str) -> str:
    """A message without places on this machine, in bounded length."""
    return _PATH.sub("(a file)", text)[:TEXT_CHARACTERS]
