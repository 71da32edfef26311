"""Time on a CPU: of single operators, by their shapes, and of control encoders."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flashdreams.infra.saved_rollouts import new_state

MAX_FLOPS = 1e9
"""Operations of the largest timed operator; above it, rates are accurate enough."""

MAX_BYTES = 64e6
"""Likewise, bytes that an operator reads and writes."""

CLIP_DIMS = 5
"""Dims of a clip ``[B, C, T, H, W]``; its memory layout on a CPU is not the meta device's."""

COPIES_BYTES = 512e6
"""Most that copies of weights and of rollout state may take while operators are timed."""


CONTROL_STEPS, CONTROL_MS = 9, 300
"""Calls of a control encoder of which the median counts, and time after which there are fewer."""


class TensorForm(NamedTuple):
    """Metadata of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    kept: bool
    """Whether it exists between calls: a weight, or state of a rollout. Such tensors differ in
    each call, so they come from memory; the others were just written and are in the caches."""

    def new(self) -> Tensor:
        """A tensor of this form on the CPU; all values are equal, and valid as indices."""
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        value = 0.5 if self.dtype.is_floating_point else 0
        storage = torch.full((max(size, 1),), value, dtype=torch.float32, device="cpu")
        return storage.to(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Operator:
    """One operator and its arguments without values; equal operators take the same time."""

    kind: str
    """``"gemm"``, ``"attention"``, ``"convolution"`` or ``"memory"``."""
    function: Callable[..., Any]
    args: tuple[Any, ...]
    """With a `TensorForm` for each tensor."""
    kwargs: tuple[tuple[str, Any], ...]
    flops: int
    nbytes: int


def form_of(value: Any, is_kept: Callable[[Tensor], bool]) -> Any:
    """Arguments in a form that can be compared and hashed."""
    if isinstance(value, Tensor):
        return TensorForm(tuple(value.shape), value.stride(), value.dtype, is_kept(value))
    if isinstance(value, list | tuple):
        return tuple(form_of(item, is_kept) for item in value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


class OperatorTimes:
    """Seconds of operators on this CPU, with the threads that torch has; each is timed once."""

    def __init__(self, budget_s: float = 0.02) -> None:
        """Prepare.

        Args:
            budget_s: time to spend on one operator.
        """
        self.budget_s = budget_s
        self._known: dict[Operator, float] = {}

    def seconds(self, operators: Mapping[Operator, int]) -> dict[Operator, float]:
        """Time of one call of each operator that is small enough.

        Operators take turns, each as often as in an AR step: one that is called over and over
        alone finds its weights in the caches, one that is called rarely finds not even its program.

        Args:
            operators: with their number in an AR step.
        """
        new = {
            operator: calls
            for operator, calls in operators.items()
            if operator.flops <= MAX_FLOPS
            and operator.nbytes <= MAX_BYTES
            and operator not in self._known
        }
        self._known.update(self._time(new))
        return {o: self._known[o] for o in operators if o in self._known}

    def _time(self, operators: Mapping[Operator, int]) -> dict[Operator, float]:
        shared: dict[TensorForm, Tensor] = {}
        share = COPIES_BYTES / max(1, len(operators))
        found: list[tuple[list[float], Iterator[Callable[[], Any]]]] = [
            ([], cycle(_calls(operator, calls, share, shared)))
            for operator, calls in operators.items()
        ]
        turns = [found[n] for n in _in_turn(operators.values())]
        end = time.perf_counter() + self.budget_s * len(operators)
        with torch.no_grad():
            for times, ready in cycle(turns):
                if time.perf_counter() > end and len(times) > 1:
                    if all(len(others) > 1 for others, _ in found):
                        break
                    continue
                call = next(ready)
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        medians = (statistics.median(times[1:]) for times, _ in found)
        return dict(zip(operators, medians, strict=True))


def _in_turn(numbers: Iterable[int]) -> list[int]:
    """Which is called when, if each of several is called so many times, spread evenly."""
    turns = [((k + 0.5) / calls, n) for n, calls in enumerate(numbers) for k in range(calls)]
    return [n for _, n in sorted(turns)]


def _calls(
    operator: Operator, count: int, most_bytes: float, shared: dict[TensorForm, Tensor]
) -> list[Callable[[], Any]]:
    """Calls of an operator, each with weights and state of its own."""
    operator = _as_on_a_cpu(operator)
    forms = filter(_is_form, tree_leaves((operator.args, operator.kwargs), _is_form))
    kept = sum(_nbytes(x) for x in forms if x.kept)
    return [
        partial(
            operator.function,
            *_filled(operator.args, shared),
            **{name: _filled(value, shared) for name, value in operator.kwargs},
        )
        for _ in range(max(1, min(count, int(most_bytes // max(kept, 1)))))
    ]


def median_s(call: Callable[[], Any], budget_s: float = 0.08) -> float:
    """Median CPU time of a call, of this thread only: others may use the CPU too."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or not times:
        start = time.thread_time()
        for _ in range(5):
            call()
        times.append((time.thread_time() - start) / 5)
    return statistics.median(times)


def _as_on_a_cpu(operator: Operator) -> Operator:
    """The operator with clips as autoencoders keep them on a CPU, channels innermost.

    Their convolutions in float32 are those that `CausalConv3d` runs there.
    """
    args = _innermost(operator.args)
    if operator.kind != "convolution" or len(args[0].shape) != CLIP_DIMS:
        return replace(operator, args=args)
    x, _, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed or x.dtype != torch.float32:
        return operator
    args = (x, operator.args[1], bias, padding, stride, dilation, groups)
    return replace(operator, function=torch.ops.aten.mkldnn_convolution, args=args)


def _innermost(value: Any) -> Any:
    """Arguments with the channels of clips innermost."""

    def of_form(form: TensorForm) -> TensorForm:
        if len(form.shape) != CLIP_DIMS:
            return form
        plain = torch.empty(form.shape, dtype=form.dtype, device="meta")
        return form._replace(stride=plain.to(memory_format=torch.channels_last_3d).stride())

    return tree_map_only(TensorForm, of_form, value, _is_form)


def _filled(value: Any, shared: dict[TensorForm, Tensor]) -> Any:
    """Arguments with tensors for their forms; those that are not kept are the same ones."""

    def of_form(form: TensorForm) -> Tensor:
        if form.kept:
            return form.new()
        if form not in shared:
            shared[form] = form.new()
        return shared[form]

    return tree_map_only(TensorForm, of_form, value, _is_form)


def _is_form(value: Any) -> bool:
    return isinstance(value, TensorForm)


def _nbytes(form: TensorForm) -> int:
    return torch.Size(form.shape).numel() * form.dtype.itemsize


def control_ms(config: Any, transformer: Any, frames: int) -> float:
    """Time of the control encoder in a late AR step; 0 without one, or if it gives no example.

    Args:
        config: of the encoder; None without one.
        transformer: gives the context of the rollout.
        frames: pixel frames of the step.
    """
    if config is None:
        return 0.0
    with torch.device("meta"):  # only the encoder of the first image has weights
        encoder = config.setup()
    step = encoder.example_step(frames)
    if step is None:
        return 0.0
    context, control = transformer.example_context(1), transformer.example_control(1)
    state = new_state(encoder, context | control if isinstance(control, Mapping) else context)
    late = {} if state is None else {"autoregressive_index": 1, "cache": state}
    found: list[float] = []
    while len(found) < CONTROL_STEPS and sum(found) < CONTROL_MS:
        start = time.perf_counter()
        encoder(step, **late)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)
