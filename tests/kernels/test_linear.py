"""The batch-invariant linear layer against its reference, and its bits per row."""

from dataclasses import replace

import pytest
import torch
from flashdreams_kernels import linear, reference
from flashdreams_kernels.launch import Target, target_of
from torch import Tensor

from tests.kernels.guarded import TOLERANCE, Guarded, error

POINTERS = linear.LinearTile(32, 32, 32, 4, 2)
DESCRIPTORS = replace(POINTERS, descriptors=True)
PERSISTENT = replace(DESCRIPTORS, persistent=True)
WAYS = {"pointers": POINTERS, "descriptors": DESCRIPTORS, "persistent": PERSISTENT}


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((rows, width), (columns, width), (columns,))
    x, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def run(tile: linear.LinearTile, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One call with a tile of its own, into memory that starts as NaN."""
    out = x.new_full((len(x), len(weight)), torch.nan)
    linear.plan(x, weight, bias, out, target_of(x.device), tile).run()
    return out


CASES = {
    "odd": ((37, 45, 51), torch.float32),
    "one row": ((1, 40, 72), torch.float32),
    "one of each": ((1, 1, 1), torch.float32),
    "whole tiles": ((64, 64, 64), torch.float32),
    "bf16": ((70, 72, 104), torch.bfloat16),
    "bf16, odd": ((35, 33, 31), torch.bfloat16),
    "fp16": ((33, 16, 64), torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_equals_reference(case: str, device: torch.device) -> None:
    shape, dtype = CASES[case]
    x, weight, bias = inputs(shape, dtype, device)
    out = linear.invariant_linear(x, weight, bias)
    assert out.dtype == dtype and out.is_contiguous()
    assert error(out, reference.linear(x, weight, bias)) < TOLERANCE[dtype]
    if shape != (1, 1, 1):
        swapped = reference.linear(x, weight.flip(0), bias)
        assert error(out, swapped) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 40, 72), (70, 72, 104), (64, 64, 64)])
def test_every_way_writes_all_of_its_output_and_nothing_else(
    way: str, shape: tuple[int, int, int], device: torch.device
) -> None:
    dtype = torch.float16
    x, weight, bias = inputs(shape, dtype, device)
    reads = [Guarded.around(tensor) for tensor in (x, weight, bias)]
    out = Guarded((shape[0], shape[1]), dtype, device)
    tensors = [guarded.tensor for guarded in (*reads, out)]
    launch = linear.plan(*tensors, target_of(device), WAYS[way])
    assert launch.program == "linear_pointers" if way == "pointers" else "linear_descriptors"
    launch.run()
    assert error(out.tensor, reference.linear(x, weight, bias)) < TOLERANCE[dtype]
    assert all(guarded.intact() for guarded in (*reads, out))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_has_the_same_bits_wherever_it_is(way: str, device: torch.device) -> None:
    """One row, the end of a tile, padded, split and permuted rows; no tolerance."""
    x, weight, bias = inputs((75, 48, 136), torch.bfloat16, device)
    tile = WAYS[way]
    whole = run(tile, x, weight, bias)
    for row in (0, 31, 74):
        assert torch.equal(run(tile, x[row : row + 1], weight, bias), whole[row : row + 1])
    padded = torch.cat([x, x.new_zeros(21, 136)])
    assert torch.equal(run(tile, padded, weight, bias)[:75], whole)
    parts = [run(tile, part, weight, bias) for part in x.split([7, 40, 28])]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(run(tile, x[order], weight, bias), whole[order])
    poisoned = torch.cat([x, x.new_full((3, 136), torch.nan)])
    assert torch.equal(run(tile, poisoned, weight, bias)[:75], whole)
    assert not torch.equal(run(tile, x, weight.flip(0), bias), whole)


def test_tiles_depend_on_the_layer_and_not_on_the_rows() -> None:
    hopper, ampere = Target(90, 132), Target(80, 108)
    assert linear.linear_tile(hopper, 8960, 2).block_n > linear.linear_tile(hopper, 1536, 2).block_n
    assert linear.linear_tile(hopper, 8960, 2).descriptors
    assert not linear.linear_tile(ampere, 8960, 2).descriptors
    assert linear.linear_tile(Target(103, 148), 64, 2) == linear.LINEAR_TILES[100, False]
    assert linear.linear_tile(Target(120, 84), 64, 2) == linear.linear_tile(Target(89, 84), 64, 2)
    assert linear.linear_tile(hopper, 8960, 4) == linear.FLOAT32_TILE


def test_rows_that_descriptors_cannot_take_go_through_pointers(device: torch.device) -> None:
    """Which program runs follows from the layer, never from where its rows happen to be."""
    target = target_of(device)
    for shape, program in (
        ((5, 16, 24), "linear_descriptors"),
        ((5, 16, 20), "linear_pointers"),
        ((5, 20, 24), "linear_pointers"),
    ):
        x, weight, bias = inputs(shape, torch.bfloat16, device)
        out = x.new_empty(len(x), len(weight))
        assert linear.plan(x, weight, bias, out, target, DESCRIPTORS).program == program
    hopper, x = Target(90, 132), torch.empty(5, 100, dtype=torch.bfloat16, device="meta")
    out, weight = x.new_empty(5, 8960), x.new_empty(8960, 100)
    wide = linear.linear_tile(hopper, 8960, 2)
    launch = linear.plan(x, weight, None, out, hopper, wide)  # 256 columns would spill registers
    assert launch.program == "linear_pointers" and launch.constants["BLOCK_N"] < wide.block_n
    x, weight, bias = inputs((5, 16, 24), torch.bfloat16, device)
    shifted = torch.zeros(5 * 24 + 1, dtype=x.dtype, device=device)[1:].view(5, 24).copy_(x)
    strided = torch.zeros(5, 48, dtype=x.dtype, device=device)[:, 8:32].copy_(x)
    for tile in (DESCRIPTORS, POINTERS):
        expected = run(tile, x, weight, bias)
        assert torch.equal(run(tile, shifted, weight, bias), expected)
        assert torch.equal(run(tile, strided, weight, bias), expected)


def test_linear_keeps_leading_dims_and_takes_no_rows(device: torch.device) -> None:
    x, weight, bias = inputs((6, 5, 7), torch.float32, device)
    whole = linear.invariant_linear(x, weight, bias)
    assert torch.equal(linear.invariant_linear(x.view(2, 3, 7), weight, bias), whole.view(2, 3, 5))
    assert torch.equal(linear.invariant_linear(x[0], weight, bias), whole[0])
    assert linear.invariant_linear(x[:0], weight, bias).shape == (0, 5)


def test_linear_passes_through_compile_and_keeps_its_schema(device: torch.device) -> None:
    x, weight, bias = inputs((3, 5, 7), torch.float32, device)

    def twice(x: Tensor) -> Tensor:
        return 2 * linear.invariant_linear(x + 1, weight, bias)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, twice(x)) and not torch.equal(compiled, twice(x + 1))
    torch.library.opcheck(
        torch.ops.flashdreams.invariant_linear,
        (x, weight, bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_linear_names_what_does_not_fit(device: torch.device) -> None:
    x, weight, bias = inputs((3, 5, 7), torch.float32, device)
    with pytest.raises(ValueError, match=r"weight must be \[any, 7\], got \[5, 6\]"):
        linear.invariant_linear(x, weight[:, :6])
    with pytest.raises(ValueError, match=r"weight has strides .* must be contiguous"):
        linear.invariant_linear(x[:, :6], weight[:, :6])
    with pytest.raises(ValueError, match=r"bias must be \[5\], got \[4\]"):
        linear.invariant_linear(x, weight, bias[:4])
    with pytest.raises(TypeError, match=r"weight is torch.float16"):
        linear.invariant_linear(x, weight.half())
    with pytest.raises(TypeError, match=r"x is torch.float64"):
        linear.invariant_linear(x.double(), weight.double())
