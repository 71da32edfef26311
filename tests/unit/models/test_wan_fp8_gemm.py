"""precision="fp8_gemm" on a CPU: FP8 linear layers beside FP8 attention."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashdreams.attention import fp8
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.weights import memory_estimate, weight_nbytes
from flashdreams.models.wan import fp8_linear, fused_choice
from flashdreams.models.wan.matmuls import NORMED, pack_linears
from flashdreams.parallel.mesh import ParallelConfig
from tests import quantized_rollouts
from tests.quantized_rollouts import begin, error, run
from tests.tiny import tiny_pipeline, tiny_transformer

GEMM = {"precision": "fp8_gemm", "fp8_gemm_min_width": 16}
BOUND = 6e-2
"""Largest error of the latents over their largest entry: twice what was measured."""


def config_of(**transformer):
    sizes = {**quantized_rollouts.SINK, "dim": 32, "ffn_dim": 64}
    return tiny_pipeline(**{**sizes, **transformer})


def build(**transformer):
    """As `quantized_rollouts.build`, whose weights grow before they are quantized."""
    pipeline = config_of(**transformer).setup(device="cpu", load=False)
    for parameter in pipeline.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)
    pipeline.load()
    return pipeline


def layers_of(pipeline) -> list[str]:
    return pipeline.fingerprint()["fp8_layers"]


def linear(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-2, 1, outputs)[:, None])
    return layer


def test_the_error_of_a_rollout_is_bounded_and_the_layers_are_named():
    exact, rounded, half = build(), build(**GEMM), build(precision="fp8")
    expected = run(exact, begin(exact))
    attention = error(run(half, begin(half)), expected)
    assert attention < error(run(rounded, begin(rounded)), expected) < BOUND
    assert layers_of(rounded) == sorted([*NORMED, "ffn.2"])
    assert "fp8_layers" not in half.fingerprint()
    for name, parameter in rounded.named_parameters():  # negative control
        if name.endswith("weight_scale"):
            parameter.mul_(1.25)
    assert error(run(rounded, begin(rounded)), expected) > BOUND


@pytest.mark.parametrize(
    ("width", "layers"), [(4096, []), (33, ["ffn.2"]), (32, sorted([*NORMED, "ffn.2"]))]
)
def test_widths_decide_which_layers_are_quantized(width, layers):
    found = build(precision="fp8_gemm", fp8_gemm_min_width=width)
    assert layers_of(found) == layers
    plain = build(precision="fp8")
    assert torch.equal(run(found, begin(found), 2), run(plain, begin(plain), 2)) == (not layers)


def test_widths_that_are_no_sixteens_and_layers_that_are_not_plain_stay():
    assert layers_of(build(**GEMM, dim=24)) == layers_of(build(**GEMM, ffn_dim=72)) == []
    pipeline = config_of(**GEMM).setup(device="cpu", load=False)
    for block in pipeline.diffusion_model.transformer.blocks:
        block.cross_attn.q.register_forward_hook(lambda *args: None)
    pipeline.load()
    assert layers_of(pipeline) == ["ffn.2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_one_that_it_replaces(dtype):
    plain = linear(64, 48, dtype)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = fp8_linear.FP8Linear(plain)
    found, expected = layer(x), plain(x)
    assert found.dtype == dtype and found.shape == expected.shape
    assert 1e-3 < error(found.float(), expected.float()) < 3e-2
    assert torch.equal(layer(fp8_linear.quantize_rows(x)), found)
    layer.weight_scale.mul_(1.25)  # negative control
    assert error(layer(x).float(), expected.float()) > 0.1


@pytest.mark.skipif(torch.__version__ < "2.13", reason="a CPU had no scales per row")
def test_a_gpu_is_asked_for_what_a_cpu_emulates():
    """PyTorch's own FP8 matmul, with the arguments for a GPU; a CPU has it, too."""
    layer = fp8_linear.FP8Linear(linear(64, 48, torch.bfloat16))
    x = (
        torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 2, 7)[:, None]
    )
    values, rows = fp8_linear.quantize_rows(x)
    given = (values, layer.weight, rows, layer.weight_scale, layer.bias)
    found, expected = fp8_linear.scaled_mm(*given), fp8_linear.emulated_mm(*given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    other = (values, layer.weight, rows.flip(0), layer.weight_scale, layer.bias)
    assert error(fp8_linear.emulated_mm(*other).float(), found.float()) > 0.1


def test_a_gpu_demands_the_layouts_that_it_gets():
    """PyTorch checks them on tensors without memory, so that no GPU is needed."""
    with FakeTensorMode():

        def on_gpu(*shape: int, dtype: torch.dtype = fp8.FP8) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        rows, scale = (on_gpu(*shape, dtype=torch.float32) for shape in ((7, 1), (48,)))
        given = [on_gpu(7, 64), on_gpu(48, 64), rows, scale, on_gpu(48, dtype=torch.bfloat16)]
        found = fp8_linear.scaled_mm(*given)
        assert found.shape == (7, 48) and found.dtype == torch.bfloat16
        for place, wrong, message in (  # negative controls
            (0, on_gpu(64, 7).t(), "row_major"),
            (1, on_gpu(64, 48).t(), "col_major"),
            (1, on_gpu(40, 64), "divisible by 16"),
            (2, rows.flatten(), "2D"),
            (3, on_gpu(48, dtype=torch.bfloat16), "fp32"),
        ):
            with pytest.raises(RuntimeError, match=message):
                fp8_linear.scaled_mm(*[wrong if i == place else x for i, x in enumerate(given)])


def test_packed_layers_are_the_layers_and_move_with_copies():
    layers = [fp8_linear.FP8Linear(linear(32, size)) for size in (16, 48, 32)]
    x = fp8_linear.quantize_rows(torch.randn(1, 3, 32))
    expected = [layer(x) for layer in layers]
    packed = pack_linears(layers)
    assert packed is not None and packed.weight.dtype == fp8.FP8
    for found, one in zip(
        (*packed(x), *packed.last(2)(x)), (*expected, *expected[1:]), strict=True
    ):
        torch.testing.assert_close(found, one)
    start = packed.weight.untyped_storage().data_ptr()
    assert all(layer.weight.untyped_storage().data_ptr() == start for layer in layers)
    assert pack_linears([*layers[:2], linear(32, 32)]) is None
    pipeline = build(**GEMM)
    twin = copy.deepcopy(pipeline)
    assert torch.equal(run(twin, begin(twin), 2), run(pipeline, begin(pipeline), 2))


def test_a_byte_per_weight_is_held_and_counted():
    network = build(**GEMM).diffusion_model.transformer
    assert weight_nbytes(network) == sum(x.nbytes for x in network.parameters())
    dim, ffn_dim = 4096, 8192
    wide = dict(dim=dim, ffn_dim=ffn_dim, num_layers=1, precision="fp8_gemm")
    with torch.device("meta"):
        meta = tiny_transformer(**wide).setup()
    before = weight_nbytes(meta)
    meta.quantize_weights()
    weights, outputs = 4 * dim * dim + 2 * dim * ffn_dim, 5 * dim + ffn_dim
    assert before - weight_nbytes(meta) == 3 * weights - 4 * outputs  # of float32
    assert "in float32 and float8_e4m3fn, KV" in memory_estimate(tiny_pipeline(**wide))


def test_a_rollout_is_saved_and_may_go_on_without_fp8():
    narrow, wide = build(**GEMM), build()
    cache = begin(narrow)
    run(narrow, cache, 4)
    state = cache.state_dict()
    expected = run(narrow, cache)
    assert torch.equal(run(narrow, narrow.load_cache(state)), expected)
    assert 0 < error(run(wide, wide.load_cache(state)), expected) < BOUND


def test_where_it_cannot_run_is_said_with_what_runs(monkeypatch):
    with pytest.raises(ValueError, match="allowed: 'native', 'fp8'"):
        CausalTransformerConfig(precision="fp8_gemm")
    with pytest.raises(ValueError, match="precision='fp8_gemm' is for a KV cache"):
        tiny_transformer(precision="fp8_gemm", streaming=False)
    with pytest.raises(ValueError, match="fp8_gemm_min_width=0"):
        tiny_transformer(fp8_gemm_min_width=0)
    pipeline = config_of(**GEMM).setup(device="cpu", load=False)
    with pytest.raises(ValueError, match=r"number of rows\. Use precision='fp8'"):
        pipeline.build_mesh(1, ParallelConfig(strict=True))
    pipeline.build_mesh(1)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    transformer = tiny_transformer(**GEMM, dtype="bfloat16").setup()
    with pytest.raises(ValueError, match="'fp8_gemm' cannot be used here: FlashAttention-3 needs"):
        transformer.check_device(gpu)
    monkeypatch.setattr(fp8, "why_no_fp8", lambda device, head_dim: None)
    monkeypatch.setattr(fused_choice, "why_unusable", lambda *args: "triton is not installed")
    with pytest.raises(ValueError, match=r"here: triton is not installed\. precision='fp8' runs"):
        transformer.check_device(gpu)
    monkeypatch.setattr(fused_choice, "why_unusable", lambda *args: None)
    transformer.check_device(gpu)
    for change, message in (
        ({"fused_kernels": False}, "fused_kernels is False"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ):
        transformer = tiny_transformer(**{**GEMM, "dtype": "bfloat16", **change}).setup()
        with pytest.raises(ValueError, match=rf"{message}\. precision='fp8' runs"):
            transformer.check_device(gpu)
