"""What one rank computes, holds and sends in an AR step, counted on the meta device."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flashdreams.attention.backends import sdpa
from flashdreams.attention.cache import KVCache
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.fp8 import FP8
from flashdreams.parallel.collectives import Traffic
from flashdreams.planning.operators import Operator, form_of

FP8_GEMM = "_scaled_mm"
GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", FP8_GEMM})
CONVOLUTIONS = frozenset({"convolution", "_convolution"})


@dataclass(frozen=True)
class Work:
    """Operations of one kind of call."""

    gemm_flops: int = 0
    """Operations of matmuls."""
    fp8_gemm_flops: int = 0
    """The part of ``gemm_flops`` whose inputs are FP8."""
    attention_flops: int = 0
    """Operations of attention, as in backends: no scores in memory."""
    fp8_flops: int = 0
    """The part of ``attention_flops`` that reads an FP8 cache."""
    convolution_flops: int = 0
    """Operations of convolutions."""
    gemm_bytes: int = 0
    """Bytes that matmuls and convolutions read and write."""
    other_bytes: int = 0
    """Bytes that everything else reads and writes."""
    calls: int = 0
    """Kernels."""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    """Collectives of this rank."""
    operators: Mapping[Operator, int] = field(default_factory=dict)
    """Number of each distinct operator; with ``calls`` in all."""

    @property
    def flops(self) -> int:
        """All counted operations."""
        return self.gemm_flops + self.attention_flops + self.convolution_flops

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends."""
        return sum(traffic.bytes_sent for traffic in self.traffic.values())

    def plus(self, other: "Work", times: int = 1) -> "Work":
        """This work and another one, some number of times."""
        return Work(
            **{n: getattr(self, n) + times * getattr(other, n) for n in _NUMBERS},
            traffic=_sums(self.traffic, other.traffic, times, Traffic()),
            operators=_sums(self.operators, other.operators, times, 0),
        )

    def __add__(self, other: "Work") -> "Work":
        return self.plus(other)

    def __mul__(self, times: int) -> "Work":
        return Work().plus(self, times)


def _sums(a: Mapping[Any, Any], b: Mapping[Any, Any], times: int, zero: Any) -> dict[Any, Any]:
    return {key: a.get(key, zero) + b.get(key, zero) * times for key in {**a, **b}}


_NUMBERS = (
    "gemm_flops", "fp8_gemm_flops", "attention_flops", "fp8_flops", "convolution_flops",
    "gemm_bytes", "other_bytes", "calls",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts the operations of the enclosed code, and the memory of its tensors.

    Views and allocations cost nothing. Attention is counted by the backend that
    `count_attention` puts into the cores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = dict.fromkeys(_NUMBERS, 0)
        self.operators: dict[Operator, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one operation."""
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if outputs := _meta_tensors(out):
            self._count(func, args, kwargs, outputs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], out: Any) -> None:
        inputs = _meta_tensors((args, kwargs))
        for x in outputs:
            self._follow(x)
        name = func._schema.name.rpartition("::")[2]
        fresh = func.is_view or not inputs or name.startswith(("empty", "new_empty", "detach"))
        if fresh or name in ("_unsafe_view", "_reshape_alias", "lift_fresh", "alias"):
            return
        nbytes = sum(_nbytes(x) for x in (*inputs, *outputs))
        flops, kind = 0, "memory"
        if name in GEMMS or name in CONVOLUTIONS:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            kind = "gemm" if name in GEMMS else "convolution"
            self.numbers[f"{kind}_flops"] += flops
            self.numbers["fp8_gemm_flops"] += flops if name == FP8_GEMM else 0
        self.numbers["other_bytes" if kind == "memory" else "gemm_bytes"] += nbytes
        self._add(kind, func, args, kwargs, flops, nbytes)

    def _add(
        self, kind: str, func: Any, args: Any, kwargs: Mapping[str, Any], flops: int, nbytes: int
    ) -> None:
        """Count one operator by its shapes."""
        named = tuple((n, form_of(v, self._is_kept)) for n, v in kwargs.items())
        operator = Operator(kind, func, form_of(args, self._is_kept), named, flops, nbytes)
        self.operators[operator] = self.operators.get(operator, 0) + 1
        self.numbers["calls"] += 1

    def _is_kept(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._known

    def add_attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Count one attention call, ``[B, L, N, D]`` and ``[B, S, N, D]``."""
        batch, queries, heads, dim = q.shape
        flops = 2 * batch * heads * queries * k.shape[1] * (dim + dim)
        nbytes = sum(map(_nbytes, (q, k, v, q)))
        self.numbers["attention_flops"] += flops
        self.numbers["fp8_flops"] += flops if k.dtype == FP8 else 0
        self.numbers["gemm_bytes"] += nbytes
        self._add("attention", sdpa, (q, k, v), {"scale": dim**-0.5}, flops, nbytes)

    def _follow(self, x: Tensor) -> None:
        """Count a storage while a tensor refers to it."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if key not in self._holders:
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(x, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live_bytes -= size

    def leave_out(self, value: Any) -> None:
        """Do not count the memory of existing tensors."""
        storages(value, self._known)

    def work(self, traffic: Mapping[str, Traffic] | None = None) -> Work:
        """The counts."""
        return Work(**self.numbers, traffic=dict(traffic or {}), operators=self.operators)


@contextmanager
def counting_attention(module: nn.Module, counter: Counter) -> Iterator[None]:
    """Let attention cores count and return empty tensors."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
        counter.add_attention(q, k, v)
        out = torch.empty_like(q)
        if not return_lse:
            return out
        return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    def attend_stored(q: Tensor, cache: KVCache) -> Tensor:
        """An FP8 cache is read by the kernel; only emulation on a CPU dequantizes it."""
        counter.add_attention(q, *cache.stored())
        return torch.empty_like(q, dtype=cache.spec.dtype)

    cores = [core for core in module.modules() if isinstance(core, AttentionCore)]
    kept = [core.backend for core in cores]
    for core in cores:
        core.backend = attend
        vars(core)["attend_stored"] = attend_stored
    try:
        yield
    finally:
        for core, backend in zip(cores, kept, strict=True):
            core.backend = backend
            del vars(core)["attend_stored"]


def count(
    module: nn.Module,
    call: Callable[[], Any],
    state: Any = None,
    traffic: Callable[[], Mapping[str, Traffic]] = dict,
) -> tuple[Work, int]:
    """Count a call of a module on the meta device.

    Args:
        module: whose attention cores are counted.
        call: runs it.
        state: of the rollout, whose memory is not that of the call.
        traffic: the collectives of the call.

    Returns:
        The work, and the peak bytes of the call's tensors.
    """
    counter = Counter()
    counter.leave_out([*module.parameters(), *module.buffers(), state])
    with torch.no_grad(), counting_attention(module, counter), counter:
        result = call()
        del result
    return counter.work(traffic()), counter.peak_bytes


def _meta_tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_meta]


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def storages(value: Any, found: set[int] | None = None) -> int:
    """Bytes of the storages that a state refers to, each once.

    Args:
        value: tensors, containers, dataclasses or objects of these.
        found: storages that are left out; those that are counted are added.
    """
    found = set() if found is None else found
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage._cdata in found:
            return 0
        found.add(storage._cdata)
        return storage.nbytes()
    if isinstance(value, Mapping):
        return sum(storages(x, found) for x in value.values())
    if isinstance(value, list | tuple):
        return sum(storages(x, found) for x in value)
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return 0
    return sum(storages(x, found) for x in vars(value).values())
