"""A unique name for one start of a group of ranks, in a store that outlives it."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

POLL_S = 0.02


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks."""

    name: str
    """The same on all ranks of this start, and of no other one."""
    starts: int
    """Processes registered in the store, including this one."""


def agree_on_attempt(store: Any, rank: int, world_size: int, timeout_s: float) -> Attempt:
    """Agree on a name for this start of the group; a collective call that needs only the store.

    torchrun keeps its store when it restarts the ranks, and what an earlier start has left there
    looks like an answer. Neither the number of restarts nor that of ranks distinguishes starts:
    agents count restarts separately. So every rank publishes a random number, rank zero
    publishes a name together with the numbers that it has seen, and the name holds once every rank
    has found its own number with it.

    Args:
        store: a key-value store that all ranks share.
        rank: of this process.
        world_size: number of ranks.
        timeout_s: how long to wait for the others.

    Raises:
        TimeoutError: a rank did not come.
    """
    starts, own = store.add("attempt/starts", 1), uuid.uuid4().hex
    store.set(f"attempt/hello{rank}", own)
    deadline = time.monotonic() + timeout_s
    name = ""
    heard: list[str | None] = []
    while time.monotonic() < deadline:
        if rank == 0:
            found = [_read(store, f"attempt/hello{other}") for other in range(world_size)]
            if found != heard:
                name, heard = uuid.uuid4().hex, found
                store.set("attempt/welcome", json.dumps([name, heard]))
        else:
            said = json.loads(_read(store, "attempt/welcome") or '["", []]')
            name = said[0] if len(said[1]) == world_size and said[1][rank] == own else ""
        if name and not store.check([f"attempt/{name}/{rank}"]):
            store.set(f"attempt/{name}/{rank}", "here")
        if (
            name
            and rank == 0
            and all(store.check([f"attempt/{name}/{other}"]) for other in range(world_size))
        ):
            store.set(f"attempt/{name}/go", "go")
        if name and store.check([f"attempt/{name}/go"]):
            return Attempt(name, starts)
        time.sleep(POLL_S)
    missing = [
        str(other) for other in range(world_size) if _read(store, f"attempt/hello{other}") is None
    ]
    if not missing:  # the found numbers are of an earlier start
        raise TimeoutError(
            f"Rank {rank} waited {timeout_s:.0f} s for the other {world_size - 1} ranks."
        )
    raise TimeoutError(
        f"{len(missing)} of {world_size} ranks did not arrive within {timeout_s:.0f} s: "
        f"{', '.join(missing[:20])}. They hang in an import, or were not started."
    )


def _read(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
