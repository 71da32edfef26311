"""Graphed calls and kernels on a real GPU."""

import threading

import pytest
import torch
from flashdreams_kernels import attention, reference, rope_qknorm
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.cursor import Cursor
from flashdreams.runtime.cuda_graph import GraphedCallable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 64
HEADS = 4
HEAD_DIM = 64


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def new_cache(cursor: Cursor) -> KVCache:
    return KVCache(
        KVCacheSpec(
            batch_size=1,
            sink_size_t=cursor.sink_size_t,
            window_size_t=cursor.window_size_t,
            tokens_per_frame=TOKENS,
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device=device(),
        ),
        cursor,
    )


def rollout(call, cache: KVCache, steps: int = 7) -> list[Tensor]:
    """Two denoising steps per AR step over a ring that wraps."""
    generator, results = torch.Generator().manual_seed(0), []
    cache.cursor.reset()
    for _ in range(steps):
        cache.cursor.begin_step(1, device())
        for _ in range(2):
            shape = (3, 1, TOKENS, HEADS, HEAD_DIM)
            noise = torch.randn(shape, generator=generator).to(device(), torch.bfloat16)
            results.append(call(noise, cache).clone())
        cache.cursor.advance()
    return results


def network(noise: Tensor, cache: KVCache) -> Tensor:
    q, k, v = noise
    k, v = cache.update(k, v)
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )


def test_graph_equals_eager_over_a_wrapped_ring() -> None:
    cursor = Cursor(1, 3, TOKENS)
    cache = new_cache(cursor)
    cursor.begin_step(1, device())
    eager = rollout(network, cache)
    call = GraphedCallable(network, device(), key=lambda cache: cache.cursor.visible_tokens)
    graphed = rollout(call, cache)
    assert call.captures == 4
    call.seal()
    replayed = rollout(call, cache)
    assert call.captures == 4
    for a, b, c in zip(eager, graphed, replayed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(eager[0], eager[1])


def test_one_graph_serves_every_step_with_a_length_on_the_device() -> None:
    cursor = Cursor(1, 3, TOKENS)
    cache = new_cache(cursor)
    cursor.begin_step(1, device())
    visible = torch.zeros(1, dtype=torch.int32, device=device())

    def triton_network(noise: Tensor, state: tuple[KVCache, Tensor]) -> Tensor:
        cache, visible = state
        cache.write(noise[1], noise[2])
        return attention.chunk_attention(noise[0], cache.k, cache.v, visible=visible)

    call, state = GraphedCallable(triton_network, device()), (cache, visible)
    expected = rollout(network, cache)

    def step(noise: Tensor, cache: KVCache) -> Tensor:
        visible.fill_(cache.cursor.visible_tokens)
        return call(noise, state).transpose(1, 2)

    results = rollout(step, cache)
    assert call.captures == 1
    for result, wanted in zip(results, expected, strict=True):
        assert (result.float() - wanted.float()).abs().max() < 2e-2


def test_another_thread_may_use_the_gpu_during_capture() -> None:
    done = threading.Event()

    def busy() -> None:
        pinned = torch.zeros(1024).pin_memory()
        stream = torch.cuda.Stream()
        while not done.is_set():
            with torch.cuda.stream(stream):
                pinned.to(device(), non_blocking=True)
            stream.synchronize()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        call = GraphedCallable(lambda x, state: x @ state[0], device())
        state = (torch.eye(64, device=device()),)
        x = torch.randn(64, 64, device=device())
        for _ in range(3):
            torch.testing.assert_close(call(x, state), x, rtol=2e-3, atol=2e-3)
    finally:
        done.set()
        thread.join()
    assert (call.captures, call.replays) == (1, 2)


def test_a_failed_capture_leaves_the_next_one_whole() -> None:
    ask = [True]

    def moody(x: Tensor) -> Tensor:
        if ask[0]:
            x.sum().item()
        return 2 * x

    call = GraphedCallable(moody, device())
    x = torch.ones(8, device=device())
    assert call(x).eq(2).all()
    assert "not permitted" in call.failure and (call.captures, call.eager_calls) == (0, 1)
    torch.cuda.synchronize()
    assert torch.rand(8, device=device()).isfinite().all()  # the generator is no longer captured
    ask[0] = False
    other = GraphedCallable(moody, device())
    assert other(x).eq(2).all() and other(3 * x).eq(6).all()
    assert (other.captures, other.replays) == (1, 1)


def test_kernels_pass_through_inductor_and_write_in_place() -> None:
    torch.manual_seed(0)
    length, slots = 70, 256

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

    q, k, v = (normal(1, length, HEADS, HEAD_DIM) for _ in range(3))
    weight = normal(HEADS * HEAD_DIM)
    angles = torch.randn(length, HEAD_DIM // 2, device=device())
    table = torch.stack([angles.cos(), angles.sin()], -1)
    places = torch.arange(slots - length, slots, device=device()).roll(5)

    def layer(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q = rope_qknorm.qk_norm_rope_write(
            2 * q, k, v + 1, weight, weight, table, 1e-6, k_cache, v_cache, places
        )
        return attention.chunk_attention(q, k_cache, v_cache, num_splits=2) + 1

    caches = [torch.zeros(1, slots, HEADS, HEAD_DIM, device=device()).bfloat16() for _ in range(4)]
    eager = layer(q, k, v, *caches[:2])
    compiled = torch.compile(layer, fullgraph=True)(q, k, v, *caches[2:])
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    assert (eager.float() - compiled.float()).abs().max() < 2e-2
    assert caches[0].ne(0).any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [4680, 1560, 131])
def test_attention_at_real_size_equals_reference(length: int, head_dim: int) -> None:
    torch.manual_seed(0)
    shape = (1, 32760, 2, head_dim)
    q = torch.randn(1, length, 2, head_dim, device=device(), dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device=device(), dtype=torch.bfloat16) for _ in range(2))
    for visible in (1560, 20000, 32760):
        count = torch.tensor([visible], device=device())
        out, lse = attention.chunk_attention(q, k, v, visible=count, return_lse=True)
        expected, expected_lse = reference.chunk_attention(q, k, v, visible=count)
        error = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < 2e-2
        assert (lse - expected_lse).abs().max() < 1e-2
