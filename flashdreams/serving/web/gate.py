"""The phases of a server, and its replies to clients before and after it has a host."""

import re
import time
from typing import Literal, get_args

from flashdreams.serving.interface import Host

Phase = Literal["loading", "warming", "ready", "draining", "failed"]

_PATH = re.compile(r"(?<![\w:/])(?:[A-Za-z]:\\|~?/)[^\s,;:'\"()]*[\\/][^\s,;:'\"()]*")
TEXT_CHARACTERS = 600


class Gate:
    """Holds the host while it accepts sessions."""

    def __init__(self, host: Host | None = None) -> None:
        """Start in phase "loading" or "ready".

        Args:
            host: the host if it is ready; None: the model is still loading.
        """
        self._host = host
        self._phase: Phase = "loading" if host is None else "ready"
        self.since = time.monotonic()
        """When the phase began."""

    @property
    def phase(self) -> Phase:
        """The server's current phase."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        """Set the phase; draining ends all conversations."""
        if phase not in get_args(Phase):
            raise ValueError(f"Unknown phase {phase!r}; allowed: {', '.join(get_args(Phase))}.")
        self._phase, self.since = phase, time.monotonic()

    @property
    def host(self) -> Host | None:
        """The host; None unless sessions can be opened and resumed."""
        return self._host if self._phase == "ready" else None

    def serve(self, host: Host) -> None:
        """Set the host."""
        self._host, self.phase = host, "ready"

    def words(self) -> str:
        """The current phase as text for clients."""
        return {
            "loading": "The model is being loaded.",
            "warming": "The model is being warmed up.",
            "ready": "Ready.",
            "draining": "The server is shutting down; sessions continue when it is back.",
            "failed": "The server has failed; see its log.",
        }[self._phase]


def for_clients(text: str) -> str:
    """A message without local paths, truncated to a maximum length."""
    return _PATH.sub("(a file)", text)[:TEXT_CHARACTERS]
