"""Watches the torchrun agent that started this rank, so that no rank outlives it."""

import os
import signal
import socket
import threading
import time

from flashdreams.parallel.environment import (
    OtherRankError,
    agent_address,
    process_rank,
    started_by_torchrun,
)
from flashdreams.runtime.text import say

PERIOD_S = 0.5
_CONNECT_S = 10.0


def watch_agent() -> None:
    """End this rank by SIGTERM once torchrun's agent has ended; without torchrun do nothing.

    The agent's store is checked once, because the agent may have ended while this rank imported
    PyTorch; after that a thread watches the parent. A killed agent gives no notice.

    Raises:
        OtherRankError: the agent has already ended.
    """
    if not started_by_torchrun() or os.name != "posix":
        return
    parent, address = os.getppid(), agent_address()
    if address is not None:
        try:
            socket.create_connection(address, timeout=_CONNECT_S).close()
        except ConnectionRefusedError as error:
            raise OtherRankError("torchrun's agent has gone; this rank ends.") from error
        except OSError:
            pass  # slow or filtered: the ranks' meeting has a deadline of its own
    threading.Thread(target=_watch, args=(parent,), name="agent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD_S)
    rank = process_rank()
    say(f"flashdreams: rank {rank}: torchrun's agent has gone; this rank ends", beside=rank > 0)
    os.kill(os.getpid(), signal.SIGTERM)
