"""Keys, buffers, errors and counts of graphed calls, with a recorder that runs on a CPU."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from flashdreams.runtime.cuda_graph import Captured, CaptureError, GraphedCallable

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Writes down operations with the tensors that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, (args, kwargs or {}), out))
        return out

    def play(self, result: Tensor) -> Tensor:
        """Carry all of it out again; what was computed then is computed again, the rest is read."""
        new: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            return new.get(id(x), x) if isinstance(x, Tensor) else x

        for func, inputs, out in self.calls:
            args, kwargs = tree_map(current, inputs)
            done = tree_leaves(func(*args, **kwargs))
            for work in done:
                if hasattr(work, "wait"):  # an exchange between ranks
                    work.wait()
            for old, x in zip(tree_leaves(out), done, strict=True):
                if isinstance(old, Tensor):
                    new[id(old)] = x
        return current(result)


class TraceCapture:
    """Freezes a call as CUDA does: the tensors stay, every Python number and branch is fixed."""

    def __init__(self) -> None:
        self.fail = False
        self.refuse = False
        self.waits = 0

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        function()
        if self.refuse:
            raise CaptureError("operation not permitted when stream is capturing")
        with Tape() as tape:
            result = function()
        output = torch.full_like(result, torch.nan)

        def replay() -> None:
            if self.fail:
                raise RuntimeError("replay failed")
            output.copy_(tape.play(result))

        return Captured(replay, output)

    def wait(self) -> None:
        self.waits += 1


def trace_graphs(model: Any) -> None:
    """Let the graphs of a transformer on a CPU be captured by a recorder."""
    model.network._backend = TraceCapture()


@dataclass
class Layer:
    """State of the kind that the transformers have: nested, with a Python number inside."""

    values: Tensor
    length: int = 2
    more: list[dict[str, Tensor]] = field(default_factory=list)


def read_prefix(x: Tensor, layer: Layer) -> Tensor:
    return layer.values[: layer.length].sum() + 2 * x


def graphed(function: Callable[..., Tensor] = read_prefix, **options) -> GraphedCallable:
    options.setdefault("key", lambda layer: layer.length)
    return GraphedCallable(function, CPU, backend=TraceCapture(), **options)


def test_cpu_calls_the_function() -> None:
    call = GraphedCallable(read_prefix, CPU, key=lambda layer: layer.length)
    layer = Layer(torch.arange(4.0))
    assert call(torch.tensor(1.0), layer) == 3
    assert (call.captures, call.replays, call.eager_calls) == (0, 0, 1)


def test_replay_reads_new_inputs_and_new_values_of_the_state() -> None:
    call, layer = graphed(), Layer(torch.arange(4.0))
    assert call(torch.tensor(1.0), layer) == 3
    layer.values += 10
    assert call(torch.tensor(2.0), layer) == 25
    assert (call.captures, call.replays, call.eager_calls) == (1, 1, 0)


def test_each_key_has_its_graph() -> None:
    call, layer = graphed(), Layer(torch.arange(4.0))
    for length in (2, 4, 2, 4):
        layer.length = length
        assert call(torch.tensor(0.0), layer) == (1.0 if length == 2 else 6.0)
    assert (call.captures, call.replays) == (2, 2)


def test_a_key_that_leaves_out_the_length_replays_the_wrong_graph() -> None:
    """The recorder is as blind as CUDA: what the key does not say is frozen."""
    call, layer = graphed(key=None), Layer(torch.arange(4.0))
    call(torch.tensor(0.0), layer)
    layer.length = 4
    assert call(torch.tensor(0.0), layer) == 1
    assert call.captures == 1


def test_each_storage_has_its_graph() -> None:
    call = graphed()
    layers = [Layer(torch.arange(4.0)), Layer(torch.arange(4.0) + 10)]
    for layer in (*layers, *layers):
        assert call(torch.tensor(0.0), layer) == layer.values[:2].sum()
    assert (call.captures, call.replays) == (2, 2)


def test_results_belong_to_the_caller() -> None:
    call, layer = graphed(), Layer(torch.zeros(4))
    results = [call(torch.tensor(float(i)), layer) for i in range(3)]
    assert [result.item() for result in results] == [0, 2, 4]


def test_the_state_may_be_written() -> None:
    def write(x: Tensor, layer: Layer) -> Tensor:
        layer.values[: layer.length] = x
        return layer.values.sum()

    call, layer = graphed(write), Layer(torch.ones(4))
    assert call(torch.tensor(5.0), layer) == 12
    assert call(torch.tensor(7.0), layer) == 16
    assert layer.values.tolist() == [7, 7, 1, 1]


def test_another_input_signature_raises_with_both() -> None:
    call, layer = graphed(), Layer(torch.zeros(4))
    call(torch.zeros(2, 3), layer)
    with pytest.raises(ValueError, match=r"inputs float32\[2, 3\], called with float32\[2, 4\]"):
        call(torch.zeros(2, 4), layer)
    with pytest.raises(ValueError, match=r"called with int64\[2, 3\]"):
        call(torch.zeros(2, 3, dtype=torch.int64), layer)
    assert call(torch.ones(2, 3), layer).eq(2).all()


def test_nothing_is_captured_after_seal() -> None:
    call, layer = graphed(), Layer(torch.arange(4.0), more=[{"rope": torch.zeros(2)}])
    call(torch.tensor(0.0), layer)
    call.seal()
    assert call(torch.tensor(1.0), layer) == 3
    layer.length = 3
    with pytest.raises(RuntimeError, match=r"sealed since warm-up: key 3 is new.*captured: \[2\]"):
        call(torch.tensor(0.0), layer)
    with pytest.raises(RuntimeError, match=r"key 2 is new for this state; captured: \[\]"):
        call(torch.tensor(0.0), Layer(torch.arange(4.0)))
    assert call.captures == 1


def test_states_are_told_apart_by_identity_and_held() -> None:
    """A state that nobody else refers to keeps its graph: no other object can get its id."""
    call = graphed()
    for start in range(3):
        assert call(torch.tensor(0.0), Layer(torch.arange(4.0) + start)) == 1 + 2 * start
    assert (call.captures, call.replays) == (3, 0)


def test_the_state_may_be_any_argument() -> None:
    call = graphed(
        lambda x, length, layer: layer.values[:length].sum() + x,
        key=lambda length, layer: length,
        state_of=lambda length, layer: layer,
    )
    layer = Layer(torch.arange(4.0))
    call(torch.tensor(0.0), 2, layer)
    call.seal([layer])
    assert call(torch.tensor(1.0), 2, layer) == 2
    assert call(torch.tensor(1.0), 2, Layer(torch.arange(4.0))) == 2
    assert (call.captures, call.replays, call.eager_calls) == (1, 1, 1)


def test_reset_keeps_graphs_and_drop_frees_them() -> None:
    call, layer = graphed(), Layer(torch.zeros(4))
    call(torch.tensor(0.0), layer)
    call(torch.tensor(0.0), layer)
    call.reset()
    assert (call.captures, call.replays) == (1, 0)
    call(torch.tensor(0.0), layer)
    assert (call.captures, call.replays) == (1, 1)
    call.drop()
    assert call(torch.zeros(3), layer).shape == (3,)
    assert call.captures == 2


def test_a_graph_whose_first_replay_fails_is_not_kept() -> None:
    backend = TraceCapture()
    call = GraphedCallable(read_prefix, CPU, backend=backend)
    layer = Layer(torch.zeros(4))
    backend.fail = True
    with pytest.raises(RuntimeError, match="replay failed"):
        call(torch.tensor(0.0), layer)
    assert call.captures == 0
    backend.fail = False
    assert call(torch.tensor(4.0), layer) == 8
    assert (call.captures, call.replays, backend.waits) == (1, 0, 1)


def test_a_call_that_cannot_be_captured_goes_on_eagerly_and_says_so_once(caplog) -> None:
    backend = TraceCapture()
    call = GraphedCallable(read_prefix, CPU, backend=backend)
    layers = [Layer(torch.arange(4.0)), Layer(torch.arange(4.0) + 10)]
    call(torch.tensor(0.0), layers[0])
    backend.refuse = True
    with caplog.at_level(logging.WARNING):
        found = [call(torch.tensor(1.0), layer).item() for layer in (*layers[::-1], *layers)]
    assert found == [23, 3, 3, 23]
    (record,) = caplog.records
    assert "cannot be captured (operation not permitted" in record.message
    assert "not permitted" in call.failure
    assert (call.captures, call.replays, call.eager_calls) == (1, 0, 4)
    assert not call.serves(layers[0]) and call.can_capture


def test_an_error_of_the_function_itself_is_no_failed_capture() -> None:
    """Negative control: what would fail eagerly too is raised."""

    def broken(x: Tensor, layer: Layer) -> Tensor:
        raise IndexError("of its own")

    call = graphed(broken)
    with pytest.raises(IndexError, match="of its own"):
        call(torch.tensor(0.0), Layer(torch.zeros(4)))
    assert call.failure is None


def test_a_key_of_none_is_called_eagerly_even_when_sealed() -> None:
    call = graphed(key=lambda layer: layer.length or None)
    call.seal()
    assert call(torch.tensor(1.0), Layer(torch.ones(4), length=0)) == 2
    assert (call.captures, call.eager_calls) == (0, 1)


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    call, layer = graphed(lambda x, layer: 2 * x), Layer(torch.zeros(4))
    with torch.inference_mode():
        call(torch.tensor(1.0), layer)
    backend_output = call(torch.tensor(2.0), Layer(torch.zeros(4)))
    assert backend_output == 4


def test_two_rollouts_over_a_ring_replay_what_they_would_compute() -> None:
    """Every phase is captured once; later rounds and the other rollout's slots only replay."""

    def attend(q: Tensor, cache: KVCache) -> Tensor:
        k, v = cache.update(q, q + 1)
        return torch.softmax((q * k.sum(1, keepdim=True)).flatten(2), -1).sum() + v.sum()

    def rollout(call: Callable[..., Tensor], caches: list[KVCache]) -> list[float]:
        generator, results = torch.Generator().manual_seed(0), []
        for cache in caches:
            cache.cursor.reset()
            cache.k.zero_()
        for _ in range(6):
            for cache in caches:
                cache.cursor.begin_step(1, CPU)
                for _ in range(2):
                    q = torch.randn(1, 2, 1, 4, generator=generator)
                    results.append(call(q, cache).item())
                cache.cursor.advance()
        return results

    def caches() -> list[KVCache]:
        cursors = [Cursor(1, 3, tokens_per_frame=2) for _ in range(2)]
        spec = KVCacheSpec(
            batch_size=1,
            sink_size_t=1,
            window_size_t=3,
            tokens_per_frame=2,
            num_heads=1,
            head_dim=4,
            dtype=torch.float32,
            device=CPU,
        )
        built = [KVCache(spec, cursor) for cursor in cursors]
        for cache in built:
            cache.cursor.begin_step(1, CPU)
        return built

    expected = rollout(attend, caches())
    call = GraphedCallable(
        attend, CPU, backend=TraceCapture(), key=lambda cache: cache.cursor.visible_tokens
    )
    storage = caches()
    assert rollout(call, storage) == expected
    assert call.captures == 8
    call.seal()
    assert rollout(call, storage) == expected
    assert call.captures == 8 and call.replays == 40
    blind = GraphedCallable(attend, CPU, backend=TraceCapture())
    assert rollout(blind, caches()) != expected
