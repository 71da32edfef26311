"""precision="fp8" on a Hopper GPU with FlashAttention-3.

Tolerance: the kernel rounds softmax weights to e4m3 under a running maximum, the reference under
the final one, so results differ by roundings: 2e-2 of the largest.
"""

import pytest
import torch
from flashdreams_kernels import reference

from flashdreams.attention import fp8
from flashdreams.attention.backends import sdpa_math
from flashdreams.models.wan import fp8_linear
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, tiny_transformer
from tests.unit.models.test_wan_graph import rollout

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = dict(dim=256, num_heads=4, dtype="bfloat16", precision="fp8", control_dim=CONTROL_DIM)
GEMM = {**SIZES, "precision": "fp8_gemm", "fp8_gemm_min_width": 16}


@pytest.fixture(autouse=True)
def _kernel() -> None:
    reason = fp8.why_no_fp8(CUDA, 128)
    if reason is not None:
        pytest.skip(reason)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@pytest.mark.parametrize("num_splits", [1, 2])
def test_the_kernel_attends_to_a_ring_as_the_reference_does(num_splits):
    draw = torch.Generator("cuda").manual_seed(0)
    size = dict(generator=draw, device=CUDA)
    q, k, v = (torch.randn(2, n, 3, 128, **size) for n in (300, 1000, 1000))
    q[:, ::7] = 3 * k[:, 1:1000:23][:, : len(q[0, ::7])]  # single keys matter
    heads = torch.tensor([1.0, 8.0, 0.25], device=CUDA)[None, None, :, None]
    wide = (q * heads, k / heads, v * heads)
    scales = tuple(fp8.scales_of(fp8.head_maxima(x)) for x in wide)
    stored = [fp8.quantize(x, s) for x, s in zip(wide, scales, strict=True)]
    options = dict(scale=128**-0.5, dtype=torch.bfloat16, backend=sdpa_math)
    q8, k8, v8 = stored
    out = fp8.attend(q8, k8[:, :777], v8[:, :777], scales, **options, num_splits=num_splits)
    read = [fp8.dequantize(x, s, torch.float32) for x, s in zip(stored, scales, strict=True)]
    read[1:] = [x[:, :777] for x in read[1:]]
    expected = reference.fp8_weights_attention(*read, scale=options["scale"])
    assert out.dtype == torch.bfloat16 and error(out, expected) < 2e-2
    exact = reference.chunk_attention(wide[0], wide[1][:, :777], wide[2][:, :777])[0]
    assert error(out, exact) < 0.2
    swapped = fp8.attend(q8, k8[:, :777], v8[:, :777], scales[::-1], **options)
    assert error(swapped, expected) > 0.1  # negative control


def test_small_heads_are_padded():
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 32, generator=draw, device=CUDA) for _ in range(3))
    scales = tuple(fp8.scales_of(fp8.head_maxima(x)) for x in (q, k, v))
    stored = [fp8.quantize(x, s) for x, s in zip((q, k, v), scales, strict=True)]
    options = dict(scale=32**-0.5, dtype=torch.float32, backend=sdpa_math)
    read = [fp8.dequantize(x, s, torch.float32) for x, s in zip(stored, scales, strict=True)]
    expected = reference.fp8_weights_attention(*read, scale=options["scale"])
    assert error(fp8.attend(*stored, scales, **options), expected) < 2e-2


def test_a_gpu_rounds_as_a_cpu_does():
    x = torch.randn(1, 64, 2, 128, device=CUDA) * 40
    scale = torch.tensor([[0.25, 2.0]], device=CUDA)
    assert torch.equal(
        fp8.quantize(x, scale).cpu().float(), fp8.quantize(x.cpu(), scale.cpu()).float()
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 77, 300])
def test_a_matmul_is_what_a_cpu_emulates(rows):
    """The tensor cores keep some 14 bits of a sum: 1e-2 beside bfloat16's rounding."""
    torch.manual_seed(0)
    layer = fp8_linear.FP8Linear(torch.nn.Linear(512, 208, dtype=torch.bfloat16))
    x = torch.randn(1, rows, 512) * torch.logspace(-3, 2, rows)[:, None]
    expected, scales = layer(x)[0], layer.weight_scale[None]
    found = layer.to(CUDA)(x.to(CUDA))[0].cpu()
    size = expected.float().abs().amax(-1, keepdim=True)
    assert ((found.float() - expected.float()).abs() / size).max() < 1e-2
    assert not torch.allclose(found / scales, expected.float(), rtol=0.1)  # negative control


@torch.no_grad()
@pytest.mark.parametrize("sizes", [SIZES, GEMM], ids=["fp8", "fp8_gemm"])
def test_graphs_on_and_off_give_the_same_bits(sizes):
    torch.manual_seed(0)
    weights = WanTransformer(tiny_transformer(**sizes)).cast().state_dict()
    flows = []
    for use_cuda_graph in (False, True):
        model = WanTransformer(tiny_transformer(**sizes, use_cuda_graph=use_cuda_graph))
        model = model.cast().eval().to(CUDA)
        model.load_state_dict(weights)
        model.after_load()
        flows.append(rollout(model))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("fused_kernels", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, GEMM], ids=["fp8", "fp8_gemm"])
def test_a_rollout_is_near_that_of_a_cpu(fused_kernels, sizes):
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(**sizes, fused_kernels=False)).cast().eval()
    wide = WanTransformer(tiny_transformer(**{**sizes, "precision": "native"})).cast().eval()
    wide.load_state_dict(model.state_dict())
    here = WanTransformer(tiny_transformer(**sizes, fused_kernels=fused_kernels)).cast().eval()
    here = here.to(CUDA)
    here.load_state_dict(model.state_dict())
    here.after_load()
    model.after_load()
    expected = rollout(model)
    for found, near, plain in zip(rollout(here), expected, rollout(wide), strict=True):
        assert error(found.cpu(), near) < max(3e-2, 3 * error(near, plain))
