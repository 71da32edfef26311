"""Speed of the streaming decoders, the Wan autoencoder and TAEHV, by chunk and by frame.

The decoders take turns chunk by chunk on the same latents. Decoders of one kind have equal random
weights, so their frames must be equal except for rounding; ``max_difference`` is relative to the
largest value. ``ratio`` is the median over chunks of the time of a chunk, relative to decoding one
latent frame at a time. Variants that fail, or whose frames differ by more than rounding, are listed
with the reason in ``not_measured``. ``conv_ms`` is the sum of the convolutions of a chunk in their
plain form, each timed alone without its bias in the faster memory layout, and ``conv_ratio`` the
time of a chunk relative to it. On a CPU, times are CPU time.

``python benchmarks/decode.py --json out.json`` takes about a minute on a CPU; the published size is
``--dim 96 --taehv-width 64 --latent-height 60 --latent-width 104 --dtype bfloat16``.
"""

import argparse
import math
import sys
from copy import deepcopy
from dataclasses import replace
from typing import Any

import command
import convolutions
import report
import rollout
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.models.decoder_forms import FAST, PLAIN, forms_for
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.parallel.environment import init
from flashdreams.runtime.stats import sha256_of

COLUMNS = (
    "case", "variant", "p50_ms", "p95_ms", "p99_ms", "ratio", "conv_ms", "conv_ratio", "fps",
    "state_bytes", "max_difference",
)  # fmt: skip
CONV_COLUMNS = (
    "case", "variant", "calls", "best_ms", "gflop", "tflops",
    *(f"{layout} ms" for layout in convolutions.LAYOUTS), convolutions.IN_PAIRS,
)  # fmt: skip
FIELDS = (
    "conv_ms",
    "conv_ratio",
    "ratio",
    "ratio_quartiles",
    "fps",
    "state_bytes",
    "max_difference",
    "difference_bound",
)
DIFFERENCE_BOUNDS = {"float32": 1e-2, "bfloat16": 1e-1, "float16": 1e-1}
"""Bound on frames, relative to the largest value; in float32 with headroom for TF32 on a GPU."""
FRAMEWISE, AT_ONCE = "one frame at a time", "chunk at once"
FAST_NAME, GRAPH = "fast", "fast, graph"
CHANGES: dict[str, dict[str, Any]] = {
    FAST_NAME: {},
    GRAPH: {},
    "fast, interpolated": {"upsampling": "interpolate"},
    "fast, PyTorch between": {"pointwise": "reference"},
    "fast, pairs of frames": {"frames": "pairs"},
    "fast, stacked memory": {"memory": "stack"},
    "fast, 3 channels out": {"head_channels": 1},
    "fast, 16 channels out": {"head_channels": 16},
}
"""Changes of the fast variants to the default forms of a GPU."""
VARIANTS = (FRAMEWISE, AT_ONCE, *CHANGES)
DEFAULT_ON_GPU = (FAST_NAME, GRAPH, "fast, pairs of frames")
WARM_CHUNKS = 2
"""Untimed chunks before the timed ones; the first chunk has fewer frames than the others."""


def build_decoders(
    options: argparse.Namespace, device: torch.device, variants: list[str]
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
        torch.manual_seed(0)
        framewise = derive_config(config, decode_frames_at_once=1).setup().to(device)
        for variant in variants:
            changes = CHANGES.get(variant, {})
            only_taehv, only_wan = variant == GRAPH or "memory" in changes, "frames" in changes
            if (only_taehv, only_wan)[case.startswith("TAEHV")]:
                continue
            decoder = deepcopy(framewise)
            if variant != FRAMEWISE:
                decoder.config = derive_config(config, decode_frames_at_once=None)
            if variant in CHANGES:
                fast = forms_for(device, decoder.dtype)
                if fast == PLAIN:  # the data flow of the fast forms, on a CPU
                    fast = replace(FAST, pointwise="reference")
                decoder.take_forms(replace(fast, **CHANGES[variant]))
            decoders[case, variant] = decoder
    return decoders


def measure_convolutions(
    decoders: dict[tuple[str, str], StreamingDecoder],
    chunk: Tensor,
    device: torch.device,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the convolutions of each case, at the shapes of a whole chunk."""
    found = {}
    for (case, variant), decoder in decoders.items():
        if variant == AT_ONCE:
            cache, latent = decoder.initialize_cache(), chunk.to(device)
            decoder(latent, 0, cache)
            calls = convolutions.record(lambda: decoder(latent, 1, cache))  # noqa: B023
            found[case] = convolutions.measure(calls, decoder.dtype, device)
    return found


def drop_unusable(
    decoders: dict[tuple[str, str], StreamingDecoder], chunks: list[Tensor], device: torch.device
) -> dict[str, str]:
    """Decode two chunks with each decoder, and remove those that fail; returns the reasons."""
    reasons = {}
    for key, decoder in list(decoders.items()):
        cache = decoder.initialize_cache()
        try:
            for index, chunk in enumerate(chunks[:2]):
                decoder(chunk.to(device), index, cache)
            if key[1] == GRAPH:
                decoder.capture(chunks[0].to(device))
        except Exception as error:
            if key[1] not in CHANGES:
                raise
            reasons[", ".join(key)] = " ".join(str(error).split())[:300]
            del decoders[key]
    return reasons


def measure(
    decoders: dict[tuple[str, str], StreamingDecoder],
    chunks: list[Tensor],
    device: torch.device,
    difference_bound: float,
    conv_ms: dict[str, float],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per decoder, and the reasons for the variants without a row.

    Args:
        decoders: by case and variant.
        chunks: latents ``[1, 16, T, H, W]``; the first :data:`WARM_CHUNKS` are not timed.
        device: device of the decoders.
        difference_bound: largest allowed difference between decoders of one kind.
        conv_ms: time of the convolutions alone, by case.

    Raises:
        RuntimeError: a chunk decoded at once has other frames than one decoded by frame.
    """
    not_measured = drop_unusable(decoders, chunks, device)
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
            apart = ((videos[key] - framewise).abs().max() / framewise.abs().max()).item()
            if math.isnan(apart) or apart > differences[key]:
                differences[key] = apart
    rows = []
    for key in decoders:
        case, variant = key
        if variant in CHANGES and not differences[key] <= difference_bound:
            not_measured[", ".join(key)] = f"frames differ by {differences[key]:.1e} of the largest"
            continue
        report.refuse_difference(f"{case}, {variant}", differences[key], difference_bound)
        timing = report.timing_fields(sorted(times[key]))
        rows.append(
            {
                "case": case,
                "variant": variant,
                **timing,
                "output_sha256": sha256_of(videos[key]),
                **report.ratio_fields(times[key], times[case, FRAMEWISE]),
                "conv_ms": conv_ms[case],
                "conv_ratio": timing["p50_ms"] / conv_ms[case],
                "fps": 1e3 * videos[key].shape[1] / timing["p50_ms"],
                "state_bytes": caches[key].num_bytes(),
                "max_difference": differences[key],
                "difference_bound": difference_bound,
            }
        )
    return rows, not_measured


def chosen_variants(asked: str | None, device: torch.device) -> list[str]:
    """Names of the variants, always including the two baselines.

    Raises:
        ValueError: an unknown name.
    """
    if asked is None:
        return [FRAMEWISE, AT_ONCE, *(DEFAULT_ON_GPU if device.type == "cuda" else [])]
    names = list(VARIANTS) if asked == "all" else [name.strip() for name in asked.split(";")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"no variant {unknown[0]!r}; there are: {'; '.join(VARIANTS)}; all.")
    return [name for name in VARIANTS if name in (FRAMEWISE, AT_ONCE, *names)]


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
    parser.add_argument(
        "--variants",
        default=None,
        help=f"names between semicolons, or all; default: by device; known: {'; '.join(VARIANTS)}",
    )
    options = command.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    device = init(options.device).device
    variants = chosen_variants(options.variants, device)
    repeats = options.repeats or 20
    size = (1, 16, options.len_t, options.latent_height, options.latent_width)
    generator = torch.Generator().manual_seed(1)
    chunks = [torch.randn(size, generator=generator) for _ in range(WARM_CHUNKS + repeats)]
    with torch.no_grad():
        decoders = build_decoders(options, device, variants)
        alone = measure_convolutions(decoders, chunks[0], device)
        conv_ms = {case: convolutions.total_ms(rows) for case, rows in alone.items()}
        bound = DIFFERENCE_BOUNDS[options.dtype]
        rows, not_measured = measure(decoders, chunks, device, bound, conv_ms)
    config = {
        "dim": options.dim,
        "taehv_width": options.taehv_width,
        "frame": [8 * options.latent_height, 8 * options.latent_width],
        "len_t": options.len_t,
        "dtype": options.dtype,
        "variants": variants,
        "repeats": repeats,
    }
    found = report.new_report("decode", device, config, rows, options.git_commit, FIELDS)
    found |= {"convolutions": alone, "not_measured": not_measured}
    for name, reason in not_measured.items():
        sys.stdout.write(f"not measured: {name}: {reason}\n")
    for case, parts in alone.items():
        sys.stdout.write(f"convolutions of {case}, alone\n{report.table(parts, CONV_COLUMNS)}\n")
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
