"""Calls replayed as CUDA graphs."""

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Signature = tuple[tuple[torch.Size, torch.dtype], ...]

logger = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A call that runs eagerly but cannot be captured, for instance one that waits for the GPU."""


@dataclass(frozen=True)
class Captured:
    """A captured call: ``replay`` repeats it on the same memory, its result goes to ``output``."""

    replay: Callable[[], None]
    output: Tensor
    counted: Any = None
    """Counts of the captured call, added again at every replay; None without a meter."""


class CudaCapture:
    """Captures calls with :class:`torch.cuda.CUDAGraph`.

    All graphs share one memory pool: they never run at the same time, and no result outlives its
    replay in the pool.
    """

    def __init__(self, device: torch.device, warmup_runs: int = 2) -> None:
        self.device = device
        self.warmup_runs = warmup_runs
        self._pool: Any = None
        self._stream: Any = None

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        """Run ``function`` on a side stream until nothing new is built, then capture it.

        All captures use one stream: blocks of a pool belong to the stream that allocated them,
        so on another stream a capture could not reuse freed blocks.

        Errors in other threads do not break the capture, but no other thread may issue work that
        the captured stream waits for.

        Raises:
            CaptureError: ``function`` ran before, but could not be captured.
        """
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            # Also around the capture: a failed one does not restore the caller's stream.
            with torch.cuda.stream(stream):
                for _ in range(self.warmup_runs):
                    function()
                graph = torch.cuda.CUDAGraph()
                pool = self._pool or torch.cuda.graph_pool_handle()
                # A failed capture may keep its pool forever: the next one starts a new pool.
                self._pool = None
                try:
                    with torch.cuda.graph(
                        graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        output = function()
                except BaseException as error:
                    self._clean_up(pool)
                    if isinstance(error, Exception):
                        raise CaptureError(_first_reason(error)) from error
                    raise
                self._pool = pool
            torch.cuda.current_stream().wait_stream(stream)
        return Captured(graph.replay, output)

    @staticmethod
    def _clean_up(pool: Any) -> None:
        """Reset the state that a failed capture leaves in PyTorch's allocator and generator.

        Both would treat a capture as still running: the allocator would refuse the next
        one, the generator eager random numbers. Releases that clean up themselves report that
        there is nothing to stop.
        """
        device = torch.cuda.current_device()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        generator = torch.cuda.default_generators[device]
        with suppress(RuntimeError):
            generator.graphsafe_set_state(generator.clone_state())

    def wait(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self.device).synchronize()


class GraphedCallable:
    """A function of some tensors and some state, captured once per state and key, then replayed.

    ``graphed(latent, timestep, cache)`` copies the leading tensors into static buffers; the
    arguments after them are state, whose tensors the function reads and writes in place. A graph
    belongs to one state object and to its ``key`` (the visible length, for example,
    which is a Python number). The tensors of a state must keep their storage: whatever changes from
    call to call is copied into them.

    The function is run more than once while it is captured, so running it again must change
    nothing: the chunk's cache slots are overwritten with the same values.

    A meter given as ``meter`` counts replays, too: what its ``since`` gives of the captured call is
    added by its ``add_all``.

    A function that runs but cannot be captured, such as one that waits for the GPU, is called
    eagerly from then on; a warning says why, once, and ``failure`` has the reason.

    Life: capture (warm-up) -> :meth:`seal` (from then on a new key raises) -> :meth:`drop`. On a
    CPU the function is just called.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        *,
        key: Callable[..., Hashable] | None = None,
        state_of: Callable[..., object] | None = None,
        backend: Any = None,
    ) -> None:
        """Wrap a function.

        Args:
            function: takes the tensors, then the state; returns one tensor.
            device: where it runs; anything but CUDA means that nothing is captured.
            key: of the state's arguments: what the function depends on besides tensors. Returning
                None makes the call eager.
            state_of: of the state's arguments: the object that the graphs belong to; None: the
                first of them.
            backend: what captures, with the methods of `CudaCapture`; None: that on CUDA.
        """
        self.function = function
        self.key = key
        self.state_of = state_of or (lambda first=None, *rest: first)
        self.captures = 0
        self.replays = 0
        self.eager_calls = 0
        self.sealed = False
        self.failure: str | None = None
        if backend is None and device.type == "cuda":
            backend = CudaCapture(device)
        self._backend = backend
        self._device = device
        self._signature: Signature | None = None
        self._inputs: list[Tensor] = []
        self._graphs: dict[tuple[int, Hashable], Captured] = {}
        self._captured_states: dict[int, object] = {}  # kept, so that their ids are not reused
        self.meter: Any = None
        self._states: Sequence[object] | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Call the function, by replay if possible.

        Args:
            arguments: the tensors, then the state.

        Returns:
            The result, in separate memory.

        Raises:
            ValueError: shapes or dtypes of the tensors are not those captured.
            RuntimeError: a new key after :meth:`seal`.
        """
        count = next((i for i, x in enumerate(arguments) if not isinstance(x, Tensor)), None)
        tensors, state = arguments[:count], () if count is None else arguments[count:]
        if self._backend is None or not self.serves(*state):
            self.eager_calls += 1
            return self.function(*arguments)
        self._load(tensors)
        owner = self.state_of(*state)
        graph_key = (id(owner), self.key(*state) if self.key is not None else ())
        graph = self._graphs.get(graph_key)
        if graph is None:
            try:
                graph = self._capture(self._backend, graph_key, state)
            except CaptureError as error:
                self._give_up(error)
                self.eager_calls += 1
                return self.function(*arguments)
            self._captured_states[id(owner)] = owner
        else:
            graph.replay()
            self.replays += 1
            if self.meter is not None:
                self.meter.add_all(graph.counted)
        return graph.output.clone()

    def serves(self, *state: Any) -> bool:
        """Whether a call on this state is captured or replayed, and not eager."""
        if self._backend is None or self.failure is not None:
            return False
        if self.key is not None and self.key(*state) is None:
            return False
        if self._states is None:
            return True
        owner = self.state_of(*state)
        return any(owner is known for known in self._states)

    @property
    def can_capture(self) -> bool:
        """Whether anything is ever captured here; on a CPU nothing is."""
        return self._backend is not None

    def seal(self, states: Sequence[object] | None = None) -> None:
        """End warm-up: nothing is captured afterwards.

        Args:
            states: the states that were captured. A call on any other object is eager from now on;
                None: it raises.
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
        replays that are queued.
        """
        if self._backend is not None and self._graphs:
            self._backend.wait()
        self._graphs.clear()
        self._captured_states.clear()
        self._inputs.clear()
        self._signature = None
        if self._states is not None:
            self._states = ()

    def _give_up(self, error: CaptureError) -> None:
        """Call eagerly from now on, and log the reason."""
        self.failure = str(error)
        logger.warning(
            "CUDA graphs are off, the network runs eagerly: its call cannot be captured (%s). A "
            "network that waits for the GPU (.item(), .cpu(), printing) is the usual cause.",
            error,
        )
        self.drop()

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
        self, backend: Any, graph_key: tuple[int, Hashable], state: tuple[Any, ...]
    ) -> Captured:
        """Capture the call; the graph is kept once its first replay has succeeded."""
        if self.sealed:
            captured = [key for owner, key in self._graphs if owner == graph_key[0]]
            raise RuntimeError(
                f"This call needs a new CUDA graph, but captures are sealed since warm-up: key "
                f"{graph_key[1]!r} is new for this state; captured: {captured!r}. Capture every "
                "form of the call during warm-up."
            )
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


def copy_in_place(stored: Tensor | None, new: Tensor) -> Tensor:
    """Deprecated, will be removed in 0.3: ``stored.copy_(new)`` for equal shape, dtype and device.

    Returns:
        ``stored`` with the values of ``new``; ``new`` itself where it does not fit.
    """
    warnings.warn(
        "copy_in_place will be removed in 0.3; copy into the stored tensor with Tensor.copy_.",
        DeprecationWarning,
        stacklevel=2,
    )
    fits = stored is not None and (stored.shape, stored.dtype) == (new.shape, new.dtype)
    if stored is None or not fits or stored.device != new.device:
        return new
    return stored.copy_(new)


def _first_reason(error: BaseException) -> str:
    """One line of the original error; errors from ending the capture follow from it."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _describe(signature: Signature) -> str:
    return ", ".join(f"{str(dtype)[6:]}{list(shape)}" for shape, dtype in signature) or "nothing"
