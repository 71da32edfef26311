"""Several ranks of one machine: one function on each, in processes over gloo."""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank failed; the message is its traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0
) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` ranks of one gloo group.

    Args:
        fn: a module-level function; it asks the process group for its rank.
        world_size: number of processes; 1 is a process with a group of one.
        args: picklable; tensors are copied.
        timeout_s: limit for all ranks together; also the limit of one collective. The default is
            for a hang: a machine under load may take a minute for what usually takes a second.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankError: with the traceback of the rank that failed first.
        TimeoutError: some ranks did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        paths = [Path(folder, f"rank{rank}") for rank in range(world_size)]
        torch.save(args, Path(folder, "args"))
        processes = [
            new_process(_run, fn, rank, world_size, folder, timeout_s) for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, paths, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [torch.load(path, weights_only=False) for path in paths]


def new_process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that is ready to start, and sees the variables of this one as they are now.

    It comes from the forkserver, which imports torch once; by themselves its processes would see
    the variables of whoever needed the server first. Windows has none.
    """
    arguments = (dict(os.environ), target, args)
    if sys.platform == "win32":
        return multiprocessing.Process(target=_in_environment, args=arguments)
    forks = multiprocessing.get_context("forkserver")
    return forks.Process(target=_in_environment, args=arguments)


def _in_environment(
    variables: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    target(*args)


def _wait(processes: list[BaseProcess], paths: list[Path], deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:  # comes first: ranks that waited for a hung one fail too
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise TimeoutError(f"ranks {alive} of {len(processes)} did not end in time")
        if any(process.exitcode for process in processes):
            time.sleep(0.2)
            _raise_first(processes, paths)
        time.sleep(0.005)
    if any(process.exitcode for process in processes):
        _raise_first(processes, paths)


def _raise_first(processes: list[BaseProcess], paths: list[Path]) -> None:
    errors = [path.with_suffix(".error") for path in paths if path.with_suffix(".error").exists()]
    if not errors:
        codes = [process.exitcode for process in processes]
        raise RankError(f"ranks ended without a traceback, exit codes {codes}")
    times_and_texts = {path.stem: path.read_text().split("\n", 1) for path in errors}
    first = min(times_and_texts, key=lambda rank: int(times_and_texts[rank][0]))
    raise RankError(f"{first} failed first:\n{times_and_texts[first][1]}")


def _leave_error(path: Path) -> None:
    """Write when this rank failed, and how; files' own times are too coarse to tell who began."""
    failed_ns = time.monotonic_ns()
    draft = path.with_suffix(".draft")
    draft.write_text(f"{failed_ns}\n{traceback.format_exc()}")
    draft.replace(path.with_suffix(".error"))


def _run(fn: Callable[..., Any], rank: int, world_size: int, folder: str, limit_s: float) -> None:
    torch.set_num_threads(1)
    path = Path(folder, f"rank{rank}")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder, "store")), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=limit_s),
        )
        result = fn(*torch.load(Path(folder, "args"), weights_only=False))
        torch.save(result, path)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        _leave_error(path)
        os._exit(1)
