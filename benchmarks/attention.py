"""All attention backends over window lengths.

``python benchmarks/attention.py --json out.json`` measures the 1.3B model at 480x832 on a GPU, one
chunk of 3 latent frames against windows of 3 to 21; on a CPU it runs a tiny size.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import report
import torch
from flashdreams_kernels import reference
from flashdreams_kernels.attention import chunk_attention
from torch import Tensor

from flashdreams.attention.backends import BACKENDS
from flashdreams.runtime.stats import sha256_of

COLUMNS = ("case", "variant", "p50_ms", "p95_ms", "p99_ms", "tflops", "error")
COMPARED_QUERIES = 256
"""Number of queries compared with the reference, which needs a score for every key."""


@dataclass(frozen=True)
class Sizes:
    """The attention of one layer."""

    tokens_per_frame: int
    len_t: int
    num_heads: int
    head_dim: int
    windows_t: tuple[int, ...]


PRESETS = {
    "tiny": Sizes(24, 3, 2, 32, (3, 6, 12)),
    "wan-1.3b": Sizes(1560, 3, 12, 128, (3, 6, 9, 12, 15, 18, 21)),
    "wan-14b": Sizes(1560, 3, 40, 128, (3, 9, 21)),
    "wan-1.3b-8-ranks": Sizes(1560, 3, 3, 128, (3, 9, 21)),
}


def variants(device: torch.device) -> dict[str, Callable[..., Any]]:
    """Backends by name; on CUDA also the Triton kernel with other numbers of KV splits."""
    found: dict[str, Callable[..., Any]] = dict(BACKENDS)
    if device.type == "cuda":
        found["triton, 1 split"] = partial(chunk_attention, num_splits=1)
        found["triton, 4 splits"] = partial(chunk_attention, num_splits=4)
    return found


def measure(
    sizes: Sizes,
    window_t: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row per usable backend; for the others the reason is printed."""
    length, keys = sizes.len_t * sizes.tokens_per_frame, window_t * sizes.tokens_per_frame
    generator = torch.Generator().manual_seed(window_t)

    def normal(tokens: int) -> Tensor:
        shape = (1, tokens, sizes.num_heads, sizes.head_dim)
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = normal(length), normal(keys), normal(keys)
    scale = sizes.head_dim**-0.5
    expected, _ = reference.chunk_attention(q[:, :COMPARED_QUERIES], k, v, scale=scale)
    flops = 4 * length * keys * sizes.num_heads * sizes.head_dim
    rows = []
    for name, backend in variants(device).items():
        call = partial(backend, q, k, v, scale=scale)
        try:
            out = call()
        except Exception as error:
            sys.stderr.write(f"{name} cannot be used here: {error}\n")
            continue
        timing = report.timing_fields(report.time_calls(call, device, repeats))
        difference = (out[:, :COMPARED_QUERIES].float() - expected.float()).abs().max()
        rows.append(
            {
                "case": f"{window_t} frames",
                "variant": name,
                **timing,
                "tflops": flops / timing["p50_ms"] / 1e9,
                "error": (difference / expected.float().abs().max()).item(),
                "output_sha256": sha256_of(out),
                "queries": length,
                "keys": keys,
            }
        )
    return rows


def measure_windows(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """The rows of all window lengths of a preset."""
    for window_t in sizes.windows_t:
        yield from measure(sizes, window_t, dtype, device, repeats)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    command.run_over_sizes(
        "attention",
        __doc__,
        arguments,
        presets=PRESETS,
        gpu_repeats=50,
        measure=measure_windows,
        columns=COLUMNS,
    )


if __name__ == "__main__":
    command.run(main)
