"""Speed of the streaming decoders: the Wan autoencoder, one latent frame or a chunk at a time, and
TAEHV.

Random weights; the time does not depend on them. The sizes below take about a minute on a CPU; the
published size is ``--dim 96 --taehv-width 64 --latent-height 60 --latent-width 104``.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dim", type=int, default=32, help="channels of the Wan autoencoder")
    parser.add_argument("--taehv-width", type=int, default=32, help="finest channels of TAEHV")
    parser.add_argument("--latent-height", type=int, default=12)
    parser.add_argument("--latent-width", type=int, default=20)
    parser.add_argument("--len-t", type=int, default=3, help="latent frames of a chunk")
    parser.add_argument("--chunks", type=int, default=4, help="timed chunks, after two warm ones")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    return parser.parse_args(argv)


def build_decoders(args: argparse.Namespace) -> dict[str, Any]:
    """Decoders by label; the two of one kind have equal weights."""
    width = args.taehv_width
    wan = {"dim": args.dim, "dtype": args.dtype}
    tiny = {"channels": (4 * width, 2 * width, width, width), "dtype": args.dtype}
    configs = {
        "wan-vae, 1 frame at once": WanVAEDecoderConfig(decode_frames_at_once=1, **wan),
        "wan-vae, chunk at once": WanVAEDecoderConfig(decode_frames_at_once=None, **wan),
        "taehv, 1 frame at once": TAEHVDecoderConfig(decode_frames_at_once=1, **tiny),
        "taehv, chunk at once": TAEHVDecoderConfig(decode_frames_at_once=None, **tiny),
    }
    decoders = {}
    for label, config in configs.items():
        torch.manual_seed(0)
        decoders[label] = config.setup().to(args.device)
    return decoders


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode the same latents with every decoder, taking turns chunk by chunk.

    Returns:
        One record per decoder: milliseconds per chunk after warm-up, frames per second, bytes of
        carried state, and the largest difference to the same decoder one frame at a time.
    """
    decoders = build_decoders(args)
    size = (args.len_t, args.latent_height, args.latent_width)
    generator = torch.Generator().manual_seed(1)
    chunks = [torch.randn(1, 16, *size, generator=generator) for _ in range(args.chunks + 2)]
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else _nothing
    caches = {label: decoder.initialize_cache() for label, decoder in decoders.items()}
    times: dict[str, list[float]] = {label: [] for label in decoders}
    errors = dict.fromkeys(decoders, 0.0)
    frames = 0
    for index, chunk in enumerate(chunks):
        reference: Tensor | None = None
        for label, decoder in decoders.items():
            latent = chunk.to(args.device)
            synchronize()
            start = time.perf_counter()
            video = decoder(latent, index, caches[label])
            synchronize()
            times[label].append(1e3 * (time.perf_counter() - start))
            frames = video.shape[1]
            if "1 frame" in label:
                reference = video
            elif reference is not None:
                errors[label] = max(errors[label], (video - reference).abs().max().item())
    return [
        {
            "decoder": label,
            "ms_per_chunk": statistics.median(times[label][2:]),
            "ms_per_chunk_min": min(times[label][2:]),
            "fps": 1e3 * frames / statistics.median(times[label][2:]),
            "carried_bytes": caches[label].num_bytes(),
            "max_difference": errors[label],
        }
        for label in decoders
    ]


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "dim": args.dim,
        "taehv_width": args.taehv_width,
        "frame": [8 * args.latent_height, 8 * args.latent_width],
        "len_t": args.len_t,
    }


def print_table(machine: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Print the figures for people."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'decoder':<26}{'ms/chunk':>10}{'min':>10}{'fps':>9}{'state MiB':>11}{'max diff':>10}")
    for record in records:
        print(
            f"{record['decoder']:<26}{record['ms_per_chunk']:>10.1f}"
            f"{record['ms_per_chunk_min']:>10.1f}{record['fps']:>9.1f}"
            f"{record['carried_bytes'] / 2**20:>11.1f}{record['max_difference']:>10.1e}"
        )


def main(argv: list[str] | None = None) -> None:
    """Measure and report."""
    args = parse_arguments(argv)
    if args.chunks < 1 or args.len_t < 1:
        raise SystemExit(f"--chunks {args.chunks} and --len-t {args.len_t} must be at least 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    machine, records = describe_machine(args), measure(args)
    print_table(machine, records)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")


def _nothing() -> None:
    """What a device without queues has to wait for."""


if __name__ == "__main__":
    main()
