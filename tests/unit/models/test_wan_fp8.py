"""Rollouts with keys and values in FP8 or INT8 on a CPU, against the same ones in float32."""

from types import SimpleNamespace

import pytest
import torch

from flashdreams.attention import flash_attention_3, fp8, quantized
from flashdreams.attention.backends import sdpa
from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.rope import apply_rope, time_rotation
from flashdreams.infra.snapshot_header import SnapshotError
from flashdreams.infra.weights import memory_estimate
from flashdreams.models.wan.transformer import SELF_ATTENTION
from flashdreams.runtime.cuda_graph import Captured, GraphedCallable
from tests import quantized_rollouts
from tests.quantized_rollouts import STEPS, begin, error, run
from tests.tiny import TEXT_DIM, tiny_pipeline, tiny_transformer

BOUND, INT8_BOUND = 3e-2, 3e-3
"""Largest error of the latents over their largest entry: at least twice what was measured."""
FP8, INT8 = {"precision": "fp8"}, {"kv_cache_dtype": "int8"}


def build(precision: str = "fp8", **transformer):
    return quantized_rollouts.build(precision=precision, **transformer)


def build_int8(**transformer):
    return quantized_rollouts.build(**INT8, **transformer)


def layers_of(cache):
    return cache.diffusion.conditional.caches[SELF_ATTENTION]


@pytest.mark.parametrize("changes", [{}, {"relative_rope": False}, {"sink_size_t": 0}], ids=str)
def test_the_error_of_a_rollout_is_bounded(changes, monkeypatch):
    changes = {**changes, **({"relative_rope": False} if "sink_size_t" in changes else {})}
    exact, rounded = build("native", **changes), build(**changes)
    expected = run(exact, begin(exact))
    assert 1e-4 < error(run(rounded, begin(rounded)), expected) < BOUND
    monkeypatch.setattr(fp8, "LARGEST", 2.0**-8)  # negative control: some three bits
    assert error(run(rounded, begin(rounded)), expected) > BOUND


def test_the_error_of_a_rollout_with_an_int8_cache_is_bounded(monkeypatch):
    exact, rounded = build("native"), build_int8()
    expected = run(exact, begin(exact))
    latents = run(rounded, begin(rounded))
    assert torch.equal(latents[:, :, :2], expected[:, :, :2])  # nothing is cached yet
    assert 1e-5 < error(latents, expected) < INT8_BOUND

    monkeypatch.setattr(quantized, "LARGEST", 7.0)  # negative control: some three bits
    assert error(run(rounded, begin(rounded)), expected) > INT8_BOUND


def test_scales_are_fixed_with_the_first_chunk_and_differ_between_rollouts():
    pipeline = build()
    cache = begin(pipeline)
    scales = layers_of(cache)[0].scales
    assert not scales.any()
    run(pipeline, cache, 1)
    fixed = scales.clone()
    assert fixed.all() and torch.equal(fixed, torch.exp2(fixed.log2().round()))
    run(pipeline, cache, 4)
    assert torch.equal(scales, fixed)
    assert layers_of(cache)[0].k.scale.data_ptr() == scales[:, 1, :, 0].data_ptr()


def test_a_rollout_goes_on_with_the_same_bits_after_save_and_after_a_fork():
    pipeline = build()
    cache = begin(pipeline)
    run(pipeline, cache, 4)
    state = cache.state_dict()
    name = f"conditional/scales/{SELF_ATTENTION}/0"
    assert state["tensors"][name].shape == (1, 3, 2, 1)
    other, fork = pipeline.load_cache(state), cache.clone()
    expected = run(pipeline, cache)
    assert torch.equal(run(pipeline, other), expected)
    assert torch.equal(run(pipeline, fork), expected)
    state["tensors"][name] *= 2  # negative control
    assert not torch.equal(run(pipeline, pipeline.load_cache(state)), expected)


def test_a_rollout_with_an_int8_cache_goes_on_with_the_same_bits_and_in_float32():
    pipeline, exact = build_int8(), build("native")
    cache = begin(pipeline)
    run(pipeline, cache, 4)
    state = cache.state_dict()
    assert {x.dtype for x in state["tensors"].values()} <= {torch.float32, torch.int64}
    expected = run(pipeline, cache)
    assert torch.equal(run(pipeline, pipeline.load_cache(state)), expected)
    assert 0 < error(run(exact, exact.load_cache(state)), expected) < INT8_BOUND
    del state["tensors"][f"conditional/caches/{SELF_ATTENTION}/0/v"]
    with pytest.raises(SnapshotError, match=r"self_attn\.core/0/v"):
        pipeline.load_cache(state)


def test_a_saved_rollout_may_go_on_wide_and_a_wide_one_is_refused():
    narrow, wide = build(), build("native")
    cache = begin(narrow)
    run(narrow, cache, 4)
    latents = run(wide, wide.load_cache(cache.state_dict()))
    assert 0 < error(latents, run(narrow, cache)) < BOUND
    cache = begin(wide)
    run(wide, cache, 4)
    with pytest.raises(ValueError, match="no scales per head"):
        narrow.load_cache(cache.state_dict())


def test_before_its_first_chunk_a_rollout_is_saved_and_parked():
    narrow, wide = build(), build("native")
    expected = run(narrow, begin(narrow))
    for fresh in (begin(narrow), begin(wide)):
        cache = narrow.load_cache(fresh.state_dict())
        assert torch.equal(run(narrow, cache, 4), expected[:, :, : 4 * 2])
        assert torch.equal(run(narrow, narrow.load_cache(cache.state_dict())), expected[:, :, 8:])
    assert torch.equal(run(narrow, narrow.unpark(narrow.park(begin(narrow)))), expected)


def test_a_storage_with_graphs_keeps_no_scales_of_the_rollout_before():
    pipeline, wide = build(use_cuda_graph=True), build("native")
    pipeline.diffusion_model.transformer.network._backend = CountingCapture()
    pipeline.warm_up()
    cache = begin(wide)
    run(wide, cache, 4)
    with pytest.raises(ValueError, match="no scales per head"):
        pipeline.load_cache(cache.state_dict())
    assert not layers_of(begin(pipeline))[0].scales.any()


@pytest.mark.parametrize("storage", [FP8, INT8], ids=str)
def test_two_rollouts_interleave(storage):
    pipeline = quantized_rollouts.build(**storage)
    alone = [run(pipeline, begin(pipeline, seed)) for seed in (3, 4)]
    caches = [begin(pipeline, seed) for seed in (3, 4)]
    together = [[run(pipeline, cache, i + 1) for cache in caches] for i in range(STEPS)]
    for expected, parts in zip(alone, zip(*together, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim=2), expected)
    assert not torch.equal(*alone)


@pytest.mark.parametrize(
    ("storage", "relative_rope"), [(FP8, False), (FP8, True), (INT8, False)], ids=str
)
def test_a_prompt_update_writes_the_window_anew_with_the_same_scales(storage, relative_rope):
    pipeline = quantized_rollouts.build(**storage, relative_rope=relative_rope)
    changed, kept = begin(pipeline), begin(pipeline)
    for cache in (changed, kept):
        run(pipeline, cache, 4)
    pipeline.update_prompt(changed, torch.ones(1, 4, TEXT_DIM), reencode_window=True)
    a, b = layers_of(changed)[1], layers_of(kept)[1]
    assert not torch.equal(a.v.values.float(), b.v.values.float())
    assert storage is INT8 or torch.equal(a.scales, b.scales)
    assert (a.sink_k is not None) == relative_rope
    assert a.sink_k is None or not torch.equal(a.sink_k, b.sink_k)
    assert error(run(pipeline, changed), run(pipeline, kept)) > 1e-3


def test_the_sink_is_kept_wide_and_quantized_after_rotation():
    spec = KVCacheSpec(
        batch_size=1, sink_size_t=1, window_size_t=2, tokens_per_frame=3, num_heads=2, head_dim=8,
        dtype=torch.float32, device=torch.device("cpu"), relative_sink=True, storage="fp8",
    )  # fmt: skip
    cursor, core = Cursor(1, 2, 3), AttentionCore(8)
    cache = core.new_cache(spec, cursor)
    chunks = torch.randn(5, 3, 1, 3, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for q, k, v in chunks:
        cursor.begin_step(1, spec.device)
        cache.rotate_sink()
        core(q, k, v, cache)
        cache.keep_sink()
        cursor.advance()
    sink = chunks[0][1]
    assert torch.equal(cache.sink_k, sink)
    rotated = apply_rope(sink, time_rotation(2, 8))
    expected = fp8.quantize(rotated, cache.k.scale).float()
    assert torch.equal(cache.k.values[:, :3].float(), expected)
    twice = apply_rope(fp8.dequantize(fp8.quantize(sink, cache.k.scale), cache.k.scale,
                                      torch.float32), time_rotation(2, 8))  # fmt: skip
    assert not torch.equal(fp8.quantize(twice, cache.k.scale).float(), expected)


def test_values_beyond_the_headroom_are_cut_and_nan_stays():
    scale = fp8.scales_of(torch.tensor([[1.0, 0.0, 3.0]]))
    assert scale.tolist() == [[2.0**-5, 1.0, 2.0**-4]]
    x = torch.tensor([1.0, 100.0, -1e9, float("nan")]).view(1, 4, 1, 1).expand(1, 4, 3, 1)
    stored = fp8.quantize(x, scale).float()[0, :, 0, 0]
    assert stored[:3].tolist() == [32.0, 448.0, -448.0] and stored[3].isnan()


class CountingCapture:
    """Captures by running; counts."""

    def capture(self, function):
        output = function()
        return Captured(lambda: output.copy_(function()), output)

    def wait(self):
        pass


@pytest.mark.parametrize("window", [3, 2], ids=["fills", "full at once"])
def test_the_first_chunk_is_never_captured(window):
    pipeline = build(sink_size_t=0, window_size_t=window, relative_rope=False, use_cuda_graph=True)
    transformer = pipeline.diffusion_model.transformer
    plain = build(sink_size_t=0, window_size_t=window, relative_rope=False)
    expected = run(plain, begin(plain))
    cache = begin(pipeline)
    transformer.network._backend = CountingCapture()
    assert isinstance(transformer.network, GraphedCallable)
    run(pipeline, cache, 1)
    assert transformer.network.captures == 0
    latents = run(pipeline, cache)
    assert transformer.network.captures == 2
    assert torch.equal(latents, expected[:, :, 2:])


def test_a_byte_per_number_is_counted_and_allocated():
    narrow, int8, wide = (tiny_transformer(**s).setup() for s in (FP8, INT8, {}))
    assert narrow.cache_nbytes(1) * 4 == wide.cache_nbytes(1)  # float32
    assert int8.cache_nbytes(1) * 48 == wide.cache_nbytes(1) * 13  # 12 + 1 bytes for 48
    layer = narrow.initialize_cache(torch.zeros(1, 4, TEXT_DIM)).caches[SELF_ATTENTION][0]
    assert isinstance(layer, KVCache)
    assert layer.nbytes == layer.k.values.nbytes + layer.v.values.nbytes
    sizes = dict(window_size_t=2_000_000)
    assert "KV cache 3.1 GB" in memory_estimate(tiny_pipeline(**sizes))
    assert "KV cache 768.0 MB" in memory_estimate(tiny_pipeline(**FP8, **sizes))
    assert "KV cache 832.0 MB" in memory_estimate(tiny_pipeline(**INT8, **sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp4"}, "allowed: 'native', 'fp8', 'fp8_gemm'"),
        ({"precision": "fp8", "streaming": False}, "streaming=False has none"),
        ({"precision": "fp8", "kv_cache_dtype": "int8"}, "Omit that"),
        ({"kv_cache_dtype": "int4"}, "'native', 'int8'"),
        ({"kv_cache_dtype": "int8", "streaming": False}, "allowed is 'native'"),
        ({"kv_cache_dtype": "fp8"}, "was removed in 0.2: use precision='fp8'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**change)


@pytest.mark.parametrize(
    ("capability", "head_dim", "message"),
    [
        ((8, 0), 128, "compute capability 9.x, found 8.0. Use precision='native'"),
        ((10, 0), 128, "compute capability 9.x, found 10.0"),
        ((9, 0), 72, "multiples of 16 up to 256 as head size, not 72"),
        ((9, 0), 128, "FlashAttention-3 is not installed"),
    ],
)
def test_a_gpu_that_cannot_is_refused(capability, head_dim, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash_attention_3, "MODULES", ())
    with pytest.raises(ValueError, match=message):
        fp8.check_fp8(torch.device("cuda"), head_dim)
    fp8.check_fp8(torch.device("cpu"), head_dim)


def test_a_release_without_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    old = lambda q, k, v, softmax_scale, num_splits: None  # noqa: E731
    new = lambda q, k, v, q_descale, k_descale, v_descale, num_splits: None  # noqa: E731
    for function, message in ((old, "no e4m3 kernel"), (new, None)):
        module = SimpleNamespace(flash_attn_func=function)
        monkeypatch.setattr(fp8, "load_flash_attn_3", lambda module=module: module)
        found = fp8.why_no_fp8(torch.device("cuda"), 128)
        assert (found is None) if message is None else message in found


def test_the_kernel_gets_the_ring_as_it_is_with_its_scales(monkeypatch):
    """A stand-in that computes what the kernel would."""
    calls = []

    def attention(q, k, v, *, softmax_scale, num_splits, q_descale, k_descale, v_descale):
        calls.append((q, k, v, num_splits))
        scales = (q_descale, k_descale, v_descale)
        wide = [fp8.dequantize(x, s, torch.float32) for x, s in zip((q, k, v), scales, strict=True)]
        return sdpa(*wide, scale=softmax_scale).bfloat16(), None

    module = SimpleNamespace(flash_attn_func=attention)
    monkeypatch.setattr(fp8, "load_flash_attn_3", lambda: module)
    for head_dim in (64, 32):
        q, k, v = torch.randn(3, 2, 5, 3, head_dim, generator=torch.Generator().manual_seed(0))
        scales = tuple(fp8.scales_of(fp8.head_maxima(x)) for x in (q, k, v))
        q, k, v = (fp8.quantize(x, s) for x, s in zip((q, k, v), scales, strict=True))
        found = fp8.call_flash_attn_3(q, k, v, scales, head_dim**-0.5, 2)
        options = dict(scale=head_dim**-0.5, dtype=torch.float32, backend=sdpa)
        expected = fp8.attend(q, k, v, scales, **options)
        assert found.shape == expected.shape and error(found, expected) < 5e-3  # bfloat16
        assert all(x.shape[-1] == 64 for x in calls[-1][:3]) and calls[-1][3] == 2
    assert error(fp8.attend(q, k, v, scales[::-1], **options), expected) > 0.1
