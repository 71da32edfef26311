"""Cost of a streaming AR step against bare ``diffusers`` blocks at the same size.

Both sides run in one process, in turns, in float32. The streaming side is a whole AR step of
`StreamInferencePipeline`: noise, embedding, four denoising passes and the clean pass over a full
window. The other side calls ``WanTransformerBlock`` alone, as often, on the same tokens. The two do
not do quite the same work: streaming embeds and unpatches, and projects the prompt once per
rollout. So their floating point operations are counted, and what is compared is time per
operation::

    ratio = (streaming seconds / streaming FLOPs) / (bare seconds / bare FLOPs)

A window of one chunk makes attention the same on both sides; a longer one lets streaming attend to
more keys, at the rate of attention. On a CPU the seconds are those of the processor, so that other
work on the machine does not count.

``python benchmarks/streaming_overhead.py --json out.json``
"""

import argparse
from collections.abc import Callable
from typing import Any

import command
import report
import rollout
import torch
from torch import Tensor

from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.parallel.environment import init
from flashdreams.runtime.stats import sha256_of

BAR = 1.05
"""Largest ratio of time per operation, streaming to bare blocks."""
COLUMNS = ("case", "variant", "p50_ms", "p95_ms", "p99_ms", "gflop", "ratio", "bar", "within_bar")
FIELDS = ("gflop", "ratio", "ratio_quartiles", "bar", "within_bar")
STREAMING, BARE = "streaming", "bare diffusers"
LEN_T, PASSES = 3, 5


def streaming_step(options: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    """A function that runs one AR step over a full window."""
    transformer = WanTransformerConfig(
        dim=options.dim,
        ffn_dim=4 * options.dim,
        num_heads=options.heads,
        num_layers=options.layers,
        freq_dim=64,
        text_dim=options.dim,
        text_len=options.text_len,
        len_t=LEN_T,
        latent_height=2 * options.rows,
        latent_width=2 * options.columns,
        window_size_t=options.window,
    )
    pipeline = StreamInferencePipelineConfig(
        name="overhead",
        diffusion_model=DiffusionModelConfig(
            transformer=transformer, scheduler=FlowMatchSchedulerConfig()
        ),
    ).setup(device=device)
    text = torch.randn(1, options.text_len, options.dim).to(device)
    cache = pipeline.initialize_cache(text=text)

    def step() -> Tensor:
        index = cache.next_index
        chunk = pipeline.generate(autoregressive_index=index, cache=cache)
        pipeline.finalize(autoregressive_index=index, cache=cache)
        return chunk

    while cache.next_index * LEN_T < options.window:
        step()
    return step


def bare_step(options: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    """A function that runs as many passes of bare blocks over as many tokens."""
    from diffusers.models.transformers.transformer_wan import (
        WanRotaryPosEmbed,
        WanTransformerBlock,
    )

    blocks = torch.nn.ModuleList(
        WanTransformerBlock(options.dim, 4 * options.dim, options.heads, cross_attn_norm=True)
        for _ in range(options.layers)
    )
    blocks.requires_grad_(False).eval().to(device)
    tokens = torch.randn(1, LEN_T * options.rows * options.columns, options.dim).to(device)
    text = torch.randn(1, options.text_len, options.dim).to(device)
    time_embedding = torch.randn(1, 6, options.dim).to(device)
    latent = torch.empty(1, 16, LEN_T, 2 * options.rows, 2 * options.columns, device=device)
    rope = WanRotaryPosEmbed(options.dim // options.heads, (1, 2, 2), 1024).to(device)(latent)

    def step() -> Tensor:
        for _ in range(PASSES):
            x = tokens
            for block in blocks:
                x = block(x, text, time_embedding, rope)
        return x

    return step


def measure(
    case: str, steps: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """One row per side, for the steps of :data:`STREAMING` and :data:`BARE`."""
    outputs = {name: step() for name, step in steps.items()}
    gflop = {name: rollout.count_flops(step) / 1e9 for name, step in steps.items()}
    times = rollout.time_in_turn(steps, device, repeats)
    ratios = {
        name: report.ratio_fields(times[name], times[BARE], gflop[BARE] / gflop[name])
        for name in steps
    }
    return [
        {
            "case": case,
            "variant": name,
            **report.timing_fields(sorted(times[name])),
            "output_sha256": sha256_of(outputs[name]),
            "gflop": gflop[name],
            **ratios[name],
            "bar": BAR,
            "within_bar": ratios[STREAMING]["ratio"] <= BAR,
        }
        for name in steps
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dim", type=command.count, default=256, help="width of the tokens")
    parser.add_argument("--heads", type=command.count, default=4, help="attention heads")
    parser.add_argument("--layers", type=command.count, default=8, help="transformer blocks")
    parser.add_argument(
        "--rows", type=command.count, default=8, help="token rows of a latent frame"
    )
    parser.add_argument(
        "--columns", type=command.count, default=12, help="token columns of a latent frame"
    )
    parser.add_argument(
        "--window", type=command.count, default=LEN_T, help="latent frames of the window"
    )
    parser.add_argument("--text-len", type=command.count, default=64, help="text tokens")
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads")
    options = command.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    device, repeats = init(options.device).device, options.repeats or 40
    sizes = ("dim", "heads", "layers", "rows", "columns", "window", "text_len")
    config = {name: getattr(options, name) for name in sizes} | {"repeats": repeats}
    case = f"AR step, {options.layers} blocks of width {options.dim}"
    torch.manual_seed(0)
    with torch.no_grad():
        steps = {STREAMING: streaming_step(options, device), BARE: bare_step(options, device)}
        rows = measure(case, steps, device, repeats)
    found = report.new_report(
        "streaming_overhead", device, config, rows, options.git_commit, FIELDS
    )
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
