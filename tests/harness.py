"""Real process groups for tests: one function on many ranks, over gloo."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flashdreams.parallel.local_ranks import RankError, new_process, run_ranks

FORKS = multiprocessing.get_context("forkserver")
"""Starts processes that have torch and the engine already."""
FORKS.set_forkserver_preload(
    [
        "torch.distributed.device_mesh",
        "flashdreams.models.wan.transformer",
        "flashdreams.parallel.parallelize",
        "flashdreams.run",
        "tests.harness",
    ]
)


@contextmanager
def meeting_point() -> Iterator[dict[str, str]]:
    """The variables by which processes of this machine find one another, as torchrun sets them.

    This process holds the port from the beginning: one that was merely found free may be taken
    before a rank comes to use it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    del store


__all__ = ["FORKS", "RankError", "meeting_point", "new_process", "run_ranks"]
