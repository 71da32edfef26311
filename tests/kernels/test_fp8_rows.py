"""Layer norm and GELU in e4m3 with a scale per token, against their references.

Tolerance: the reference computes in another order, so now and then a number is on the other side
of a border between two e4m3 numbers: a sixteenth of it.
"""

import pytest
import torch
from flashdreams_kernels import adaln, fp8_rows, reference
from torch import Tensor

from tests.kernels.guarded import Guarded, error

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
EPS = 1e-6
SHAPES = {
    "odd": ((2, 5, 96), torch.float32),
    "one number": ((1, 1, 1), torch.float32),
    "bf16": ((1, 3, 130), torch.bfloat16),
    "fp16": ((2, 2, 64), torch.float16),
}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tokens whose sizes differ by powers of ten, a shift and a scale per clip."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    x *= torch.logspace(-2, 1, shape[1])[:, None]
    vectors = torch.randn(2, shape[0], 1, shape[2], generator=generator)
    return [x.to(device, dtype), *vectors.to(device)]


def product(quantized: tuple[Tensor, Tensor]) -> Tensor:
    return quantized[0].float() * quantized[1]


def worst(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Share of numbers that differ, or infinity where one differs by more than a step."""
    assert [x.dtype for x in found] == [torch.float8_e4m3fn, torch.float32]
    assert found[0].shape == expected[0].shape and found[1].shape == expected[1].shape
    a, b = product(found), product(expected)
    step = b.abs() / 8 + expected[1] * 2**-9
    near = bool(((a - b).abs() <= step).all()) and torch.equal(found[1], expected[1])
    return (a != b).float().mean().item() if near else float("inf")


@pytest.mark.parametrize("case", SHAPES)
def test_norm_equals_reference(case: str, device: torch.device) -> None:
    x, shift, scale = inputs(*SHAPES[case], device)
    for added in (0.0, 1.0):
        found = fp8_rows.layer_norm_quantize(x, shift, scale, EPS, added)
        assert worst(found, reference.layer_norm_quantize(x, shift, scale, EPS, added)) < 0.05
        wide = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        exact = wide * (added + scale) + shift
        assert error(product(found), exact) < 2**-4 + 1e-3
    other = reference.layer_norm_quantize(x, scale, shift, EPS)
    assert worst(found, other) > 0.5  # negative control


@pytest.mark.parametrize("case", SHAPES)
def test_gelu_equals_reference(case: str, device: torch.device) -> None:
    x = inputs(*SHAPES[case], device)[0]
    found = fp8_rows.gelu_quantize(x)
    assert worst(found, reference.gelu_quantize(x)) < 0.05
    exact = torch.nn.functional.gelu(x.float(), approximate="tanh")
    assert error(product(found), exact) < 2**-4 + 1e-3
    assert worst(found, reference.quantize_rows(x)) > 0.5  # negative control


def test_a_scale_is_the_least_power_of_two_and_what_is_not_finite_stays(
    device: torch.device,
) -> None:
    sizes = torch.tensor([448.0, 448.1, 1.75, 1.7500001, 0.0, 3e38, 1e-38], device=device)
    x = (sizes[:, None] * torch.tensor([1.0, -0.5], device=device))[None]
    values, scale = reference.quantize_rows(x)
    assert scale[0, :4, 0].tolist() == [1.0, 2.0, 2.0**-8, 2.0**-7]
    assert scale.isfinite().all() and (scale > 0).all()
    assert values.float()[0, :2, 0].tolist() == [448.0, 224.0]
    zeros = torch.zeros(1, 7, 2, device=device)  # a norm of nothing leaves the shift
    found = fp8_rows.layer_norm_quantize(zeros, x, zeros, EPS)
    assert torch.equal(found[1], scale) and torch.equal(product(found), product((values, scale)))
    x = torch.tensor([[[1.0, float("nan")], [1.0, 2.0]]], device=device)
    several = [reference.gelu_quantize(x)]
    if device.type == "cuda":  # the interpreter's own conversion loses NaN
        several.append(fp8_rows.gelu_quantize(x))
    for rows, _ in several:
        assert rows.float()[0, 0, 1].isnan() and not rows.float()[0, 1].isnan().any()


def test_rows_are_written_whole_views_are_read_and_nothing_else(device: torch.device) -> None:
    x, shift, scale = inputs((2, 3, 33), torch.float32, device)
    reads = [Guarded.around(tensor) for tensor in (x, shift, scale)]
    scales = [Guarded((2, 3, 1), torch.float32, device) for _ in range(2)]
    out = [torch.full((2, 3, 33), 448.0, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    gx, gshift, gscale = (guarded.tensor for guarded in reads)
    adaln.plan_norm_modulate(gx, gshift, gscale, EPS, out[0], 1.0, scales[0].tensor).run()
    fp8_rows.plan_gelu(gx, out[1], scales[1].tensor).run()
    expected = reference.layer_norm_quantize(x, shift, scale, EPS), reference.gelu_quantize(x)
    for values, guarded, wanted in zip(out, scales, expected, strict=True):
        assert worst((values, guarded.tensor), wanted) < 0.05
    assert all(guarded.intact() for guarded in (*reads, *scales))
    view = x[:, 1:, :17]
    assert worst(fp8_rows.gelu_quantize(view), reference.gelu_quantize(view)) < 0.05


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    """So ranks and chunks may split them."""
    x, shift, scale = inputs((1, 6, 48), torch.float32, device)
    whole = fp8_rows.layer_norm_quantize(x, shift, scale, EPS)
    parts = [fp8_rows.layer_norm_quantize(y, shift, scale, EPS) for y in x.split(2, dim=1)]
    assert torch.equal(product(whole), torch.cat([product(part) for part in parts], dim=1))


def test_schema_and_errors(device: torch.device) -> None:
    x, shift, scale = inputs((1, 2, 32), torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.flashdreams
    torch.library.opcheck(ops.layer_norm_quantize, (x, shift, scale, EPS, 0.0), test_utils=checks)
    torch.library.opcheck(ops.gelu_quantize, (x,), test_utils=checks)
    with pytest.raises(ValueError, match=r"shift must be \[1, 1, 32\], got \[1, 1, 31\]"):
        fp8_rows.layer_norm_quantize(x, shift[..., 1:], scale, EPS)
    with pytest.raises(ValueError, match="dim=20000 is wider than 16384"):
        fp8_rows.gelu_quantize(torch.zeros(1, 1, 20000, device=device))
