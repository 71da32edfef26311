"""Norm, sums and upsampling between convolutions against their references."""

import pytest
import torch
from flashdreams_kernels import channels, channels_reference
from torch import Tensor

from tests.kernels.guarded import TOLERANCE, Guarded, error

LEAST = 1e-12


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


CASES = {
    "odd": ((2, 5, 96), torch.float32),
    "one pixel, one channel": ((1, 1, 1), torch.float32),
    "more than a program": ((2, 37, 130), torch.float32),
    "bf16": ((1, 21, 96), torch.bfloat16),
    "fp16": ((1, 3, 64), torch.float16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_norm_silu_equals_reference_and_writes_behind_what_is_there(
    case: str, with_bias: bool, device: torch.device
) -> None:
    shape, dtype = CASES[case]
    batch, pixels, width = shape
    x = Guarded.around(normal(*shape, dtype=dtype, device=device))
    gain = Guarded.around(normal(width, dtype=dtype, device=device))
    bias = normal(width, dtype=dtype, device=device, seed=1) if with_bias else None
    lead = 3
    whole = Guarded((batch, lead + pixels, width), dtype, device)
    channels.norm_silu(x.tensor, gain.tensor, width**0.5, LEAST, whole.tensor[:, lead:], bias)
    expected = torch.empty(shape, dtype=dtype, device=device)
    channels_reference.norm_silu(x.tensor, gain.tensor, width**0.5, LEAST, expected, bias)
    assert error(whole.tensor[:, lead:], expected) < TOLERANCE[dtype]
    assert whole.tensor[:, :lead].isnan().all() and whole.intact() and x.intact()
    wrong = torch.empty_like(expected)  # negative control: another gain
    channels_reference.norm_silu(x.tensor, -gain.tensor, width**0.5, LEAST, wrong, bias)
    assert error(wrong, expected) > 0.1


def test_norm_silu_of_zeros_is_zero_and_of_nan_is_nan(device: torch.device) -> None:
    x = torch.zeros(1, 3, 8, device=device)
    x[0, 1, 2] = torch.nan
    out = torch.empty_like(x)
    channels.norm_silu(x, torch.ones(8, device=device), 8**0.5, LEAST, out)
    assert torch.equal(out[0, 0], torch.zeros(8, device=device)) and out[0, 1].isnan().all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("terms", ["bias", "residual", "both", "none"])
@pytest.mark.parametrize("case", CASES)
def test_add_equals_reference(case: str, terms: str, relu: bool, device: torch.device) -> None:
    (batch, pixels, width), dtype = CASES[case]
    values = normal(batch * pixels, width, dtype=dtype, device=device)
    bias = normal(width, dtype=dtype, device=device) if terms in ("bias", "both") else None
    residual = None
    if terms in ("residual", "both"):
        residual = normal(batch * pixels, width, dtype=dtype, device=device, seed=2)
    x = Guarded.around(values)
    assert channels.add_(x.tensor, bias, residual, relu=relu) is x.tensor
    expected = channels_reference.add_(values.clone(), bias, residual, relu=relu)
    assert torch.equal(x.tensor.isnan(), expected.isnan()) and x.intact()
    torch.testing.assert_close(x.tensor, expected, rtol=1e-2, atol=1e-5)
    if terms != "none" and width > 1:
        assert not torch.equal(expected, values)  # negative control: something was added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "frames", "pixels"), [(1, 1, 5), (2, 3, 7), (1, 4, 33)])
def test_sum_of_halves_equals_reference(
    batch: int, frames: int, pixels: int, dtype: torch.dtype, device: torch.device
) -> None:
    width = 24
    y = Guarded.around(normal(batch, frames, pixels, 2 * width, dtype=dtype, device=device))
    last = Guarded.around(normal(batch, pixels, width, dtype=dtype, device=device))
    bias = normal(width, dtype=dtype, device=device)
    out = Guarded((batch, frames, pixels, width), dtype, device)
    channels.sum_halves(y.tensor, last.tensor, bias, out.tensor)
    expected = torch.empty_like(out.tensor)
    channels_reference.sum_halves(y.tensor, last.tensor, bias, expected)
    assert error(out.tensor, expected) < TOLERANCE[dtype] and out.intact()
    channels_reference.sum_halves(y.tensor, -last.tensor, bias, expected)  # negative control
    assert error(out.tensor, expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("count", "height", "width", "growth"), [(1, 1, 1, 1), (2, 3, 5, 2)])
def test_spread_phases_equals_reference(
    count: int,
    height: int,
    width: int,
    growth: int,
    with_bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    shape = (count, height + 1, width + 1, growth, 2, 2, 12)
    y = Guarded.around(normal(*shape, dtype=dtype, device=device))
    bias = normal(12, dtype=dtype, device=device) if with_bias else None
    out = Guarded((count, growth, 2 * height, 2 * width, 12), dtype, device)
    channels.spread_phases(y.tensor, out.tensor, bias)
    expected = torch.empty_like(out.tensor)
    channels_reference.spread_phases(y.tensor, expected, bias)
    assert error(out.tensor, expected) < TOLERANCE[dtype] and out.intact()
    channels_reference.spread_phases(y.tensor.flip(4), expected, bias)  # negative control
    assert error(out.tensor, expected) > 0.1


@pytest.mark.parametrize(("count", "height", "width"), [(2, 1, 1), (4, 3, 5)])
def test_phases_are_spread_in_pairs_of_frames(
    count: int, height: int, width: int, device: torch.device
) -> None:
    y = Guarded.around(
        normal(count, height + 1, width + 1, 1, 2, 2, 12, dtype=torch.float32, device=device)
    )
    frames = torch.empty(count, 1, 2 * height, 2 * width, 12, device=device)
    out = Guarded((count // 2, 2 * height, 2 * width, 2, 12), torch.float32, device)
    expected = torch.empty_like(out.tensor)
    channels.spread_phases(y.tensor, out.tensor, pairs=True)
    channels_reference.spread_phases(y.tensor, expected, pairs=True)
    assert torch.equal(out.tensor, expected) and out.intact()
    channels_reference.spread_phases(y.tensor, frames)
    wanted = torch.stack([frames[0::2, 0], frames[1::2, 0]], dim=3)
    assert torch.equal(out.tensor, wanted) and not torch.equal(wanted.flip(3), wanted)
    with pytest.raises(ValueError, match="1 frames that become 1 each are not pairs"):
        channels.spread_phases(y.tensor[:1], out.tensor, pairs=True)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    x, gain = torch.zeros(1, 4, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"gain must be \[8\], got \[7\]"):
        channels.norm_silu(x, gain[:7], 1.0, LEAST, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"x must be contiguous, its strides are \[32, 1, 4\]"):
        channels.norm_silu(torch.zeros(1, 8, 4, device=device).mT, gain, 1.0, LEAST, x)
    with pytest.raises(TypeError, match=r"x is torch.float64; allowed here: "):
        channels.add_(torch.zeros(4, 8, device=device, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"bias is torch.bfloat16, the others are torch.float32"):
        channels.add_(x[0], gain.bfloat16())
    with pytest.raises(ValueError, match=r"out must be \[1, 2, 6, 6, 8\]"):
        y = torch.zeros(1, 4, 4, 2, 2, 2, 8, device=device)
        channels.spread_phases(y, torch.zeros(1, 1, 6, 6, 8, device=device))
    with pytest.raises(ValueError, match="9000 channels are more than 8192"):
        channels.add_(torch.zeros(1, 9000, device=device))
