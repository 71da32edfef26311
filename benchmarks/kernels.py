"""Every fused kernel against its unfused form, and FP8 matmuls against the network's dtype.

``python benchmarks/kernels.py --json out.json`` measures a chunk of the 1.3B model at 480x832 on a
GPU; on a CPU it runs the PyTorch references at a tiny size. What fails is left out, with the reason
on stderr.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import report
import torch
import torch.nn.functional as F
from flashdreams_kernels import adaln, fp8_rows, linear, reference, rope_qknorm
from tiles import multiply
from torch import Tensor, nn

from flashdreams.models.wan.fp8_linear import FP8Linear, quantize_rows
from flashdreams.runtime.stats import sha256_of

EPS = 1e-6
COLUMNS = (
    "case", "variant", "p50_ms", "p95_ms", "p99_ms", "gib_per_s", "tflops", "error", "speedup",
)  # fmt: skip
LINGBOT_DIM, LINGBOT_FFN_DIM = 5120, 13824
"""Widths of LingBot-World 14B."""
PROJECTION_TILES = (
    linear.LinearTile(64, 256, 64, 4, 2, descriptors=True),
    linear.LinearTile(256, 128, 64, 8, 3, descriptors=True, persistent=True),
)
"""Of the batch-invariant linear layer, for output projections."""


@dataclass(frozen=True)
class Sizes:
    """One chunk of one model."""

    length: int
    slots: int
    num_heads: int
    head_dim: int
    ffn_dim: int

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Case:
    """One kernel: two computations of the same result, and the bytes that it must move.

    If a result is two tensors (values and scales), their product is compared.
    """

    name: str
    unfused: Callable[[], Any]
    fused: Callable[[], Any]
    nbytes: int
    flops: int = 0


PRESETS = {
    "tiny": Sizes(length=48, slots=96, num_heads=2, head_dim=32, ffn_dim=96),
    "wan-1.3b": Sizes(length=4680, slots=32760, num_heads=12, head_dim=128, ffn_dim=8960),
    "wan-14b": Sizes(length=4680, slots=32760, num_heads=40, head_dim=128, ffn_dim=13824),
}


def build_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """All kernels on random inputs of one size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = (sizes.num_heads, sizes.head_dim)
    q, k, v = (normal(1, sizes.length, *heads) for _ in range(3))
    x, y = normal(1, sizes.length, sizes.dim), normal(1, sizes.length, sizes.dim)
    weights = normal(sizes.dim), normal(sizes.dim)
    angles = normal(sizes.length, sizes.head_dim // 2, dtype=torch.float32)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    vectors = normal(1, 1, 6, sizes.dim, dtype=torch.float32).unbind(2)
    k_cache = torch.zeros(1, sizes.slots, *heads, dtype=dtype, device=device)
    caches = (k_cache, torch.zeros_like(k_cache))
    slots = torch.arange(sizes.length, device=device).roll(sizes.length // 3)
    chunk_bytes = q.numel() * q.element_size()

    norm = (q, k, *weights, table, EPS)

    def norm_rope_write_unfused() -> Tensor:
        turned, keys = reference.qk_norm_rope(*norm)
        write_unfused(keys, v, *caches, slots)
        return turned

    full = (q, k, v, *weights, table, EPS, *caches, slots)
    modulation = (x, vectors[0], vectors[1], EPS)
    return [
        Case(
            "qk_norm_rope",
            lambda: torch.stack(reference.qk_norm_rope(*norm)),
            lambda: torch.stack(rope_qknorm.qk_norm_rope(*norm)),
            4 * chunk_bytes + table.nbytes,
        ),
        Case(
            "qk_norm_rope_write",
            norm_rope_write_unfused,
            lambda: rope_qknorm.qk_norm_rope_write(*full),
            6 * chunk_bytes + table.nbytes,
        ),
        Case(
            "layer_norm_modulate",
            lambda: reference.layer_norm_modulate(*modulation),
            lambda: adaln.layer_norm_modulate(*modulation),
            2 * chunk_bytes,
        ),
        Case(
            "gate_residual",
            lambda: reference.gate_residual(x, y, vectors[2]),
            lambda: adaln.gate_residual(x, y, vectors[2]),
            3 * chunk_bytes,
        ),
        *residual_cases(x, y, vectors, normal(*x.shape), normal(*x.shape)),
        *fp8_cases(sizes, dtype, device),
    ]


def fp8_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """FP8 matmuls of a block and the kernels before them, for this model and LingBot-World 14B.

    A matmul in ``dtype`` is compared with one in FP8 whose input is already quantized.
    """
    widths = {sizes.dim: sizes.ffn_dim}
    if device.type == "cuda":
        widths[LINGBOT_DIM] = LINGBOT_FFN_DIM
    torch.manual_seed(0)
    cases = []
    for dim, ffn_dim in widths.items():
        x = torch.randn(1, sizes.length, dim, device=device)
        hidden = torch.randn(1, sizes.length, ffn_dim, device=device).to(dtype)
        row = torch.randn(1, 1, dim, device=device)
        modulation = (x, row, row, EPS)
        cases += [
            Case(
                f"layer_norm_quantize of float32, {dim}",
                partial(reference.layer_norm_quantize, *modulation),
                partial(fp8_rows.layer_norm_quantize, *modulation),
                5 * x.numel(),
            ),
            Case(
                f"gelu_quantize, {ffn_dim}",
                partial(reference.gelu_quantize, hidden),
                partial(fp8_rows.gelu_quantize, hidden),
                hidden.nbytes + hidden.numel(),
            ),
        ]
        for inputs, outputs in ((dim, 3 * dim), (dim, dim), (dim, ffn_dim), (ffn_dim, dim)):
            layer = nn.Linear(inputs, outputs, device=device, dtype=dtype)
            y = (x if inputs == dim else hidden).to(dtype)
            cases.append(
                Case(
                    f"linear, {inputs} to {outputs}",
                    partial(layer, y),
                    partial(FP8Linear(layer), quantize_rows(y)),
                    y.numel() + inputs * outputs + 2 * sizes.length * outputs,
                    2 * sizes.length * inputs * outputs,
                )
            )
        cases += projection_cases(x.to(dtype), dim)
    return cases


def projection_cases(x: Tensor, dim: int) -> list[Case]:
    """Output projections of attention, ``[B, L, dim]`` to the same, other than by ``F.linear``."""
    weight = torch.randn(dim, dim, device=x.device).to(x.dtype) / dim**0.5
    bias = torch.zeros(dim, device=x.device, dtype=x.dtype)
    others: dict[str, Callable[[], Tensor]] = {"without bias": partial(F.linear, x, weight)}
    for tile in PROJECTION_TILES:
        name = f"tiles of {tile.block_m}x{tile.block_n}"
        others[name] = partial(multiply, tile, x[0], weight, bias)
    nbytes, flops = 2 * x.nbytes + weight.nbytes, 2 * x.numel() * dim
    library = partial(F.linear, x, weight, bias)
    return [
        Case(f"projection, {dim}, {name}", library, call, nbytes, flops)
        for name, call in others.items()
    ]


def residual_cases(
    x: Tensor, y: Tensor, vectors: tuple[Tensor, ...], scale: Tensor, shift: Tensor
) -> list[Case]:
    """Kernels after a branch, with a float32 residual and 16-bit branches.

    Args:
        x: ``[B, L, dim]``; its float32 copy is the residual.
        y: ``[B, L, dim]``, the branch.
        vectors: ``[1, 1, dim]`` each, float32: gate, weight and bias are the third to fifth.
        scale: ``[B, L, dim]``; LingBot-World's camera scales the sum with it.
        shift: like ``scale``.
    """
    wide, gate = x.float(), vectors[2]
    rows = vectors[3][0, 0], vectors[4][0, 0]
    dim = x.shape[-1:]
    return [
        Case(
            "gate_residual, scaled and shifted",
            lambda: torch.addcmul(shift, torch.addcmul(wide, y, gate), scale),
            lambda: adaln.gate_residual(wide, y, gate, scale, shift),
            2 * wide.nbytes + 3 * y.nbytes,
        ),
        Case(
            "branch added to float32",
            lambda: wide + y,
            lambda: adaln.gate_residual(wide, y),
            2 * wide.nbytes + y.nbytes,
        ),
        Case(
            "layer_norm_affine of float32",
            lambda: F.layer_norm(wide, dim, *rows, EPS).to(y.dtype),
            lambda: adaln.layer_norm_affine(wide, *rows, EPS, y.dtype),
            wide.nbytes + y.nbytes,
        ),
    ]


def write_unfused(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """The engine's operations without the kernel; the reference synchronizes to drop slots."""
    k_cache.index_copy_(1, slots, k)
    v_cache.index_copy_(1, slots, v)


def measure(case: Case, device: torch.device, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """One row for each computation that runs here; for the others the reason is printed."""
    variants = {"unfused": case.unfused}
    if device.type == "cuda":
        variants["fused"] = case.fused
    if compiled:
        variants["compiled"] = torch.compile(case.unfused)
    expected: Tensor | None = None
    rows: list[dict[str, Any]] = []
    for name, function in variants.items():
        try:
            result = whole(function()).clone()
            expected = result if expected is None else expected
            result = result.view_as(expected)
            timing = report.timing_fields(report.time_calls(function, device, repeats))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            sys.stderr.write(f"{case.name}, {name}: cannot be used here: {reason}\n")
            if not rows:
                break  # there is nothing to compare with
            continue
        difference = (result.float() - expected.float()).abs().max()
        rows.append(
            {
                "case": case.name,
                "variant": name,
                **timing,
                **({"tflops": case.flops / 1e9 / timing["p50_ms"]} if case.flops else {}),
                "gib_per_s": case.nbytes / 2**30 / timing["p50_ms"] * 1e3,
                "error": (difference / expected.float().abs().max()).item(),
                "output_sha256": sha256_of(result),
                "speedup": (rows[0] if rows else timing)["p50_ms"] / timing["p50_ms"],
            }
        )
    return rows


def whole(result: Any) -> Tensor:
    """A result as one tensor."""
    return result if isinstance(result, Tensor) else result[0].float() * result[1]


def measure_all(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, repeats: int, compiled: bool
) -> Iterator[dict[str, Any]]:
    """The rows of all kernels at one size."""
    for case in build_cases(sizes, dtype, device):
        yield from measure(case, device, repeats, compiled)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    command.run_over_sizes(
        "kernels",
        __doc__,
        arguments,
        presets=PRESETS,
        gpu_repeats=200,
        switch=("compile", "also the unfused form, compiled"),
        measure=measure_all,
        columns=COLUMNS,
    )


if __name__ == "__main__":
    command.run(main)
