"""Real process groups for tests: one function on many ranks, over gloo."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashdreams.parallel.local_ranks import RankError, new_process, run_ranks

FORKS = multiprocessing.get_context("forkserver")
"""Starts processes that have torch and the engine already."""
FORKS.set_forkserver_preload(
    [
        "pytest",
        "safetensors.torch",
        "torch._dynamo",  # what builds on meta asks it, and importing it takes a second
        "torch.distributed.device_mesh",
        "flashdreams.checking.rank_checks",
        "flashdreams.models.wan.transformer",
        "flashdreams.models.wan.vae",
        "flashdreams.parallel.parallelize",
        "flashdreams.run",
        "tests.parallel.pipelines",
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


def run_like_torchrun(count: int, target: Callable[..., None], *args: Any) -> int:
    """Call a function on ranks with the variables that torchrun would set, in this folder.

    They are forked: torchrun and its ranks would import torch again, which takes most of the time.
    ``tests/parallel`` starts torchrun itself.

    Returns:
        0 if all ended well, else the exit code of a rank that did not.
    """
    with meeting_point() as place:
        variables = {"WORLD_SIZE": str(count), **place}
        ranks = [
            new_process(_be_rank, rank, variables, os.getcwd(), target, args)
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return max(1 if code is None else abs(code) for code in codes)


def _be_rank(
    rank: int,
    variables: dict[str, str],
    folder: str,
    target: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    target(*args)


def run_engine(count: int, words: Sequence[str], said: Path) -> None:
    """What ``torchrun --nproc-per-node COUNT -m flashdreams.run WORDS`` does, without torchrun.

    Args:
        count: number of ranks; 1 is a group of one.
        words: of the command line.
        said: file to which what the ranks print is added.

    Raises:
        AssertionError: they did not all end well.
    """
    code = run_like_torchrun(count, _run_engine, list(words), said)
    assert code == 0, f"exit code {code}: {said.read_text()[-3000:]}"


def _run_engine(words: list[str], said: Path) -> None:
    from flashdreams import run

    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run.main(words))


__all__ = [
    "FORKS",
    "RankError",
    "meeting_point",
    "new_process",
    "run_engine",
    "run_like_torchrun",
    "run_ranks",
]
