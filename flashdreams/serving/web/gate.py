"""What clients are told before there is a loop to serve them, and after."""

import re
from typing import Literal, get_args

from flashdreams.serving.interface import Host

Phase = Literal["loading", "warming", "ready", "draining"]

_PATH = re.compile(r"(?<![\w:/])(?:[A-Za-z]:\\|~?/)[^\s,;:'\"()]*[\\/][^\s,;:'\"()]*")
TEXT_CHARACTERS = 600


class Gate:
    """The loop of turns, once it is there."""

    def __init__(self, host: Host | None = None) -> None:
        """Begin.

        Args:
            host: of a loop that is ready; None: the model still loads.
        """
        self._host = host
        self._phase: Phase = "loading" if host is None else "ready"

    @property
    def phase(self) -> Phase:
        """What the server does at present."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase not in get_args(Phase):
            raise ValueError(f"Unknown phase {phase!r}; allowed: {', '.join(get_args(Phase))}.")
        self._phase = phase

    @property
    def host(self) -> Host | None:
        """The loop; None unless sessions can be opened and taken up."""
        return self._host if self._phase == "ready" else None

    def serve(self, host: Host) -> None:
        """The loop is there."""
        self._host, self._phase = host, "ready"

    def refusal(self) -> str:
        """Why there is no loop, for people."""
        if self._phase == "draining":
            return "The server is about to stop; sessions go on when it is back. Try again soon."
        return f"The server is not ready yet: it is {self._phase} the model. Try again soon."


def for_clients(text: str) -> str:
    """A message without places on this machine, in bounded length."""
    return _PATH.sub("(a file)", text)[:TEXT_CHARACTERS]
