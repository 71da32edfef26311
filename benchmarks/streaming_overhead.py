"""Cost of a streaming AR step against bare ``diffusers`` blocks at the same size.

Both sides run in one process, in turns, in float32 on the CPU. The streaming side is a whole AR
step of `StreamInferencePipeline`: noise, embedding, four denoising passes and the clean pass over
a full window. The other side calls ``WanTransformerBlock`` alone, as often, on the same tokens.
The two do not do quite the same work: streaming embeds and unpatches, and projects the prompt once
per rollout. So their floating point operations are counted, and what is compared is time per
operation::

    ratio = (streaming seconds / streaming FLOPs) / (bare seconds / bare FLOPs)

A window of one chunk makes attention the same on both sides; a longer one lets streaming attend to
more keys, at the rate of attention. Seconds are those of the processor, so that other work on the
machine does not count.

Type ``python benchmarks/streaming_overhead.py --help`` for the sizes.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.transformer import WanTransformerConfig

PASSES = 5


def streaming_step(args: argparse.Namespace) -> Callable[[], object]:
    """A function that runs one AR step over a full window."""
    transformer = WanTransformerConfig(
        dim=args.dim,
        ffn_dim=4 * args.dim,
        num_heads=args.heads,
        num_layers=args.layers,
        freq_dim=64,
        text_dim=args.dim,
        text_len=args.text_len,
        len_t=3,
        latent_height=2 * args.rows,
        latent_width=2 * args.columns,
        window_size_t=args.window,
    )
    pipeline = StreamInferencePipelineConfig(
        name="overhead",
        diffusion_model=DiffusionModelConfig(
            transformer=transformer, scheduler=FlowMatchSchedulerConfig()
        ),
    ).setup(device="cpu")
    cache = pipeline.initialize_cache(text=torch.randn(1, args.text_len, args.dim))

    def step() -> None:
        index = cache.next_index
        pipeline.generate(autoregressive_index=index, cache=cache)
        pipeline.finalize(autoregressive_index=index, cache=cache)

    while cache.next_index * 3 < args.window:
        step()
    return step


def bare_step(args: argparse.Namespace) -> Callable[[], object]:
    """A function that runs as many passes of bare blocks over as many tokens."""
    from diffusers.models.transformers.transformer_wan import (
        WanRotaryPosEmbed,
        WanTransformerBlock,
    )

    head_dim = args.dim // args.heads
    blocks = torch.nn.ModuleList(
        WanTransformerBlock(args.dim, 4 * args.dim, args.heads, cross_attn_norm=True)
        for _ in range(args.layers)
    )
    blocks.requires_grad_(False).eval()
    tokens = torch.randn(1, 3 * args.rows * args.columns, args.dim)
    text = torch.randn(1, args.text_len, args.dim)
    time_embedding = torch.randn(1, 6, args.dim)
    latent = torch.empty(1, 16, 3, 2 * args.rows, 2 * args.columns)
    rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(latent)

    def step() -> torch.Tensor:
        for _ in range(PASSES):
            x = tokens
            for block in blocks:
                x = block(x, text, time_embedding, rope)
        return x

    return step


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Operations of attention over ``[B, N, L, D]``, which PyTorch does not count on a CPU."""
    batch, heads, queries, dim = q
    return 2 * batch * heads * queries * k[2] * (dim + v[3])


def count_flops(step: Callable[[], object]) -> int:
    """Floating point operations of one call."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={operator: attention_flops}) as counter:
        step()
    return counter.get_total_flops()


def measure(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of every call; the sides take turns, so both see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    """Measure, print a line per side and the ratio, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256, help="width of the tokens")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks")
    parser.add_argument("--rows", type=int, default=8, help="token rows of a latent frame")
    parser.add_argument("--columns", type=int, default=12, help="token columns of a latent frame")
    parser.add_argument("--window", type=int, default=3, help="latent frames of the window")
    parser.add_argument("--text-len", type=int, default=64, help="text tokens")
    parser.add_argument("--repeats", type=int, default=20, help="timed AR steps per side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        steps = {"streaming": streaming_step(args), "bare diffusers": bare_step(args)}
        flops = {name: count_flops(step) for name, step in steps.items()}
        measure(steps, 2)
        seconds = measure(steps, args.repeats)
    for name in steps:
        typical = statistics.median(seconds[name])
        print(
            f"{name:15} median {typical * 1e3:8.2f} ms  min {min(seconds[name]) * 1e3:8.2f} ms  "
            f"{flops[name] / 1e9:7.3f} GFLOP  {flops[name] / typical / 1e9:6.1f} GFLOP/s"
        )
    work = flops["streaming"] / flops["bare diffusers"]
    pairs = zip(seconds["streaming"], seconds["bare diffusers"], strict=True)
    ratios = sorted(ours / theirs / work for ours, theirs in pairs)
    ratio = statistics.median(ratios)
    quarter = len(ratios) // 4
    fastest = min(seconds["streaming"]) / min(seconds["bare diffusers"]) / work
    print(
        f"time per operation, streaming / bare: median of {len(ratios)} pairs {ratio:.3f} "
        f"(quartiles {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}), fastest {fastest:.3f}"
    )
    if args.json:
        result = {
            "command": sys.argv,
            "machine": platform.platform(),
            "torch": torch.__version__,
            "sizes": {k: v for k, v in vars(args).items() if k != "json"},
            "flops": flops,
            "seconds": seconds,
            "ratio": ratio,
            "ratio_of_fastest": fastest,
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
