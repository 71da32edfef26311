"""Ahead-of-time compilation of every kernel at production sizes; needs no GPU.

``python -m flashdreams_kernels.ahead 80 90 100`` prints one JSON line per kernel and GPU
generation with the registers, spills and shared memory that the compiler reports.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdreams_kernels import adaln, attention, channels, fp8_rows, linear, rope_qknorm
from flashdreams_kernels.launch import Block, Launch, Target, load_programs

PROCESSORS = {80: 108, 90: 132, 100: 148}
"""Streaming multiprocessors by GPU generation (A100, H100 and H200, B200)."""

FP8_CAPABILITY = 89
"""Lowest compute capability with conversion to e4m3."""

TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Report:
    """The compiler's report on one kernel."""

    kernel: str
    """Module and program."""
    capability: int
    num_warps: int
    shared_bytes: int
    registers: int | None
    """Per thread; None if triton does not include cuobjdump."""
    spill_bytes: int | None
    """Local memory per thread; should be 0."""
    cubin_bytes: int


def compile_launch(launch: Launch, capability: int) -> Report:
    """Compile one launch for one GPU generation.

    Args:
        launch: its tensors may be on ``meta``; they are assumed to be 16-byte aligned.
        capability: compute capability times ten.

    Raises:
        ImportError: triton is not installed.
    """
    program = getattr(load_programs(launch.module), launch.program)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = getattr(program, "do_not_specialize", None) or ()
    signature, attributes = {}, {}
    constants = dict(launch.constants)
    for index, name in enumerate(program.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        kind, aligned = _argument_type(launch.arguments[name], name in fixed)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = launch.arguments[name]
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(program, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    cubin = compiled.asm["cubin"]
    registers, spill_bytes = _resources(cubin)
    return Report(
        f"{launch.module}.{launch.program}",
        capability,
        launch.num_warps,
        compiled.metadata.shared,
        registers,
        spill_bytes,
        len(cubin),
    )


def _argument_type(value: Any, fixed: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether to assume that it is a multiple of 16."""
    if value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return TYPE_NAMES[value.dtype], True
    if isinstance(value, Block):
        return f"tensordesc<{TYPE_NAMES[value.tensor.dtype][1:]}{list(value.shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not fixed:
        return "constexpr", False
    return ("i32" if value < 2**31 else "i64"), value % 16 == 0 and not fixed


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and local bytes per thread, read with triton's own cuobjdump."""
    import triton

    tool = getattr(getattr(triton.knobs.nvidia, "cuobjdump", None), "path", None)
    if tool is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def real_launches(
    capability: int,
    num_heads: int = 12,
    head_dim: int = 128,
    num_splits: Sequence[int] = (1, 2),
) -> Iterator[Launch]:
    """Every kernel at the sizes of a 480x832 chunk of 3 latent frames in a window of 21, bf16.

    Args:
        capability: compute capability times ten.
        num_heads: heads; 12 for the 1.3B model.
        head_dim: channels of a head.
        num_splits: KV splits of the attention kernel; above 1 the merge is compiled too.
    """
    target = Target(capability, PROCESSORS.get(capability, 132))
    length, slots, dim = 4680, 32760, num_heads * head_dim
    factor = head_dim**-0.5

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    visible, lse = tensor(1, dtype=torch.int64), tensor(1, num_heads, length, dtype=torch.float32)
    for size in (64, head_dim):  # tiles differ
        q, kv = tensor(1, length, num_heads, size), tensor(1, slots, num_heads, size)
        for splits in num_splits:
            yield from attention.plan(q, kv, kv, visible, factor, q, lse, splits, target)
    chunk = tensor(1, length, num_heads, head_dim)
    cache = tensor(1, slots, num_heads, head_dim)
    weight, table = tensor(dim), tensor(length, head_dim // 2, 2, dtype=torch.float32)
    indices = tensor(length, dtype=torch.int64)
    outputs = (chunk, cache, cache)
    yield rope_qknorm.plan((chunk,) * 3, outputs, weight, weight, table, 1e-6, indices)
    if capability >= FP8_CAPABILITY:
        eight = [torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in outputs]
        scales = tensor(1, 3, num_heads, dtype=torch.float32)
        for places, stored in ((indices, eight), (None, [eight[0]] * 3)):
            inputs, to = (chunk,) * 3, (stored[0], stored[1], stored[2])
            yield rope_qknorm.plan(inputs, to, weight, weight, table, 1e-6, places, scales)
    tokens, vectors = tensor(1, length, dim), tensor(1, 1, 6, dim, dtype=torch.float32)
    shift, scale = vectors[:, :, 0], vectors[:, :, 1]
    for residual in (tokens, tensor(1, length, dim, dtype=torch.float32)):
        yield adaln.plan_norm_modulate(residual, shift, scale, 1e-6, tokens)
        yield adaln.plan_gate_add(residual, tokens, shift, residual)
        yield adaln.plan_gate_add(residual, tokens, None, residual)
        yield adaln.plan_gate_add(residual, tokens, shift, residual, tokens, tokens)
    if capability >= FP8_CAPABILITY:
        yield from _fp8_row_launches(tensor, length)
    yield from _linear_launches(target, length, dim)
    yield from _decoder_launches(tensor)


def _fp8_row_launches(tensor: Callable[..., Tensor], length: int) -> Iterator[Launch]:
    """Kernels before the FP8 matmuls of LingBot-World 14B, and GELU of the 1.3B model."""
    wide = tensor(1, length, 5120, dtype=torch.float32)
    row, out_scale = wide[:, :1], tensor(1, length, 1, dtype=torch.float32)
    out = torch.empty_like(wide, dtype=torch.float8_e4m3fn)
    for added in (0.0, 1.0):
        yield adaln.plan_norm_modulate(wide, row, row, 1e-6, out, added, out_scale)
    for width in (8960, 13824):
        hidden = tensor(1, length, width)
        out = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
        yield fp8_rows.plan_gelu(hidden, out, out_scale)


def _decoder_launches(tensor: Callable[..., Tensor]) -> Iterator[Launch]:
    """Launches of the decoders at full resolution for 12 frames of 480x832."""
    frames, pixels = 12, 480 * 832
    wide, gain, row = tensor(1, frames * pixels, 96), tensor(96), tensor(frames * pixels, 96)
    for bias in (None, gain):
        yield channels.plan_norm_silu(wide, gain, 96**0.5, 1e-12, wide, bias)
        yield channels.plan_add(row, gain, None if bias is None else row, False)
    small = tensor(1, 6, pixels // 4, 64)
    halves, last = tensor(1, 6, pixels // 4, 128), tensor(1, pixels // 4, 64)
    yield channels.plan_sum_halves(halves, last, tensor(64), small)
    yield channels.plan_add(tensor(6 * pixels // 4, 64), tensor(64), None, True)
    phases, out = tensor(12, 241, 417, 1, 2, 2, 96), tensor(12, 1, 480, 832, 96)
    for bias in (None, gain):
        yield channels.plan_spread_phases(phases, out, bias, False)
        yield channels.plan_spread_phases(phases, out.view(6, 480, 832, 2, 96), bias, True)


def _linear_launches(target: Target, length: int, dim: int) -> Iterator[Launch]:
    """The batch-invariant linear layers of a block, bf16, and a small one in float32."""
    for width, columns, dtype in (
        (dim, dim, torch.bfloat16),
        (dim, 6 * dim, torch.bfloat16),
        (6 * dim, dim, torch.bfloat16),
        (dim, 64, torch.float32),
        (100, 6 * dim, torch.bfloat16),
    ):
        x, weight, bias, out = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((length, width), (columns, width), (columns,), (length, columns))
        )
        tile = linear.linear_tile(target, columns, dtype.itemsize)
        yield linear.plan(x, weight, bias, out, target, tile)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile all kernels for the generations named and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("capability", nargs="+", type=int, help="80, 90, 100, ...")
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--num-splits", type=int, nargs="+", default=[1, 2])
    chosen = parser.parse_args(arguments)
    sizes = (chosen.num_heads, chosen.head_dim, chosen.num_splits)
    for capability in chosen.capability:
        for launch in real_launches(capability, *sizes):
            sys.stdout.write(json.dumps(asdict(compile_launch(launch, capability))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
