"""Data type and threads of a transformer on a CPU.

``python benchmarks/cpu.py --json out.json``. Denoising steps of Wan transformers of a few widths,
with a full window and random weights, in turn: every variant makes call i before any makes call
i + 1. Ratios are medians over these pairs, to float32 on one thread. Wall time, since threads are
what is looked at: other work on the machine counts, and slows two threads more than one.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import command
import report
import torch
from torch import Tensor

from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.runtime.stats import sha256_of

COLUMNS = ("case", "variant", "repeats", "p50_ms", "p95_ms", "ratio")
FIELDS = ("ratio", "ratio_quartiles", "tokens")
DTYPES = ("float32", "bfloat16")
CHUNKS = 6
"""Chunks in the window."""
TEXT_LEN, TEXT_DIM = 32, 64


class Size(NamedTuple):
    """A transformer and its chunk."""

    dim: int
    num_layers: int
    len_t: int
    latent_height: int
    latent_width: int

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.len_t * self.latent_height * self.latent_width // 4


SIZES = {
    "dim 192, 16 tokens": Size(192, 6, 1, 8, 8),
    "dim 384, 192 tokens": Size(384, 4, 3, 16, 16),
    "dim 768, 1536 tokens": Size(768, 2, 3, 32, 64),
}


def build_call(size: Size, dtype: str) -> Callable[[], Tensor]:
    """One denoising step with a full window."""
    config = WanTransformerConfig(
        dim=size.dim, ffn_dim=4 * size.dim, num_heads=size.dim // 64, num_layers=size.num_layers,
        len_t=size.len_t, latent_height=size.latent_height, latent_width=size.latent_width,
        window_size_t=CHUNKS * size.len_t, text_len=TEXT_LEN, text_dim=TEXT_DIM, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WanTransformer(config).cast().requires_grad_(False).eval()
    cache = model.initialize_cache(text=torch.randn(1, TEXT_LEN, TEXT_DIM))
    latent = torch.randn(model.latent_shape(1))
    for index in range(CHUNKS):
        model.begin_step(index, cache)
        model.update_cache(latent, torch.tensor(0.0), cache)
    model.begin_step(CHUNKS, cache)
    return lambda: model.predict_flow(latent, torch.tensor(500.0), cache)


def measure(case: str, size: Size, threads: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row per data type and number of threads."""
    calls = {dtype: build_call(size, dtype) for dtype in DTYPES}
    variants = [(dtype, count) for count in threads for dtype in DTYPES]
    times: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    outputs: dict[tuple[str, int], Tensor] = {}
    for number in range(2 + repeats):
        for variant in variants if number % 2 else variants[::-1]:
            torch.set_num_threads(variant[1])
            start = time.perf_counter()
            outputs[variant] = calls[variant[0]]()
            if number >= 2:
                times[variant].append(1e3 * (time.perf_counter() - start))
    rows = []
    for variant in variants:
        rows.append(
            {
                "case": case,
                "variant": f"{variant[0]}, {variant[1]} thread{'s' * (variant[1] > 1)}",
                **report.timing_fields(sorted(times[variant])),
                "output_sha256": sha256_of(outputs[variant]),
                **report.ratio_fields(times[variant], times[variants[0]]),
                "tokens": size.tokens,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--threads", type=command.count, nargs="+", default=[1, 2], help="to be compared"
    )
    options = command.parse(parser, arguments)
    repeats = options.repeats or 15
    with torch.no_grad():
        rows = [
            row
            for case in options.cases
            for row in measure(case, SIZES[case], options.threads, repeats)
        ]
    config = {"sizes": SIZES, "threads": options.threads, "repeats": repeats}
    found = report.new_report(
        "cpu", torch.device("cpu"), config, rows, options.git_commit, row_fields=FIELDS
    )
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
