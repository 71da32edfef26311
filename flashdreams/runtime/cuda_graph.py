"""Calls replayed as CUDA graphs."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Signature = tuple[tuple[torch.Size, torch.dtype], ...]
Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
GraphKey = tuple[Hashable, tuple[Place, ...]]
Path = tuple[Any, ...]
"""``((), step)`` nested: cheap to build at every call, spelled out only in an error."""


@dataclass(frozen=True)
class Captured:
    """A recorded call: ``replay`` repeats it on the same memory, its result goes to ``output``."""

    replay: Callable[[], None]
    output: Tensor
    counted: Any = None
    """What the recorded call counted, to be counted again at every replay; None without a meter."""


class CaptureBackend(Protocol):
    """What records a call."""

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        """Record ``function``; its result need not have been computed yet."""

    def wait(self) -> None:
        """Wait for all replays, and raise what went wrong in them."""


class CallMeter(Protocol):
    """Counts what calls do on the host, where the replay of a recorded one does nothing."""

    def snapshot(self) -> Any:
        """The counts as they are now."""

    def since(self, snapshot: Any) -> Any:
        """What was counted after a snapshot."""

    def add_all(self, counts: Any) -> None:
        """Count all of it once more."""


class CudaCapture:
    """Records calls with :class:`torch.cuda.CUDAGraph`.

    All graphs share one memory pool: they never run at the same time, and no result outlives its
    replay in the pool.
    """

    def __init__(self, device: torch.device, warmup_runs: int = 2) -> None:
        self.device = device
        self.warmup_runs = warmup_runs
        self._pool: Any = None
        self._stream: Any = None

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        """Run ``function`` on a side stream until nothing is built any more, then record it.

        It is one stream for all recordings: blocks of a pool belong to the stream that took them,
        so on another one a recording could use nothing that those before it have freed.

        Errors in other threads do not break the recording, but no other thread may issue work that
        the recorded stream waits for.
        """
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            # Also around the recording: one that fails does not put the caller's stream back.
            with torch.cuda.stream(stream):
                for _ in range(self.warmup_runs):
                    function()
                graph = torch.cuda.CUDAGraph()
                pool = self._pool or torch.cuda.graph_pool_handle()
                # A recording that fails may keep its pool for ever: the next one begins a new one.
                self._pool = None
                try:
                    with torch.cuda.graph(
                        graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        output = function()
                except BaseException:
                    self._stop_allocating(pool)
                    raise
                self._pool = pool
            torch.cuda.current_stream().wait_stream(stream)
        return Captured(graph.replay, output)

    @staticmethod
    def _stop_allocating(pool: Any) -> None:
        """Take back what a failed recording leaves behind in PyTorch's allocator.

        It would believe for ever that a recording is under way, and refuse the next one. Releases
        that clean up by themselves say that there is nothing to stop.
        """
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)

    def wait(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self.device).synchronize()


class GraphedCallable:
    """A function of some tensors and some state, captured once per key and replayed from then on.

    ``graphed(latent, timestep, cache)`` copies the leading tensors into static buffers; the
    arguments after them are state, whose tensors the function reads and writes where they lie. A
    graph is found by what must not change under it: the place, shape and dtype of every tensor of
    the state, and what ``key`` says of the rest (the visible length, which is a Python number).
    Tensors are found in lists, tuples, mappings, dataclasses and attributes of plain objects; a
    class lists in ``outside_graphs`` the attributes that the function never touches.

    The function is run more than once while it is captured, so running it again must change
    nothing: the chunk's cache slots are overwritten with the same values.

    A meter given as ``meter`` counts replays, too.

    Life: capture (warm-up) -> :meth:`seal` (from then on a new key raises) -> :meth:`drop`. On a
    CPU the function is simply called.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        *,
        key: Callable[..., Hashable] | None = None,
        backend: CaptureBackend | None = None,
        max_graphs: int = 128,
    ) -> None:
        """Wrap a function.

        Args:
            function: takes the tensors, then the state; returns one tensor.
            device: where it runs; anything but CUDA means that nothing is captured.
            key: of the state's arguments: what the function depends on beside tensors. Returning
                None says that this state is not worth a graph: the call is then eager.
            backend: what records; None means CUDA's own on CUDA.
            max_graphs: more keys than this are a mistake, namely state that moves at every call.
        """
        self.function = function
        self.key = key
        self.max_graphs = max_graphs
        self.captures = 0
        self.replays = 0
        self.eager_calls = 0
        self.sealed = False
        if backend is None and device.type == "cuda":
            backend = CudaCapture(device)
        self._backend = backend
        self._device = device
        self._signature: Signature | None = None
        self._inputs: list[Tensor] = []
        self._graphs: dict[GraphKey, Captured] = {}
        self.meter: CallMeter | None = None
        self._states: Sequence[Any] | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Call the function, by replay where it can.

        Args:
            arguments: the tensors, then the state.

        Returns:
            The result, in memory of its own.

        Raises:
            ValueError: shapes or dtypes of the tensors are not those captured.
            RuntimeError: a new key after :meth:`seal`, or too many keys.
        """
        backend = self._backend
        count = next((i for i, x in enumerate(arguments) if not isinstance(x, Tensor)), None)
        tensors, state = arguments[:count], () if count is None else arguments[count:]
        said = self.key(*state) if self.key is not None else ()
        if backend is None or said is None or self._is_foreign(state):
            self.eager_calls += 1
            return self.function(*arguments)
        self._load(tensors)
        graph_key = (said, tuple(_place(tensor) for _, tensor in _tensors(state)))
        graph = self._graphs.get(graph_key)
        if graph is None:
            graph = self._capture(backend, graph_key, state)
        else:
            graph.replay()
            self.replays += 1
            if self.meter is not None:
                self.meter.add_all(graph.counted)
        return graph.output.clone()

    @property
    def can_capture(self) -> bool:
        """Whether anything is ever recorded here; on a CPU nothing is."""
        return self._backend is not None

    def seal(self, states: Sequence[Any] | None = None) -> None:
        """Declare warm-up over: whatever is not captured by now will never be.

        Args:
            states: the states that were captured, each as the first argument after the tensors. A
                call on any other object is eager from now on; None: it raises.
        """
        self.sealed = True
        self._states = states

    def reset(self) -> None:
        """Begin another rollout: counts restart; graphs, buffers and the seal stay."""
        self.replays = 0
        self.eager_calls = 0

    def drop(self) -> None:
        """Free graphs and buffers; do this before the process group ends.

        The seal stays; calls on states that were named there are eager from then on. Waits for the
        replays that are under way.
        """
        if self._backend is not None and self._graphs:
            self._backend.wait()
        self._graphs.clear()
        self._inputs.clear()
        self._signature = None
        if self._states is not None:
            self._states = ()

    def _is_foreign(self, state: tuple[Any, ...]) -> bool:
        """Whether this state was left out of what was captured before the seal."""
        return self._states is not None and not any(state[0] is known for known in self._states)

    def _load(self, tensors: Sequence[Tensor]) -> None:
        """Copy the inputs into their static buffers; the first call makes these."""
        signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if self._signature is None:
            # Buffers made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self._inputs = [
                    torch.empty(t.shape, dtype=t.dtype, device=self._device) for t in tensors
                ]
            self._signature = signature
        if signature != self._signature:
            raise ValueError(
                f"Captured for inputs {_describe(self._signature)}, called with "
                f"{_describe(signature)}. A GraphedCallable serves one signature: bring the inputs "
                "to it, or wrap the function a second time."
            )
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def _capture(
        self,
        backend: CaptureBackend,
        graph_key: GraphKey,
        state: tuple[Any, ...],
    ) -> Captured:
        """Record the call; the graph is kept once its first replay has succeeded."""
        if self.sealed or len(self._graphs) >= self.max_graphs:
            raise RuntimeError(self._refusal(graph_key, state))
        counted: Any = None

        def function() -> Tensor:
            nonlocal counted
            before = self.meter.snapshot() if self.meter is not None else None
            output = self.function(*self._inputs, *state)
            counted = self.meter.since(before) if self.meter is not None else None
            return output

        with torch.no_grad():
            graph = replace(backend.capture(function), counted=counted)
            graph.replay()
            backend.wait()
        self._graphs[graph_key] = graph
        self.captures += 1
        return graph

    def _refusal(self, graph_key: GraphKey, state: tuple[Any, ...]) -> str:
        """Why there is no further capture, and what is new about the key."""
        why = (
            "captures are sealed since warm-up"
            if self.sealed
            else f"there are max_graphs={self.max_graphs} graphs already"
        )
        said, places = graph_key
        known = [key for key, at in self._graphs if at == places]
        if known:
            new = f"key {said!r} is new for this state; captured: {known!r}"
        else:
            rows = [at for key, at in self._graphs if key == said and len(at) == len(places)]
            old = rows[-1] if rows else ()
            names = [_path_name(path) for path, _ in _tensors(state)]
            moved = [n for n, a, b in zip(names, old, places, strict=False) if a != b]
            new = (
                f"of the state's tensors these moved or changed shape: {', '.join(moved[:8])}"
                if moved
                else f"no state like this one was captured (key {said!r}, {len(places)} tensors)"
            )
        return (
            f"This call needs a new CUDA graph, but {why}: {new}. "
            "Capture every phase during warm-up, and keep state in place by copying into it."
        )


def copy_in_place(stored: Tensor | None, new: Tensor) -> Tensor:
    """Put new values where the old ones lie, so that a graph that reads them stays valid.

    Returns:
        ``stored`` with the values of ``new``; ``new`` itself where nothing of its shape, dtype and
        device is stored.
    """
    if (
        stored is None
        or stored.shape != new.shape
        or stored.dtype != new.dtype
        or stored.device != new.device
    ):
        return new
    return stored.copy_(new)


def _describe(signature: Signature) -> str:
    return ", ".join(f"{str(dtype)[6:]}{list(shape)}" for shape, dtype in signature) or "nothing"


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(state: Any) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of the state with the path that leads to them; an object counts once.

    Walked at every call, so what a type holds is decided once per type.
    """
    seen: set[int] = set()
    pending: list[tuple[Path, Any]] = [((), state)]
    while pending:
        path, value = pending.pop()
        kind = _kind_of(type(value))
        if kind == "tensor":
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        hidden: frozenset[str] = getattr(type(value), "outside_graphs", frozenset())
        if kind == "sequence":
            children: Iterable[tuple[Any, Any]] = enumerate(value)
        elif kind == "mapping":
            children = value.items()
        else:
            children = getattr(value, "__dict__", {}).items()
            slots = _SLOTS[type(value)]
            if slots:
                here = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
                children = [*children, *here]
        for step, child in children:
            if _kind_of(type(child)) != "leaf" and step not in hidden:
                pending.append(((path, step), child))


_KINDS: dict[type, str] = {}
_SLOTS: dict[type, tuple[str, ...]] = {}


def _kind_of(kind: type) -> str:
    """What values of a type can hold: themselves a tensor, parts, or nothing that counts."""
    found = _KINDS.get(kind)
    if found is not None:
        return found
    groups = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    slots = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    _SLOTS[kind] = tuple(name for name in slots if name not in ("__dict__", "__weakref__"))
    is_code = issubclass(kind, type) or any("__call__" in vars(base) for base in kind.__mro__)
    if issubclass(kind, Tensor):
        found = "tensor"
    elif issubclass(kind, (list, tuple)):
        found = "sequence"
    elif issubclass(kind, Mapping):
        found = "mapping"
    elif (kind.__dictoffset__ or _SLOTS[kind]) and not is_code:
        found = "attributes"
    else:
        found = "leaf"
    _KINDS[kind] = found
    return found


def _path_name(path: Path) -> str:
    steps: list[str] = []
    while path:
        path, step = path
        steps.append(f".{step}" if isinstance(step, str) else f"[{step}]")
    return "state" + "".join(reversed(steps))
