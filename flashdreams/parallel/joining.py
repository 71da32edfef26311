"""Waiting for all ranks to come, and saying who is missing."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

JOIN_LIMIT_S = 300.0
"""How long ranks wait for one another at the beginning, by default."""

REPORT_PERIOD_S = 10.0
"""How long nothing is said while ranks are missing; then a line, and one every time it passes."""

_LEFT_OVER = (
    "Start all ranks with torchrun. For a single process, clear what a former run left in this "
    "shell: unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT."
)


def open_store(rank: int, world_size: int, limit_s: float) -> dist.Store:
    """The key-value store that all ranks share, once all of them have come.

    Args:
        rank: of this process.
        world_size: ranks that are expected.
        limit_s: how long to wait for the others.

    Raises:
        TimeoutError: some did not come; the message names them.
        ValueError: nothing says where rank zero is.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ValueError(
            f"MASTER_ADDR={host!r} and MASTER_PORT={port!r} say no place. {_LEFT_OVER}"
        )
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun's agent
    address, start = f"{host}:{port}", time.monotonic()
    try:
        with _reports(f"rank {rank} waits for the store of rank 0 at {address}"):
            store = dist.TCPStore(
                host,
                int(port),
                is_master=rank == 0 and not hosted,
                timeout=timedelta(seconds=limit_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise TimeoutError(
            f"Rank {rank} of {world_size} reached no rank 0 at {address} within {limit_s:g} s. "
            f"{_LEFT_OVER}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"worker{attempt}", store)  # a restart finds nothing of the run before
    _wait_for_all(dist.PrefixStore("joined", own), rank, world_size, start, limit_s)
    return own


def _wait_for_all(
    store: dist.Store, rank: int, world_size: int, start: float, limit_s: float
) -> None:
    store.set(str(rank), "here")
    missing, said = list(range(world_size)), start
    while missing:
        missing = [other for other in missing if not store.check([str(other)])]
        now = time.monotonic()
        if missing and now - start > limit_s:
            raise TimeoutError(
                f"{_named(missing)} of {world_size} did not come within {limit_s:g} s "
                f"(--join-limit-s). {_LEFT_OVER}"
            )
        speaks = rank == min(set(range(world_size)) - set(missing), default=rank)
        if missing and speaks and now - said > REPORT_PERIOD_S:
            said = now
            _say(f"waiting for {_named(missing).lower()} of {world_size}, for {now - start:.0f} s")
        if missing:
            time.sleep(0.05)


def _named(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"Rank {listed}" if len(ranks) == 1 else f"Ranks {listed}"


@contextmanager
def _reports(text: str) -> Iterator[None]:
    """Print a line every time that the period passes."""
    done = threading.Event()
    start = time.monotonic()

    def report() -> None:
        while not done.wait(REPORT_PERIOD_S):
            _say(f"{text}, for {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=report, name="joining", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(text: str) -> None:
    print(f"flashdreams: {text}", file=sys.stderr, flush=True)
