"""The servers of a fleet: discovery, health, and which of them has a session."""

import asyncio
import glob
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "server.json"
PROBE_S = 2.0
"""Timeout after which a server counts as lost."""
_TOKEN = re.compile(r"[\w-]{16,64}", re.ASCII)


@dataclass(frozen=True)
class Member:
    """A server's announcement in its folder."""

    name: str
    """Name of its folder; tokens of its sessions start with it."""
    url: str
    """URL without a trailing slash."""
    token: str

    def announce(self, root: Path) -> None:
        """Write the address into the server's folder, readable by the owner only."""
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f".{ADDRESS}.part"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)
        path.replace(folder / ADDRESS)

    def withdraw(self, root: Path) -> None:
        """Remove the address after the server has ended."""
        (root / self.name / ADDRESS).unlink(missing_ok=True)


@dataclass
class Health:
    """A server's last answer to a health check."""

    sessions: int = 0
    queued: int = 0
    parked: int = 0
    places: int = 0

    @property
    def load(self) -> float:
        """Sessions per place."""
        return (self.sessions + self.queued) / max(1, self.places)


class Fleet:
    """The servers with folders in a shared root folder; used from one event loop's thread."""

    def __init__(self, root: Path) -> None:
        """Start without servers.

        Args:
            root: ``--adopt-from`` of the servers.
        """
        self.root = root
        self.members: dict[str, Member] = {}
        self.health: dict[str, Health] = {}
        """Of the servers that accept sessions."""

    async def refresh(self, client: Any) -> None:
        """Check the health of all servers.

        Args:
            client: an httpx client.
        """
        found = await asyncio.to_thread(read_members, self.root)
        answers = await asyncio.gather(*(probe(client, member) for member in found))
        self.members = {member.name: member for member in found}
        answered = zip(self.members, answers, strict=True)
        self.health = {name: health for name, health in answered if health is not None}

    def lost(self, member: Member) -> None:
        """Mark a server that did not answer; it gets no requests until the next health check."""
        self.health.pop(member.name, None)

    async def of_session(self, token: str) -> Member | None:
        """The server that has a session, or else one that can take it over."""
        first = [name for name in self.members if token.startswith(f"{name}-")]
        owner = await asyncio.to_thread(find_folder, self.root, token)
        for name in (owner, *first):
            if name in self.health:
                return self.members[name]
        return self.least_loaded()

    def least_loaded(self) -> Member | None:
        """The server for a new session; None: no server is ready."""
        if not self.health:
            return None
        name = min(self.health, key=lambda name: (self.health[name].load, name))
        self.health[name].sessions += 1  # until the next health check
        return self.members[name]

    def has_place(self, but: str) -> bool:
        """Whether another server could start a session at once."""
        return any(
            name != but and health.sessions + health.queued < health.places
            for name, health in self.health.items()
        )

    def total(self, field: str) -> int:
        """Sum of a figure over all servers that are ready."""
        return sum(getattr(health, field) for health in self.health.values())


def read_members(root: Path) -> list[Member]:
    """The servers that have announced their address."""
    found = []
    for path in sorted(root.glob(f"*/{ADDRESS}")):
        try:
            member = Member(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # it has just ended
            continue
        found += [member] if member.name == path.parent.name else []
    return found


def find_folder(root: Path, token: str) -> str | None:
    """Name of the server in whose folder a session is; None: there is none."""
    if not _TOKEN.fullmatch(token):
        return None
    return next((path.parent.name for path in root.glob(f"*/{glob.escape(token)}")), None)


async def probe(client: Any, member: Member) -> Health | None:
    """Health of a server; None: it does not accept sessions."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    try:
        headers = {"Authorization": f"Bearer {member.token}"}
        answer = await client.get(f"{member.url}/metrics", headers=headers, timeout=PROBE_S)
        answer.raise_for_status()
        families = text_string_to_metric_families(answer.text)
        values = {s.name: s.value for family in families for s in family.samples if not s.labels}
    except (httpx.HTTPError, ValueError):
        return None

    names = {
        "sessions": "sessions",
        "queued": "queue_length",
        "parked": "parked_sessions",
        "places": "places",
    }
    found = {field: int(values.get(f"flashdreams_{name}", 0)) for field, name in names.items()}
    return Health(**found) if "flashdreams_places" in values else None
