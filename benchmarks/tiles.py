"""Tile sizes of the Triton kernels: every candidate against the library, and the fastest one.

``python benchmarks/tiles.py --json out.json`` takes half a minute on a GPU, most of it compiling.
The winners are copied into the kernels' tables by hand; nothing is tuned at run time.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import report
import torch
import torch.nn.functional as F
from flashdreams_kernels import linear
from flashdreams_kernels.attention import TileConfig, new_outputs, plan, tile_config
from flashdreams_kernels.launch import target_of
from torch import Tensor

from flashdreams.attention.backends import (
    BACKENDS,
    AttentionBackend,
    bind_kv_splits,
    usable_backends,
)
from flashdreams.attention.choose import ERROR_BOUNDS, AttentionShape, kv_splits_of
from flashdreams.runtime.stats import sha256_of

COLUMNS = ("case", "variant", "p50_ms", "p99_ms", "tflops", "error", "verdict")
COMPARED = 256
"""Number of rows or queries that are compared with float32 and hashed."""

ATTENTION = (
    TileConfig(128, 128, 8, 2),
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 128, 8, 2, descriptors=True),
    TileConfig(128, 128, 8, 3, descriptors=True),
    TileConfig(128, 64, 8, 3, descriptors=True),
    TileConfig(128, 64, 8, 2, 2, descriptors=True, max_registers=128),
    TileConfig(128, 32, 8, 3, 2, descriptors=True, max_registers=128),
    TileConfig(64, 128, 4, 2, descriptors=True),
    TileConfig(64, 64, 4, 2, 2, descriptors=True),
)
"""Candidates for ``flashdreams_kernels.attention.TILES``."""
LINEAR = (
    linear.LinearTile(128, 128, 64, 8, 3),
    linear.LinearTile(128, 128, 32, 4, 4),
    linear.LinearTile(128, 128, 64, 8, 3, descriptors=True),
    linear.LinearTile(128, 128, 64, 4, 3, descriptors=True),
    linear.LinearTile(128, 128, 64, 8, 4, descriptors=True, persistent=True),
    linear.LinearTile(128, 128, 128, 8, 2, descriptors=True, persistent=True),
    linear.LinearTile(128, 256, 64, 8, 3, descriptors=True),
    linear.LinearTile(128, 256, 64, 8, 4, descriptors=True),
    linear.LinearTile(128, 256, 64, 8, 3, descriptors=True, persistent=True),
    linear.LinearTile(64, 256, 64, 4, 2, descriptors=True),
    linear.LinearTile(256, 128, 64, 8, 3, descriptors=True, persistent=True),
)
"""Candidates for ``flashdreams_kernels.linear.LINEAR_TILES``."""


@dataclass(frozen=True)
class Sizes:
    """One chunk of one model."""

    length: int
    windows: tuple[int, ...]
    """Keys of attention."""
    num_heads: int
    head_dim: int
    layers: tuple[tuple[int, int], ...]
    """Input and output features."""


PRESETS = {
    "tiny": Sizes(48, (96,), 2, 32, ((64, 128),)),
    "wan-1.3b": Sizes(
        4680, (14040, 32760), 12, 128, ((1536, 1536), (1536, 4608), (1536, 8960), (8960, 1536))
    ),
    "wan-14b": Sizes(
        4680, (14040, 32760), 40, 128, ((5120, 5120), (5120, 15360), (5120, 13824), (13824, 5120))
    ),
}


@dataclass(frozen=True)
class Case:
    """One call, with the library and with every candidate."""

    name: str
    flops: int
    expected: Tensor
    """The first rows of the result, from float32."""
    library: Mapping[str, Callable[[], Tensor]]
    candidates: Mapping[str, Callable[[], Tensor]]
    current: str
    """The candidate in the kernel's table."""


def attention_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Attention of a chunk over each window."""
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        shape = (1, tokens, sizes.num_heads, sizes.head_dim)
        return torch.randn(shape, generator=generator).to(device, dtype)

    names = [n for n in usable_backends(device, dtype, sizes.head_dim) if n not in EXCLUDED]
    for keys in sizes.windows:
        q, k, v = normal(sizes.length), normal(keys), normal(keys)
        scale = sizes.head_dim**-0.5
        expected = BACKENDS["sdpa_math"](q[:, :COMPARED].float(), k.float(), v.float(), scale=scale)

        on_gpu = device.type == "cuda"
        yield Case(
            f"attention {sizes.length} x {keys}",
            4 * sizes.length * keys * sizes.num_heads * sizes.head_dim,
            expected[0],
            {n: partial(_bound(n, q, k), q, k, v, scale=scale) for n in names},
            {str(c): partial(with_tiles, c, q, k, v, scale=scale) for c in ATTENTION if on_gpu},
            str(tile_config(target_of(device), sizes.head_dim, 2)) if on_gpu else "",
        )


def with_tiles(config: TileConfig, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The Triton kernel with one configuration, regardless of its table."""
    out, lse = new_outputs(q, False)
    for launch in plan(q, k, v, None, scale, out, lse, 0, target_of(q.device), config):
        launch.run()
    return out


def _bound(name: str, q: Tensor, k: Tensor) -> AttentionBackend:
    """A backend with the KV splits of set-up."""
    batch, queries, heads, head_dim = q.shape
    shape = AttentionShape(
        batch_size=batch, queries=queries, keys=k.shape[1], num_heads=heads, head_dim=head_dim
    )
    return bind_kv_splits(name, kv_splits_of(name, shape, q.device) or 1)


EXCLUDED = ("triton", "sdpa", "sdpa_math", "sdpa_efficient")
"""Backends without comparison value: our own, duplicates of others, and slow ones."""


def linear_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The linear layers of a block."""
    generator = torch.Generator().manual_seed(0)
    on_gpu = device.type == "cuda"
    for width, columns in sizes.layers:
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(device, dtype) / factor
            for shape, factor in (
                ((sizes.length, width), 1),
                ((columns, width), width**0.5),
                ((columns,), 1),
            )
        )

        yield Case(
            f"linear {width} -> {columns}",
            2 * sizes.length * width * columns,
            F.linear(x[:COMPARED].float(), weight.float(), bias.float()),
            {"library": partial(F.linear, x, weight, bias)},
            {str(c): partial(multiply, c, x, weight, bias) for c in LINEAR if on_gpu},
            str(linear.linear_tile(target_of(device), columns, 2)) if on_gpu else "",
        )


def multiply(tile: linear.LinearTile, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The batch-invariant linear layer with one tile, regardless of its table."""
    out = x.new_empty(len(x), len(weight))
    linear.plan(x, weight, bias, out, target_of(x.device), tile).run()
    return out


def measure(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per variant; for those that cannot run the reason is printed to stderr."""
    rows = []
    for name, call in {**case.library, **case.candidates}.items():
        try:
            out = call()
            times = report.time_calls(call, device, repeats)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            sys.stderr.write(f"{case.name}, {name}: cannot be used here: {reason}\n")
            continue
        timing = report.timing_fields(times)
        first = out.reshape(-1, *case.expected.shape[1:])[: len(case.expected)]
        difference = (first.float() - case.expected).abs().max() / case.expected.abs().max()
        rows.append(
            {
                "case": case.name,
                "variant": name,
                **timing,
                "tflops": case.flops / timing["p50_ms"] / 1e9,
                "error": difference.item(),
                "output_sha256": sha256_of(first),
                "verdict": "in the table" if name == case.current else "",
            }
        )
    ours = [
        row
        for row in rows
        if row["variant"] in case.candidates and row["error"] < ERROR_BOUNDS[torch.bfloat16]
    ]
    if ours:
        best = min(ours, key=lambda row: row["p50_ms"])
        best["verdict"] = " and ".join(filter(None, ["wins", best["verdict"]]))
    return rows


def measure_all(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """The rows of all cases."""
    for build in (attention_cases, linear_cases):
        for case in build(sizes, dtype, device):
            yield from measure(case, device, repeats)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    command.run_over_sizes(
        "tiles",
        __doc__,
        arguments,
        presets=PRESETS,
        gpu_repeats=30,
        measure=measure_all,
        columns=COLUMNS,
    )


if __name__ == "__main__":
    command.run(main)
