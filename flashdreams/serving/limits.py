"""The limits of a server."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdreams.infra.ranges import check_range


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """Number of sessions, and when idle ones are paused, parked and ended.

    Every field is a flag of ``flashdreams-serve``.
    """

    max_sessions: int | None = None
    """Concurrent sessions on the device. None: as many as fit into its memory, at most 8."""
    max_waiting: int = 16
    """Clients in the queue; further ones are refused."""
    max_session_s: float | None = None
    """Longest session, in seconds; None: no limit."""
    pause_after_s: float = 900.0
    """Seconds without input after which a session pauses."""
    park_after_s: float = 30.0
    """Seconds that a session is paused, or without a client, before it is moved to host memory and
    its place on the device becomes free; 3 if clients are waiting."""
    end_after_s: float = 1800.0
    """Seconds without a client after which a session ends."""
    max_kept: int = 64
    """Sessions without a client that are kept; beyond that the one without a client for the longest
    time ends."""
    parked_gib: float = 8.0
    """Host memory for parked sessions, on each rank. Further ones are parked on disk, in
    ``--state-dir``."""
    max_forks: int = 4
    """Forks that a session may keep on the device."""
    max_saves: int = 16
    """Snapshots that a session may keep on disk."""
    snapshot_every: float = 60.0
    """Seconds between snapshots of every live session, from which a restarted server continues; 0:
    only at shutdown. All sessions pause while one is written."""
    state_dir: Path | None = None
    """Folder of the sessions' snapshots; None: ``serve_<slug>`` in the output folder. Several nodes
    need one that all of them share."""
    adopt_from: Path | None = None
    """Parent folder of the ``--state-dir`` of several servers, including this one. A client whose
    session is on none of the running servers continues here from its snapshot."""
    name: str = ""
    """Name of this server, at most 24 letters, digits, - and _. Session tokens begin with it, for
    routers that look for the server of a client."""
    max_logs: int = 256
    """Session logs to keep, newest first, in ``logs`` of ``--adopt-from`` or ``--state-dir``.
    ``flashdreams-run --replay LOG`` reproduces a session's frames. 0: no logs."""
    margin_ms: float = 8.0
    """Safety margin: an AR step starts this much earlier than needed, in milliseconds."""

    def __post_init__(self) -> None:
        check_range(self, "max_sessions", "max_forks", "max_saves", as_flags=True)
        check_range(self, "max_waiting", "max_kept", "max_logs", least=0, as_flags=True)
        check_range(self, "max_session_s", least=1, as_flags=True)
        check_range(self, "pause_after_s", least=0.1, as_flags=True)  # with 0, none would ever run
        rest = ("park_after_s", "end_after_s", "parked_gib", "snapshot_every", "margin_ms")
        check_range(self, *rest, least=0, as_flags=True)
        if not re.fullmatch(r"[\w-]{0,24}", self.name, re.ASCII):
            raise ValueError(f"--name {self.name} must have at most 24 letters, digits, - and _.")
        if self.adopt_from is not None and (
            self.state_dir is None or self.state_dir.parent != self.adopt_from
        ):
            raise ValueError(
                f"--adopt-from {self.adopt_from} needs a --state-dir in it; got {self.state_dir}. "
                f"Try --state-dir {self.adopt_from / (self.name or 'NAME')}."
            )

    def folder_of(self, config: Any) -> Path:
        """The folder of the sessions of a method.

        Args:
            config: of its runner.
        """
        return self.state_dir or config.output_dir / f"serve_{config.runner_name}"
