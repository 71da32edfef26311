"""The attention core over a ring in eight bits: read in place, against read through a wide copy.

Float32; the interpreter sums in another order than SDPA, hence the bound of `TOLERANCE`.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashdreams.attention import backends
from flashdreams.attention.backends import sdpa, triton
from flashdreams.attention.cache import CacheCursor, KVCache, KVCacheSpec
from flashdreams.attention.choose import AttentionShape, choose_backend
from flashdreams.attention.core import AttentionCore
from tests.kernels.guarded import TOLERANCE, error
from tests.tiny import TEXT_DIM, tiny_pipeline

STORAGES = ["int8", "fp8"]
TOKENS, HEADS, HEAD_DIM = 3, 2, 16
BOUND = TOLERANCE[torch.float32]
# (window, sink, chunk): the chunk divides them, and it does not.
COMBINATIONS = [(6, 0, 3), (5, 1, 3), (4, 3, 2)]


def spec_for(storage: str, window: int, sink: int, chunk: int, device: torch.device) -> KVCacheSpec:
    return KVCacheSpec(
        batch_size=1,
        sink_size_t=sink,
        window_size_t=window,
        tokens_per_frame=TOKENS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=device,
        storage=storage,
    )


def new_caches(spec: KVCacheSpec) -> list[KVCache]:
    sizes = spec.sink_size_t, spec.window_size_t, spec.tokens_per_frame
    return [KVCache(spec, CacheCursor(*sizes)) for _ in range(2)]


def cores() -> list[AttentionCore]:
    return [AttentionCore(HEAD_DIM, backend=backend) for backend in (triton, sdpa)]


def draw(seed: int, frames: int, device: torch.device) -> Tensor:
    """Queries, keys and values ``[3, B, L, N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 1, frames * TOKENS, HEADS, HEAD_DIM, generator=generator)
    return x.to(device)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("window", "sink", "chunk"), COMBINATIONS)
def test_a_ring_read_in_place_equals_its_wide_copy(
    storage: str, window: int, sink: int, chunk: int, device: torch.device
) -> None:
    caches = new_caches(spec_for(storage, window, sink, chunk, device))
    for step in range(4):
        found = []
        for core, cache in zip(cores(), caches, strict=True):
            cache.cursor.place(chunk, device)
            cache.write(*draw(-1, chunk, device)[1:])  # of the denoising step before
            found.append(core(*draw(step, chunk, device), cache))
            past, own = cache.cursor.past[0].tolist(), cache.cursor.slots.tolist()
            assert sorted(past + own) == list(range(cache.cursor.visible_tokens))
            cache.cursor.advance()
        assert error(*found) < BOUND
    own = draw(step, chunk, device)
    rounded = sdpa(own[0], *caches[1].visible(), scale=cores()[1].scale)
    assert error(found[0], rounded) > 10 * BOUND  # negative control: the chunk itself is rounded


def test_a_window_that_is_written_anew_is_read_in_place(device: torch.device) -> None:
    caches = new_caches(spec_for("int8", 4, 1, 2, device))
    found = []
    for core, cache in zip(cores(), caches, strict=True):
        with cache.cursor.rewriting():
            outs = []
            for seed in range(2):
                cache.cursor.place_next(2, device)
                outs.append(core(*draw(seed, 2, device), cache))
        found.append(torch.cat(outs))
    assert error(*found) < BOUND
    assert error(found[0], found[1].flip(0)) > 10 * BOUND


def test_what_a_chunk_sees_is_listed_in_the_same_memory_by_every_rollout(
    device: torch.device,
) -> None:
    cache = new_caches(spec_for("int8", 5, 1, 3, device))[0]
    rollouts = []
    for _ in range(2):
        cache.cursor.load_state_dict({"start": 0})
        places = []
        for _ in range(4):
            cache.cursor.place(3, device)
            places.append((cache.cursor.past[0].data_ptr(), len(cache.cursor.past[0])))
            cache.cursor.advance()
        rollouts.append(places)
    assert rollouts[0] == rollouts[1]
    assert [count // TOKENS for _, count in rollouts[0]] == [0, 3, 3, 3]


def largest_allocation(core: AttentionCore, cache: KVCache, own: Tensor) -> int:
    """Bytes of the largest tensor that one call allocates, custom ops included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        core(*own, cache)
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("storage", STORAGES)
def test_no_wide_copy_of_the_ring_is_allocated(storage: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the profiler counts allocations of a CPU here")
    spec = replace(spec_for(storage, 60, 0, 2, device), head_dim=64)
    wide = 60 * TOKENS * HEADS * 64 * 4
    largest = []
    for core, cache in zip(cores(), new_caches(spec), strict=True):
        cache.cursor.start = 60
        cache.cursor.place(2, device)
        own = torch.randn(3, 1, 2 * TOKENS, HEADS, 64)
        core(*own, cache)  # the list of slots is made
        largest.append(largest_allocation(core, cache, own))
    assert largest[0] < wide / 8
    assert largest[1] >= wide  # negative control: a wide copy of the keys or of the values


def test_only_a_backend_that_can_is_given_eight_bits() -> None:
    assert backends.in_place_form(triton, "int8") is backends.triton_in_place
    assert backends.in_place_form(triton, "native") is None
    assert backends.in_place_form(sdpa, "fp8") is None


def test_a_native_cache_has_no_past_in_eight_bits(device: torch.device) -> None:
    cache = new_caches(spec_for("native", 4, 0, 1, device))[0]
    cache.cursor.place(1, device)
    assert cache.cursor.past == ()
    with pytest.raises(TypeError, match="'native' has no eight-bit tokens"):
        cache.past()


@pytest.mark.parametrize("storage", STORAGES)
def test_auto_compares_reading_in_place_with_widening(
    storage: str, device: torch.device, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = AttentionShape(
        batch_size=1, queries=6, keys=21, num_heads=2, head_dim=16, storage=storage
    )
    calls: list[str] = []
    real = backends.triton_in_place

    def counted(*arguments: Tensor, scale: float) -> Tensor:
        calls.append("in place")
        return real(*arguments, scale=scale)

    def drops_last_key(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        return sdpa(q, k[:, :-1], v[:, :-1], scale=scale)

    monkeypatch.setattr(backends, "triton_in_place", counted)
    candidates = {"triton": triton, "sdpa": sdpa, "liar": drops_last_key}
    choice = choose_backend(shape, device, torch.float32, candidates, repeats=2, cache_dir=tmp_path)
    rows = {row.name: row for row in choice.rows}
    assert choice.name in ("triton", "sdpa") and "differs by" in rows["liar"].verdict
    assert rows["triton"].ms is not None and rows["sdpa"].ms is not None
    assert calls == ["in place"] * 3  # one to judge, two to time
    other = replace(shape, storage="native")
    assert not choose_backend(
        other, device, torch.float32, candidates, repeats=1, cache_dir=tmp_path
    ).from_cache
    assert len(calls) == 3


@pytest.mark.parametrize("storage", STORAGES)
def test_a_rollout_reads_in_place(storage: str, device: torch.device) -> None:
    def latents(backend: str) -> Tensor:
        torch.manual_seed(0)
        pipeline = tiny_pipeline(
            num_layers=1,
            sink_size_t=1,
            window_size_t=2,
            relative_rope=True,
            kv_cache_dtype=storage,
            attention_backend=backend,
        ).setup(device=str(device))
        text = torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(3))
        cache = pipeline.initialize_cache(text=text, seed=3)
        found = []
        for index in range(3):
            pipeline.generate(index, cache, 0.1 * index)
            pipeline.finalize(index, cache)
            found.append(cache.latent)
        return torch.cat(found, dim=2)

    in_place, widened = latents("triton"), latents("sdpa")
    assert error(in_place, widened) < 10 * BOUND
    assert not torch.equal(in_place, widened)
