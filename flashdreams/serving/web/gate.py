"""The phases of a server, and its replies to clients before and after it has a host."""

import re
import time
from typing import Literal

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
        self.enter("loading" if host is None else "ready")

    def enter(self, phase: Phase) -> None:
        """Begin a phase; draining ends all conversations."""
        self.phase = phase
        self.since = time.monotonic()
        """When the phase began."""

    @property
    def host(self) -> Host | None:
        """The host; None unless sessions can be opened and resumed."""
        return self._host if self.phase == "ready" else None

    def serve(self, host: Host) -> None:
        """Set the host, which is ready."""
        self._host = host
        self.enter("ready")

    def words(self) -> str:
        """The current phase as text for clients."""
        return {
            "loading": "The model is being loaded.",
            "warming": "The model is being warmed up.",
            "ready": "Ready.",
            "draining": "The server is shutting down; sessions continue when it is back.",
            "failed": "The server has failed; see its log.",
        }[self.phase]


def for_clients(text: str) -> str:
    """A message without local paths, truncated to a maximum length."""
    return _PATH.sub("(a file)", text)[:TEXT_CHARACTERS]
