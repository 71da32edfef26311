"""The same weights through this package and through ``diffusers``, pair by pair.

Two pairs, each timed in turns in one process, with one set of random weights, converted from
``WanTransformer3DModel`` with the key map of public checkpoints:

- one denoising step of a bidirectional model over one clip; the outputs must agree;
- one AR step of a stream. This package runs denoising and the clean pass against cached keys and
  values; the public package has no cache, so all visible frames are recomputed at every denoising
  step. The outputs are not comparable: recomputing lets past frames see later ones.

``python benchmarks/peers.py --json out.json``
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import command
import report
import rollout
import torch
from cheap_weights import cheap_weights
from torch import Tensor

from flashdreams.infra.component import DTypeName
from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel.environment import init
from flashdreams.runtime.checkpoint import CheckpointConfig
from flashdreams.runtime.stats import sha256_of

COLUMNS = ("case", "variant", "p50_ms", "p95_ms", "p99_ms", "gflop", "ratio", "max_difference")
FIELDS = ("ratio", "ratio_quartiles", "gflop", "max_difference", "difference_bound")
STEP_TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
DIFFERENCE_BOUNDS = {"float32": 1e-3, "bfloat16": 1e-1}
"""For a bidirectional step's output, relative to its largest value."""
PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(
        dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, text_len=12,
        latent_height=4, latent_width=6, window_size_t=6,
    ),
    "small": dict(
        dim=256, ffn_dim=1024, num_heads=4, num_layers=6, text_dim=256, text_len=64,
        latent_height=16, latent_width=24, window_size_t=12,
    ),
    "wan-1.3b": dict(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096, text_len=512,
        latent_height=60, latent_width=104, window_size_t=21,
    ),
}  # fmt: skip


def build_peer(sizes: dict[str, int]) -> Any:
    """The public package's transformer, with random weights."""
    from diffusers import WanTransformer3DModel

    with cheap_weights(torch.device("cpu")):
        peer: Any = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=sizes["num_heads"],
            attention_head_dim=sizes["dim"] // sizes["num_heads"],
            in_channels=16,
            out_channels=16,
            text_dim=sizes["text_dim"],
            freq_dim=256,
            ffn_dim=sizes["ffn_dim"],
            num_layers=sizes["num_layers"],
            cross_attn_norm=True,
            eps=1e-6,
        )
    return peer.requires_grad_(False).eval()


def configs(
    sizes: dict[str, int], folder: str, dtype: DTypeName
) -> tuple[WanTransformerConfig, StreamInferencePipelineConfig]:
    """This package's bidirectional model and streaming pipeline with the peer's weights."""
    values: dict[str, Any] = dict(sizes)
    streaming = WanTransformerConfig(
        **values,
        freq_dim=256,
        len_t=3,
        dtype=dtype,
        checkpoint=CheckpointConfig(source=folder),
    )
    pipeline = StreamInferencePipelineConfig(
        name="peer",
        diffusion_model=DiffusionModelConfig(
            transformer=streaming,
            scheduler=FlowMatchSchedulerConfig(denoising_timesteps=STEP_TIMESTEPS),
        ),
    )
    clip = derive_config(streaming, streaming=False, len_t=sizes["window_size_t"])
    return clip, pipeline


def bidirectional_pair(
    peer: Any, config: WanTransformerConfig, text: Tensor, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """One denoising step over a whole clip on both sides."""
    pipeline = StreamInferencePipelineConfig(
        name="clip",
        diffusion_model=DiffusionModelConfig(
            transformer=config, scheduler=FlowMatchSchedulerConfig()
        ),
    ).setup(device=device)
    pipeline.warm_up()
    model: Any = pipeline.diffusion_model.transformer
    if not isinstance(model, WanTransformer):
        raise TypeError(f"expected a WanTransformer, got {type(model).__name__}.")
    cache = model.initialize_cache(text=text)
    model.begin_step(0, cache)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(model.latent_shape(1), generator=generator).to(device)
    timestep = torch.tensor(500.0, device=device)

    def theirs() -> Tensor:
        return peer(latent.to(peer.dtype), timestep[None], text, return_dict=False)[0].float()

    return {"flashdreams": lambda: model.predict_flow(latent, timestep, cache), "diffusers": theirs}


def streaming_pair(
    peer: Any, config: StreamInferencePipelineConfig, text: Tensor, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """One AR step with a full window on both sides."""
    pipeline = config.setup(device=device)
    pipeline.warm_up()
    cache = pipeline.initialize_cache(text=text)
    transformer: Any = pipeline.diffusion_model.transformer
    c = transformer.config

    def ours() -> Tensor:
        index = cache.next_index
        chunk = pipeline.generate(autoregressive_index=index, cache=cache)
        pipeline.finalize(autoregressive_index=index, cache=cache)
        return chunk

    while cache.next_index * c.len_t < c.window_size_t:
        ours()
    shape = (1, 16, c.window_size_t, c.latent_height, c.latent_width)
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(shape, generator=generator).to(device, peer.dtype)
    chunk_tokens = c.len_t * c.tokens_per_frame
    per_token = torch.zeros(1, c.window_size_t * c.tokens_per_frame, device=device)

    def theirs() -> Tensor:
        window = latent.clone()
        for timestep in STEP_TIMESTEPS:
            per_token[:, -chunk_tokens:] = timestep
            flow = peer(window, per_token, text, return_dict=False)[0]
            window[:, :, -c.len_t :] -= flow[:, :, -c.len_t :] / len(STEP_TIMESTEPS)
        return window[:, :, -c.len_t :].float()

    return {"flashdreams": ours, "diffusers": theirs}


def measure(
    case: str,
    pair: dict[str, Callable[[], Tensor]],
    device: torch.device,
    repeats: int,
    difference_bound: float | None,
) -> list[dict[str, Any]]:
    """One row per side; the sides take turns.

    Operations are counted only on a CPU, because the counter does not see graphs.

    Raises:
        RuntimeError: the outputs should agree but do not.
    """
    outputs = {name: call() for name, call in pair.items()}
    gflop: dict[str, Any] = dict.fromkeys(pair, "not counted")
    if device.type == "cpu":
        gflop = {name: rollout.count_flops(call) / 1e9 for name, call in pair.items()}
    difference: Any = "not comparable"
    if difference_bound is not None:
        ours, theirs = outputs["flashdreams"], outputs["diffusers"]
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        report.refuse_difference(case, difference, difference_bound)
    times = rollout.time_in_turn(pair, device, repeats)
    return [
        {
            "case": case,
            "variant": name,
            **report.timing_fields(sorted(times[name])),
            "output_sha256": sha256_of(outputs[name]),
            "gflop": gflop[name],
            **report.ratio_fields(times[name], times["flashdreams"]),
            "max_difference": difference,
            "difference_bound": difference_bound or "not comparable",
        }
        for name in pair
    ]


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Median times of the pairs as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
    for shift, variant in ((-0.2, "flashdreams"), (0.2, "diffusers")):
        mine = [row for row in found["rows"] if row["variant"] == variant]
        places = [cases.index(row["case"]) + shift for row in mine]
        bars = axes.bar(places, [row["p50_ms"] for row in mine], 0.4, label=variant)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("median, ms")
    axes.set_title(f"peers, {found['device']['name']}, {found['date'][:10]}")
    axes.legend()
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default=None, help="default: by device")
    parser.add_argument("--dtype", choices=list(DIFFERENCE_BOUNDS), default=None)
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads")
    options = command.parse(parser, arguments, draws=True)
    torch.set_num_threads(options.threads)
    device = init(options.device).device
    on_gpu = device.type == "cuda"
    preset = options.preset or ("wan-1.3b" if on_gpu else "small")
    dtype: DTypeName = options.dtype or ("bfloat16" if on_gpu else "float32")
    sizes, repeats = PRESETS[preset], options.repeats or 20
    peer = build_peer(sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(Path(folder), max_shard_size="100GB")
        clip, stream = configs(sizes, folder, dtype)
        if dtype != "float32":  # keeps the peer's float32 parameters in float32
            peer = type(peer).from_pretrained(folder, torch_dtype=getattr(torch, dtype))
        peer = peer.to(device)
        text = torch.randn(1, sizes["text_len"], sizes["text_dim"], generator=generator)
        text = text.to(device, peer.dtype)
        rows = measure(
            "bidirectional step",
            bidirectional_pair(peer, clip, text, device),
            device,
            repeats,
            DIFFERENCE_BOUNDS[dtype],
        )
        config = {"preset": preset, "dtype": dtype, "repeats": repeats, **sizes}
        header = ("peers", device, config)
        if options.json is not None:  # in case the other pair is interrupted
            report.write(report.new_report(*header, rows, options.git_commit, FIELDS), options.json)
        pair = streaming_pair(peer, stream, text, device)
        rows += measure("streaming AR step", pair, device, repeats, None)
    found = report.new_report(*header, rows, options.git_commit, FIELDS)
    report.finish(found, options, COLUMNS, draw)


if __name__ == "__main__":
    command.run(main)
