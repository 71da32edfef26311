"""The limits of a server."""

import re
from dataclasses import dataclass
from pathlib import Path

from flashdreams.infra.ranges import check_range


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """How many sessions there may be, and what becomes of those that nobody looks at.

    Every field is a flag of ``flashdreams-serve``.
    """

    max_sessions: int | None = None
    """Sessions that take turns on the device. None: as many as fit into its memory, at most 8."""
    max_waiting: int = 16
    """Clients that may wait for a place; further ones are refused."""
    max_session_s: float | None = None
    """Seconds after which a session ends; None: never."""
    pause_after_s: float = 900.0
    """Seconds without a control, a prompt or a command after which a session pauses by itself."""
    park_after_s: float = 30.0
    """Seconds that a session is paused, or without a client, before it is parked in host memory and
    its place is free; 3 if others wait for one."""
    end_after_s: float = 1800.0
    """Seconds without a client after which a session ends; it is kept that long for its client."""
    max_kept: int = 64
    """Sessions without a client that are kept; of more, the one whose client has been gone for the
    longest ends."""
    parked_gib: float = 8.0
    """Most host memory for parked sessions, on each rank. Further ones are parked on disk, in
    ``--state-dir``."""
    max_forks: int = 4
    """States that a session may keep on the device."""
    max_saves: int = 16
    """Snapshots that a session may keep on disk."""
    snapshot_every: float = 60.0
    """Seconds between snapshots of every live session, from which a restarted server goes on; 0
    saves none but at the end. All sessions stand still while one is written."""
    state_dir: Path | None = None
    """Folder of the sessions' snapshots; None: ``serve_<slug>`` in the output folder. Several nodes
    need one that all of them share."""
    adopt_from: Path | None = None
    """Folder whose sub-folders are the ``--state-dir`` of servers, this one's among them. A client
    whose token none of this server's sessions has is taken up from there: for servers of which each
    goes on with the sessions of those that have ended."""
    name: str = ""
    """Of this server, 24 letters, digits, - and _ at most. Tokens of its sessions begin with it, so
    that a router knows where to send a client."""
    max_logs: int = 256
    """Logs of sessions that are kept, the newest, in ``logs`` of ``--adopt-from`` or
    ``--state-dir``. ``flashdreams-run --replay LOG`` makes a session's frames again. 0 writes
    none."""
    margin_ms: float = 8.0
    """How much earlier than needed an AR step begins."""

    def __post_init__(self) -> None:
        check_range(self, "max_sessions", "max_forks", "max_saves", as_flags=True)
        check_range(self, "max_waiting", "max_kept", "max_logs", least=0, as_flags=True)
        check_range(self, "max_session_s", least=1, as_flags=True)
        for name in ("pause_after_s", "park_after_s", "end_after_s", "parked_gib",
                     "snapshot_every", "margin_ms"):  # fmt: skip
            check_range(self, name, least=0, as_flags=True)
        if not re.fullmatch(r"[\w-]{0,24}", self.name, re.ASCII):
            raise ValueError(f"--name {self.name} must have at most 24 letters, digits, - and _.")
        if self.adopt_from is not None and (
            self.state_dir is None or self.state_dir.parent != self.adopt_from
        ):
            raise ValueError(
                f"--adopt-from {self.adopt_from} needs a --state-dir in it; got {self.state_dir}. "
                f"Try --state-dir {self.adopt_from / (self.name or 'NAME')}."
            )
