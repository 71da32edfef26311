"""Speed of the streaming decoders, the Wan autoencoder and TAEHV, by chunk and by frame.

The decoders take turns chunk by chunk on the same latents; the two of one kind have equal random
weights, so their frames must be the same but for rounding; ``max_difference`` is a share of the
largest value. Their ratio is the median over chunks of the time of a chunk at once to that of one
latent frame at a time. On a CPU the seconds are those of the processor.

``python benchmarks/decode.py --json out.json`` takes about a minute on a CPU; the published size is
``--dim 96 --taehv-width 64 --latent-height 60 --latent-width 104``.
"""

import argparse
from typing import Any

import command
import report
import rollout
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.parallel.environment import init
from flashdreams.runtime.stats import sha256_of

COLUMNS = (
    "case", "variant", "p50_ms", "p95_ms", "p99_ms", "ratio", "fps", "state_bytes",
    "max_difference",
)  # fmt: skip
FIELDS = ("ratio", "ratio_quartiles", "fps", "state_bytes", "max_difference", "difference_bound")
DIFFERENCE_BOUNDS = {"float32": 1e-2, "bfloat16": 1e-1, "float16": 1e-1}
"""Of frames, as a share of the largest value; in float32 with room for TF32 on a GPU."""
FRAMEWISE, AT_ONCE = "one frame at a time", "chunk at once"
WARM_CHUNKS = 2
"""Before the timed ones; the very first has fewer frames than all others."""


def build_decoders(
    options: argparse.Namespace, device: torch.device
) -> dict[tuple[str, str], StreamingDecoder]:
    """Decoders by case and variant."""
    width = options.taehv_width
    channels = (4 * width, 2 * width, width, width)
    frame = f"frames of {8 * options.latent_height}x{8 * options.latent_width}"
    configs = {
        f"Wan autoencoder, {frame}": WanVAEDecoderConfig(dim=options.dim, dtype=options.dtype),
        f"TAEHV, {frame}": TAEHVDecoderConfig(channels=channels, dtype=options.dtype),
    }
    decoders = {}
    for case, config in configs.items():
        for variant, frames in ((FRAMEWISE, 1), (AT_ONCE, None)):
            torch.manual_seed(0)
            chosen = derive_config(config, decode_frames_at_once=frames)
            decoders[case, variant] = chosen.setup().to(device)
    return decoders


def measure(
    decoders: dict[tuple[str, str], StreamingDecoder],
    chunks: list[Tensor],
    device: torch.device,
    difference_bound: float,
) -> list[dict[str, Any]]:
    """One row per decoder.

    Args:
        decoders: by case and variant.
        chunks: latents ``[1, 16, T, H, W]``; the first :data:`WARM_CHUNKS` are not timed.
        device: of the decoders.
        difference_bound: largest difference of two decoders of one kind.

    Raises:
        RuntimeError: two decoders of one kind do not put out the same frames.
    """
    caches: dict[Any, Any] = {key: d.initialize_cache() for key, d in decoders.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in decoders}
    differences = dict.fromkeys(decoders, 0.0)
    videos: dict[tuple[str, str], Tensor] = {}
    for index, chunk in enumerate(chunks):
        latent = chunk.to(device)
        for key in list(decoders) if index % 2 else list(decoders)[::-1]:
            start = rollout.clock_s(device)
            videos[key] = decoders[key](latent, index, caches[key])
            elapsed_ms = 1e3 * (rollout.clock_s(device) - start)
            if index >= WARM_CHUNKS:
                times[key].append(elapsed_ms)
        for key in decoders:
            framewise = videos[key[0], FRAMEWISE]
            apart = (videos[key] - framewise).abs().max() / framewise.abs().max()
            differences[key] = max(differences[key], apart.item())
    rows = []
    for key in decoders:
        case, variant = key
        report.refuse_difference(f"{case}, {variant}", differences[key], difference_bound)
        timing = report.timing_fields(sorted(times[key]))
        rows.append(
            {
                "case": case,
                "variant": variant,
                **timing,
                "output_sha256": sha256_of(videos[key]),
                **report.ratio_fields(times[key], times[case, FRAMEWISE]),
                "fps": 1e3 * videos[key].shape[1] / timing["p50_ms"],
                "state_bytes": caches[key].num_bytes(),
                "max_difference": differences[key],
                "difference_bound": difference_bound,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--dim", type=command.count, default=32, help="channels of the Wan autoencoder"
    )
    parser.add_argument(
        "--taehv-width", type=command.count, default=32, help="finest channels of TAEHV"
    )
    parser.add_argument("--latent-height", type=command.count, default=12)
    parser.add_argument("--latent-width", type=command.count, default=20)
    parser.add_argument("--len-t", type=command.count, default=3, help="latent frames of a chunk")
    parser.add_argument("--dtype", default="float32", choices=list(DIFFERENCE_BOUNDS))
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads")
    options = command.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    device = init(options.device).device
    repeats = options.repeats or 20
    size = (1, 16, options.len_t, options.latent_height, options.latent_width)
    generator = torch.Generator().manual_seed(1)
    chunks = [torch.randn(size, generator=generator) for _ in range(WARM_CHUNKS + repeats)]
    with torch.no_grad():
        decoders = build_decoders(options, device)
        rows = measure(decoders, chunks, device, DIFFERENCE_BOUNDS[options.dtype])
    config = {
        "dim": options.dim,
        "taehv_width": options.taehv_width,
        "frame": [8 * options.latent_height, 8 * options.latent_width],
        "len_t": options.len_t,
        "dtype": options.dtype,
        "repeats": repeats,
    }
    found = report.new_report("decode", device, config, rows, options.git_commit, FIELDS)
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
