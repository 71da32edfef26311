"""Layer norms and sums with the residual against their references."""

import pytest
import torch
from flashdreams_kernels import adaln, reference
from torch import Tensor

from flashdreams.models.wan.blocks import modulated_norm
from tests.kernels.guarded import TOLERANCE, Guarded, error

EPS = 1e-6


def inputs(
    shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a branch and the six vectors ``[B, L or 1, 6, dim]`` of a timestep."""
    batch, length, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, y = 3 + torch.randn(2, *shape, generator=generator)
    time = torch.randn(batch, length if per_token else 1, 6, width, generator=generator)
    return x.to(device, dtype), y.to(device, dtype), time.to(device)


CASES = {
    "odd": ((2, 5, 96), False, torch.float32),
    "one token": ((1, 1, 1), False, torch.float32),
    "per token": ((2, 3, 130), True, torch.float32),
    "bf16": ((1, 3, 96), False, torch.bfloat16),
    "fp16": ((1, 3, 64), True, torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_modulation_equals_reference(case: str, device: torch.device) -> None:
    x, _, time = inputs(*CASES[case], device)
    shift, scale = time[:, :, 1], time[:, :, 2]
    result = adaln.layer_norm_modulate(x, shift, scale, EPS)
    assert result.dtype == x.dtype and result.is_contiguous()
    expected = reference.layer_norm_modulate(x, shift, scale, EPS)
    assert error(result, expected) < TOLERANCE[x.dtype]
    assert error(result, reference.layer_norm_modulate(x, scale, shift, EPS)) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_gate_equals_reference(case: str, device: torch.device) -> None:
    x, y, time = inputs(*CASES[case], device)
    gate = time[:, :, 4]
    result = adaln.gate_residual(x, y, gate)
    assert result.dtype == x.dtype and result.is_contiguous()
    assert error(result, reference.gate_residual(x, y, gate)) < TOLERANCE[x.dtype]
    assert error(result, reference.gate_residual(x, y, time[:, :, 5])) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_affine_sum_equals_reference(case: str, device: torch.device) -> None:
    x, y, time = inputs(*CASES[case], device)
    gate, scale, shift = (time[:, :, i] for i in (4, 5, 1))
    result = adaln.gate_residual(x, y, gate, scale, shift)
    assert result.dtype == x.dtype and result.is_contiguous()
    expected = reference.gate_residual(x, y, gate, scale, shift)
    assert error(result, expected) < TOLERANCE[x.dtype]
    assert error(result, reference.gate_residual(x, y, gate, shift, scale)) > 0.1
    plain = adaln.gate_residual(x, y)
    assert error(plain, x.float() + y.float()) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("case", CASES)
def test_affine_norm_equals_reference(case: str, device: torch.device) -> None:
    x, y, _ = inputs(*CASES[case], device)
    weight, bias = 2 + y[0, 0], x[0, 0].float()
    result = adaln.layer_norm_affine(x, weight, bias, EPS)
    assert result.dtype == x.dtype and result.is_contiguous()
    expected = reference.layer_norm_affine(x, weight, bias, EPS)
    assert error(result, expected) < TOLERANCE[x.dtype]
    assert error(result, reference.layer_norm_affine(x, weight + 1, bias, EPS)) > 0.1 or (
        x.shape[-1] == 1  # the norm of one value is 0, whatever its gain
    )
    ordinary = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias, EPS)
    assert error(expected, ordinary) < TOLERANCE[x.dtype]


def test_a_wide_residual_meets_a_camera_of_sixteen_bits_that_all_clips_share(
    device: torch.device,
) -> None:
    """As in LingBot-World: residual and gate float32, branch, scale and shift bf16."""
    x, y, time = inputs((2, 3, 96), True, torch.float32, device)
    half = torch.bfloat16
    gate, scale, shift = time[:, :1, 0], time[:1, :, 1].to(half), time[:1, :, 2].to(half)
    result = adaln.gate_residual(x, y.to(half), gate, scale, shift)
    assert result.dtype == torch.float32
    blocks = torch.addcmul(shift, torch.addcmul(x, y.to(half), gate), scale)
    assert error(result, blocks) < TOLERANCE[torch.float32]
    assert error(result[1:], blocks[:1]) > 0.1
    added = adaln.gate_residual(x, y.to(half))
    assert torch.equal(added, x + y.to(half))
    normed = adaln.layer_norm_affine(x, time[0, 0, 0], time[0, 0, 1], EPS, half)
    ordinary = torch.nn.functional.layer_norm(x, (96,), time[0, 0, 0], time[0, 0, 1], EPS)
    assert normed.dtype == half and error(normed, ordinary) < TOLERANCE[half]


def test_a_float32_residual_takes_and_gives_branches_of_sixteen_bits(device: torch.device) -> None:
    x, y, time = inputs((2, 3, 96), True, torch.float32, device)
    shift, scale, gate = (time[:, :, i] for i in range(3))
    half = torch.bfloat16
    modulated = adaln.layer_norm_modulate(x, shift, scale, EPS, half)
    assert modulated.dtype == half
    expected = reference.layer_norm_modulate(x, shift, scale, EPS)
    assert error(modulated, expected) < TOLERANCE[half]
    gated = adaln.gate_residual(x, y.to(half), gate)
    assert gated.dtype == torch.float32
    assert error(gated, x + y.to(half).float() * gate) < TOLERANCE[torch.float32]
    rounded = reference.gate_residual(x.to(half), y.to(half), gate)
    assert error(rounded, x + y.to(half).float() * gate) > 1e-3


def test_references_equal_the_arithmetic_of_the_block(device: torch.device) -> None:
    x, y, time = inputs((2, 5, 96), False, torch.bfloat16, device)
    e = time.unbind(2)
    modulated = modulated_norm(x, e[0], e[1], EPS)
    result = reference.layer_norm_modulate(x, e[0], e[1], EPS)
    torch.testing.assert_close(result, modulated)
    gated = x + (y * e[2]).to(x.dtype)
    assert torch.equal(reference.gate_residual(x, y, e[2]), gated)
    assert not torch.equal(reference.gate_residual(x, y, e[3]), gated)


def test_modulation_and_gate_write_all_of_their_output_and_nothing_else(
    device: torch.device,
) -> None:
    x, y, time = inputs((2, 3, 33), True, torch.float32, device)
    shift, scale, gate = (time[:, :, i].contiguous() for i in range(3))
    reads = [Guarded.around(tensor) for tensor in (x, y, shift, scale, gate)]
    writes = [Guarded((2, 3, 33), torch.float32, device) for _ in range(4)]
    gx, gy, gshift, gscale, ggate = (guarded.tensor for guarded in reads)
    adaln.plan_norm_modulate(gx, gshift, gscale, EPS, writes[0].tensor).run()
    adaln.plan_gate_add(gx, gy, ggate, writes[1].tensor).run()
    adaln.plan_gate_add(gx, gy, ggate, writes[2].tensor, gscale, gshift).run()
    adaln.plan_gate_add(gx, gy, None, writes[3].tensor).run()
    modulated = reference.layer_norm_modulate(x, shift, scale, EPS)
    assert error(writes[0].tensor, modulated) < TOLERANCE[torch.float32]
    assert error(writes[1].tensor, reference.gate_residual(x, y, gate)) < 1e-6
    affine = reference.gate_residual(x, y, gate, scale, shift)
    assert error(writes[2].tensor, affine) < 1e-6
    assert torch.equal(writes[3].tensor, x + y)
    assert all(guarded.intact() for guarded in (*reads, *writes))


def test_modulation_and_gate_take_views_as_they_are(device: torch.device) -> None:
    x, y, time = inputs((2, 4, 64), False, torch.float32, device)
    wide, pair = x[:, 1:, :48], y[:, 1:, :48]
    shift, scale = time[:, :, 0, :48], time[:, :, 1, :48]
    result = adaln.layer_norm_modulate(wide, shift, scale, EPS)
    expected = reference.layer_norm_modulate(wide, shift, scale, EPS)
    assert error(result, expected) < TOLERANCE[torch.float32]
    gated = adaln.gate_residual(wide, pair, shift)
    assert error(gated, reference.gate_residual(wide, pair, shift)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modulation_and_gate_pass_through_compile(backend: str, device: torch.device) -> None:
    x, y, time = inputs((1, 2, 32), False, torch.float32, device)

    def half_block(x: Tensor, y: Tensor) -> Tensor:
        normed = adaln.layer_norm_modulate(x, time[:, :, 0], time[:, :, 1], EPS)
        return adaln.gate_residual(x, y * normed, time[:, :, 2])

    compiled = torch.compile(half_block, fullgraph=True, backend=backend)(x, y)
    assert torch.equal(compiled, half_block(x, y))
    assert not torch.equal(compiled, half_block(y, x))


def test_modulation_and_gate_keep_their_schema(device: torch.device) -> None:
    x, y, time = inputs((1, 2, 32), False, torch.float32, device)
    shift, scale = time[:, :, 0].clone(), time[:, :, 1].clone()
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.flashdreams
    half = torch.bfloat16
    for arguments in ((x, shift, scale, EPS), (x, shift, scale, EPS, half)):
        torch.library.opcheck(ops.layer_norm_modulate, arguments, test_utils=checks)
    for branch in (y, y.to(half)):
        torch.library.opcheck(ops.gate_residual, (x, branch, shift), test_utils=checks)
        whole = (x, branch, shift, scale, shift)
        torch.library.opcheck(ops.gate_residual, whole, test_utils=checks)
    rows = shift[0, 0].clone(), scale[0, 0].clone()
    torch.library.opcheck(ops.layer_norm_affine, (x, *rows, EPS, half), test_utils=checks)


def test_modulation_and_gate_name_what_does_not_fit(device: torch.device) -> None:
    x, y, time = inputs((1, 4, 32), False, torch.float32, device)
    with pytest.raises(ValueError, match=r"shift must be \[1, 4, 32\], got \[1, 3, 32\]"):
        adaln.layer_norm_modulate(x, y[:, 1:], time[:, :, 0], EPS)
    with pytest.raises(ValueError, match=r"y must be \[1, 4, 32\]"):
        adaln.gate_residual(x, y[:, 1:], time[:, :, 0])
    with pytest.raises(ValueError, match="gate has stride 2"):
        adaln.gate_residual(x[..., :16].clone(), y[..., :16].clone(), time[:, :, 0, ::2])
    with pytest.raises(TypeError, match=r"dtype is torch\.int8; allowed here: "):
        adaln.layer_norm_modulate(x, time[:, :, 0], time[:, :, 1], EPS, torch.int8)
    with pytest.raises(ValueError, match="scale is given alone; give scale and shift"):
        adaln.gate_residual(x, y, None, time[:, :, 0])
    with pytest.raises(ValueError, match=r"weight must be \[32\], got \[31\]"):
        adaln.layer_norm_affine(x, time[0, 0, 0, 1:], time[0, 0, 0], EPS)
    with pytest.raises(TypeError, match=r"y is torch\.float64; allowed here: "):
        adaln.gate_residual(x, y.double(), time[:, :, 0])
    with pytest.raises(ValueError, match="dim=20000 is wider than 16384"):
        wide = torch.zeros(1, 1, 20000, device=device)
        adaln.gate_residual(wide, wide, wide)
