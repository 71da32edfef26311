"""A batch-invariant linear layer: the bits of a row do not depend on the number of rows.

Shape letters: M rows (tokens), N output features, K input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels.launch import (
    ALIGNMENT_BYTES,
    CONSUMER,
    FLOAT_TYPES,
    Block,
    Launch,
    Target,
    ceil_div,
    check_tensor,
    generation_of,
    target_of,
)

GROUP = 8
"""Rows of tiles that are computed together, so that weights are read from L2."""


@dataclass(frozen=True)
class LinearTile:
    """Tile sizes and compiler options of the linear program."""

    block_m: int
    """Rows per tile."""
    block_n: int
    """Output features per tile."""
    block_k: int
    """Input features per step."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Load and store tiles through tensor descriptors (TMA), if addresses allow it."""
    persistent: bool = False
    """One program per multiprocessor, which computes many tiles; only with descriptors."""


WIDE = 2048
"""Minimum number of output features for the wider tile."""

LinearTable = Mapping[tuple[int, bool], LinearTile]
"""Tiles by (capability, whether the layer is wide), for 16-bit inputs; see :func:`linear_tile`."""

LINEAR_TILES: LinearTable = {
    (80, False): LinearTile(128, 128, 32, 4, 4),
    (80, True): LinearTile(128, 128, 32, 4, 4),
    (CONSUMER, False): LinearTile(128, 128, 32, 4, 3),
    (CONSUMER, True): LinearTile(128, 128, 32, 4, 3),
    (90, False): LinearTile(128, 128, 64, 8, 3, descriptors=True),
    (90, True): LinearTile(128, 256, 64, 8, 3, descriptors=True, persistent=True),
    (100, False): LinearTile(128, 128, 64, 4, 4, descriptors=True, persistent=True),
    (100, True): LinearTile(128, 256, 64, 8, 3, descriptors=True, persistent=True),
}

FLOAT32_TILE = LinearTile(64, 64, 32, 4, 3)
"""For float32: full precision, without tensor cores."""

UNALIGNED_TILE = LinearTile(128, 128, 32, 8, 3)
"""For 16-bit layers whose rows are not multiples of a vector, which need more registers."""

INTERPRETER_TILE = LinearTile(32, 32, 32, 1, 1)


def linear_tile(
    target: Target, num_columns: int, itemsize: int, table: LinearTable = LINEAR_TILES
) -> LinearTile:
    """Tiles for a GPU, a layer and an element size, independent of the number of rows.

    Args:
        target: the machine.
        num_columns: N, output features of the layer.
        itemsize: bytes of an element.
        table: tiles for 16-bit inputs.
    """
    if target.interpreted:
        return INTERPRETER_TILE
    if itemsize > 2:
        return FLOAT32_TILE
    return table[generation_of(target, table), num_columns >= WIDE]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``; the bits of a row depend on that row alone.

    Tiles depend only on N, the dtype and the GPU, K is summed in a fixed order in float32, and the
    bias is added before the result is rounded. So a row has the same bits alone and among padded,
    split or permuted rows. Inference only: no gradient is defined.

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32. Rows that are not contiguous or aligned are copied.
        weight: ``[N, K]``, contiguous, like ``x`` in dtype and device.
        bias: ``[N]``, like ``weight``, or None.

    Returns:
        ``[..., N]`` contiguous, in the dtype of ``x``.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
        ImportError: triton is not installed.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    out = torch.ops.flashdreams.invariant_linear(rows, weight, bias)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], len(weight))


@torch.library.custom_op("flashdreams::invariant_linear", mutates_args=())
def _invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    if out.numel():
        target = target_of(x.device)
        tile = linear_tile(target, len(weight), x.element_size())
        plan(x, weight, bias, out, target, tile).run()
    return out


@_invariant_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the arguments of :func:`invariant_linear`, with ``x`` as ``[M, K]``.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: a dtype that does not fit.
    """
    check_tensor("x", x, (None, None), x, FLOAT_TYPES)
    check_tensor("weight", weight, (None, x.shape[1]), x)
    if not weight.is_contiguous():
        raise ValueError(
            f"weight has strides {list(weight.stride())}; it must be contiguous. Call "
            "weight.contiguous() once, where it is loaded."
        )
    if bias is not None:
        check_tensor("bias", bias, (len(weight),), x)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, target: Target, tile: LinearTile
) -> Launch:
    """The launch of one call.

    Args:
        x: ``[M, K]``, checked, like all tensors; see :func:`invariant_linear`.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        out: ``[M, N]`` contiguous; written to.
        target: GPU of the launch.
        tile: tile sizes.
    """
    num_rows, width = x.shape
    num_columns = len(weight)
    is_whole = _whole_vectors(num_columns, width, x.element_size())
    if not (is_whole or target.interpreted or x.element_size() > 2):
        tile = UNALIGNED_TILE
    tiles = ceil_div(num_rows, tile.block_m) * ceil_div(num_columns, tile.block_n)
    arguments: dict[str, Any] = {
        "bias": bias,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "width": width,
    }
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": GROUP,
        "HAS_BIAS": bias is not None,
        "UPCAST": target.interpreted and x.dtype != torch.float32,
    }
    x, weight = _aligned(x), _aligned(weight)
    if tile.descriptors and is_whole:
        program, programs = "linear_descriptors", tiles
        if tile.persistent:
            programs = min(tiles, target.num_processors)
        arguments |= {
            "x": Block(x, (tile.block_m, tile.block_k)),
            "weight": Block(weight, (tile.block_n, tile.block_k)),
            "out": Block(out, (tile.block_m, tile.block_n)) if tile.persistent else out,
        }
        constants["PERSISTENT"] = tile.persistent
    else:
        program, programs = "linear_pointers", tiles
        arguments |= {"x": x, "weight": weight, "out": out}
        constants["WHOLE_K"] = width % tile.block_k == 0
        constants["PRECISION"] = "ieee" if x.dtype == torch.float32 else "tf32"
    return Launch(
        "linear",
        program,
        (programs,),
        arguments,
        constants,
        tile.num_warps,
        tile.num_stages,
        x.device,
    )


def _whole_vectors(num_columns: int, width: int, itemsize: int) -> bool:
    """Whether rows of the weight and of the result have the alignment that descriptors need."""
    return num_columns * itemsize % ALIGNMENT_BYTES == width * itemsize % ALIGNMENT_BYTES == 0


def _aligned(x: Tensor) -> Tensor:
    """``[rows, K]`` contiguous at an aligned address, so that one compiled program suffices."""
    if x.is_contiguous() and (x.is_meta or x.data_ptr() % ALIGNMENT_BYTES == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)
