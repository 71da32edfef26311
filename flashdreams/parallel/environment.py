"""The process's environment: torchrun's variables and the process group."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashdreams.parallel.attempt import agree_on_attempt
from flashdreams.parallel.siblings import watch_siblings

T = TypeVar("T")

LOAD_TIMEOUT_S = 1800.0
"""Limit of one collective while weights are downloaded and loaded; AR steps have their
own (`flashdreams.parallel.watchdog`)."""

MEETING_DEADLINE_S = 300.0
"""Limit of the rendezvous: from the first rank that is ready to the last."""


@dataclass(frozen=True)
class Environment:
    """Ranks and device of this process: made once by `init` and passed down, never global."""

    rank: int
    """Number of this process among all, from 0."""

    local_rank: int
    """Number of this process on its node, from 0."""

    world_size: int
    """Number of processes."""

    device: torch.device
    """Device of this process."""

    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """Key-value store that all ranks share, with their heartbeats; None for a single rank, or if
    the process group was made elsewhere."""

    local_pids: Mapping[int, int] = field(default_factory=dict, repr=False, compare=False)
    """Process of every rank on this machine, this one included, as far as `init` made the group."""

    restarted: bool = False
    """Ranks of this job were started before, as recorded in their store."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prints and writes for the run."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """Launch of this process, from torchrun's variables."""

    run_id: str
    """``--rdzv-id``, the same for every start of a job; "" without torchrun."""
    restarts: int
    """How often torchrun has restarted the ranks."""


def read_launch(environment: Environment) -> Launch:
    """The launch of this process.

    An agent that restarts its ranks because another agent came or went counts no restart.
    """
    counted = _read_int("TORCHELASTIC_RESTART_COUNT", 0)
    restarts = max(counted, int(environment.restarted))
    return Launch(os.environ.get("TORCHELASTIC_RUN_ID", ""), restarts)


def process_rank() -> int:
    """Rank that torchrun gave this process; 0 for the only process. Needs no process group."""
    return _read_int("RANK", 0)


def process_count() -> int:
    """Ranks that torchrun started; 1 for the only process. Needs no process group."""
    return _read_int("WORLD_SIZE", 1)


def started_by_torchrun() -> bool:
    """Whether a torchrun agent is this process's parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent_address() -> tuple[str, int] | None:
    """Host and port of the store that torchrun's agent holds; None if a rank holds the store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], _read_int("MASTER_PORT", 0)


def init(
    device: str = "auto",
    timeout_s: float = LOAD_TIMEOUT_S,
    meeting_s: float = MEETING_DEADLINE_S,
) -> Environment:
    """Join the ranks that torchrun started.

    Without torchrun, or with one rank, no process group is made. A process group that exists
    already is used as it is.

    Args:
        device: ``"auto"`` (CUDA where there is one, else the CPU), ``"cpu"``, ``"cuda"`` or, for a
            single rank, ``"cuda:N"``.
        timeout_s: limit of one collective, in seconds.
        meeting_s: seconds that a rank waits for the others.

    Raises:
        ValueError: the device does not exist, or torchrun's variables contradict each other.
        OtherRankError: some ranks did not arrive in time; names them.
    """
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        local_rank = _read_int("LOCAL_RANK", rank)
        return Environment(rank, local_rank, world_size, _pick_device(device, local_rank, True))
    rank, world_size = _read_int("RANK", 0), _read_int("WORLD_SIZE", 1)
    local_rank = _read_int("LOCAL_RANK", 0)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK={rank} is not one of WORLD_SIZE={world_size} ranks. Start with torchrun, or "
            "unset RANK and WORLD_SIZE for a single process."
        )
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and absent:
        raise ValueError(
            f"WORLD_SIZE={world_size} without {', '.join(absent)}. Start with torchrun, or unset "
            "WORLD_SIZE for a single process."
        )
    chosen = _pick_device(device, local_rank, world_size > 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Environment(rank, local_rank, world_size, chosen)
    watch_siblings()
    store, pids, restarted = _connect(
        chosen, timedelta(seconds=timeout_s), timedelta(seconds=meeting_s)
    )
    return Environment(rank, local_rank, world_size, chosen, store, pids, restarted)


def shutdown() -> None:
    """Leave the process group after success; on a failing path torchrun ends the ranks instead."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_on_node(fn: Callable[[], T]) -> T:
    """Call ``fn`` on one rank of each node, then on the other ranks.

    For downloads and caches on a node's disk: the other ranks find the work done.

    Raises:
        OtherRankError: ``fn`` failed on the first rank of some node, which raises the true error.
    """
    if group_size() == 1:
        return fn()
    is_first = _read_int("LOCAL_RANK", dist.get_rank()) == 0
    failed = torch.zeros(1, dtype=torch.int32, device=_collective_device())
    result: T | None = None
    error: BaseException | None = None
    if is_first:
        try:
            result = fn()
        except BaseException as caught:
            error = caught
            failed += 1
    dist.all_reduce(failed)
    if error is not None:
        raise error
    if int(failed):
        raise OtherRankError(
            f"The first rank of {int(failed)} node(s) failed; see its own message."
        )
    return result if is_first else fn()  # type: ignore[return-value]


def group_rank() -> int:
    """Rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def group_size() -> int:
    """Ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


class OtherRankError(RuntimeError):
    """Another rank failed at a common task; its own message has the reason."""


class RankZeroError(OtherRankError):
    """Rank zero failed at a task for all ranks; its own message has the reason."""


def broadcast_from_rank_zero(x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Give every rank a copy of a tensor of rank zero; a collective call.

    Args:
        x: on rank zero the tensor, elsewhere ignored.
        shape: its shape, known to all.
        dtype: its type, known to all.

    Returns:
        The tensor, contiguous.

    Raises:
        ValueError: rank zero's tensor differs from the given shape or dtype.
    """
    alone = group_size() == 1
    if group_rank() == 0:
        if x is None or tuple(x.shape) != tuple(shape) or x.dtype != dtype:
            got = "none" if x is None else f"{x.dtype} {list(x.shape)}"
            raise ValueError(f"Expected a tensor {dtype} {list(shape)}, got {got}.")
        if alone:
            return x.contiguous()
        sent = x.to(_collective_device()).contiguous()
    else:
        sent = torch.empty(tuple(shape), dtype=dtype, device=_collective_device())
    dist.broadcast(sent, src=0)
    return sent


def from_rank_zero(fn: Callable[[], T]) -> T:
    """Call ``fn`` on rank zero alone and give every rank its result; a collective call.

    For decisions and results of one rank for all: a measured choice, text embeddings, whether a
    file could be written.

    Args:
        fn: returns something picklable; tensors in it must be on the CPU.

    Raises:
        RankZeroError: ``fn`` failed; rank zero raises the true error.
    """
    if group_size() == 1:
        return fn()
    error: BaseException | None = None
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [(fn(),)]
        except BaseException as caught:
            error = caught
    dist.broadcast_object_list(box, src=0, device=_collective_device())
    if error is not None:
        raise error
    if box[0] is None:
        raise RankZeroError("Rank zero failed; see its own message.")
    return box[0][0]


def gather_to_rank_zero(value: T) -> list[T]:
    """The values of all ranks in their order, on rank zero; a collective call.

    Args:
        value: of this rank; picklable, tensors in it on the CPU.

    Returns:
        On rank zero one value per rank, elsewhere an empty list.
    """
    if group_size() == 1:
        return [value]
    into: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, into, dst=0)
    return into or []


def all_ranks_agree(holds: bool) -> bool:
    """Whether something holds on every rank; a collective call."""
    return bool(least_of_all_ranks(int(holds)))


def together(work: Callable[[], T], what: str) -> T:
    """Run something on every rank; if it fails on one, it fails on all. A collective call.

    Args:
        work: of this rank; where it communicates, it fails on all ranks of that group.
        what: what another rank could not do, for the message.

    Raises:
        OtherRankError: it failed on another rank only, which raises the true error.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    agreed = all_ranks_agree(error is None)
    if error is not None:
        raise error
    if not agreed:
        raise OtherRankError(f"Another rank {what}; see its own message.")
    return result


def least_of_all_ranks(value: int) -> int:
    """The smallest of a number that each rank has; a collective call."""
    return int(_reduced(value, torch.int64, dist.ReduceOp.MIN))


def largest_of_all_ranks(value: float) -> float:
    """The largest of a number that each rank has; a collective call."""
    return float(_reduced(value, torch.float64, dist.ReduceOp.MAX))


def _reduced(value: float, dtype: torch.dtype, op: Any) -> float:
    if group_size() == 1:
        return value
    found = torch.tensor([value], dtype=dtype, device=_collective_device())
    dist.all_reduce(found, op=op)
    return found.item()


def _read_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"{name}={text!r} must be a whole number; torchrun sets it.") from None


def _pick_device(name: str, local_rank: int, many_ranks: bool) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"Unknown device {name!r}. Allowed: auto, cpu, cuda, cuda:N.") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"Device {name!r} is not supported. Allowed: auto, cpu, cuda, cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if many_ranks or device.index is None else device.index
    if index >= count:
        request = (
            f"local rank {local_rank} needs cuda:{index}" if many_ranks else f"device={name!r}"
        )
        allowed = f"at most {count} ranks per node" if count else "--device cpu"
        raise ValueError(f"{request}, but this node has {count} CUDA devices. Allowed: {allowed}.")
    return torch.device("cuda", index)


def _connect(
    device: torch.device, timeout: timedelta, meeting: timedelta
) -> tuple[dist.Store, dict[int, int], bool]:
    """Make the process group; CPU tensors use gloo, CUDA tensors NCCL.

    Returns:
        A store for heartbeats, this machine's processes, and whether the ranks were started before.
    """
    rank, world_size = _read_int("RANK", 0), _read_int("WORLD_SIZE", 1)
    limit_s = meeting.total_seconds()
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=meeting)))
    except dist.DistError as error:
        raise OtherRankError(
            f"Rank {rank} of {world_size} could not reach the ranks' store within {limit_s:.0f} s; "
            "it is held by torchrun's agent or by rank 0."
        ) from error
    store.set_timeout(timeout)
    # An agent keeps its store over restarts, with the addresses of ended ranks.
    try:
        attempt = agree_on_attempt(store, rank, world_size, limit_s)
    except TimeoutError as error:
        raise OtherRankError(str(error)) from error
    group = dist.PrefixStore(f"flashdreams{attempt.name}", store)
    pids = _local_pids(group, rank, world_size)
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=group,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_cuda else None,
    )
    # A separate connection: a reporting thread must not wait behind a blocked one.
    heartbeat = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    heartbeats = dist.PrefixStore(f"heartbeat{attempt.name}", heartbeat)
    return heartbeats, pids, attempt.starts > world_size


def _local_pids(store: dist.Store, rank: int, world_size: int) -> dict[int, int]:
    """The process of every rank on this machine; all ranks have joined."""
    keys = [f"here{other}" for other in range(world_size)]
    store.set(keys[rank], f"{os.getpid()} {_machine()}")
    told = [store.get(key).decode().split(" ", 1) for key in keys]
    return {
        other: int(pid) for other, (pid, machine) in enumerate(told) if machine == _machine() != ""
    }


def _machine() -> str:
    """An identifier shared by processes that see each other's pids; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _collective_device() -> torch.device:
    """A device whose tensors the default group can reduce: the CPU unless it is NCCL alone."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
