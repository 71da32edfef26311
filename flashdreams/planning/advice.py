"""Advice for a run out of memory: what it needs, and the cheapest change that fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flashdreams.infra.config import config_fields, derive_config
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees
from flashdreams.planning.devices import GIB, Device
from flashdreams.planning.plans import Plan, Planner

MORE_RANKS = (2, 4, 8)
SMALLER = (0.75, 0.5, 0.25)
"""Fractions of height and width that are tried."""

USABLE_OF_HOST = 0.9
"""Fraction of a host's memory for a change; other programs and the allocator take some."""

WORTH_SAYING_GIB = 0.005
NAMES = {
    "kv_cache": "KV cache", "others": "other networks", "reserve": "libraries",
    "state": "other state", "transformer": "weights of the transformer",
}  # fmt: skip
"""Names of the parts of a plan's memory."""


def explain(
    config: StreamInferencePipelineConfig,
    device: Device,
    degrees: ParallelDegrees,
    parallel: ParallelConfig | None = None,
    pixels: int | None = None,
) -> str:
    """Memory that a rollout needs per rank, by part, what is available, and what would fit.

    Args:
        config: the pipeline that ran out of memory.
        device: with the memory that there is.
        degrees: of the run.
        parallel: strategy of the run.
        pixels: rows of pixels of a row of the latent, of a command that has ``--height``.
    """
    planner = Planner(config, device, parallel=parallel)
    plan = planner.plan(degrees)
    parts = {name: value / GIB for name, value in vars(plan.memory).items()}
    largest = sorted(((v, n) for n, v in parts.items() if v >= WORTH_SAYING_GIB), reverse=True)
    listed = ", ".join(f"{NAMES.get(n, n)} {v:.2f}" for v, n in largest)
    text = (
        f"A rollout needs {plan.memory.total / GIB:.2f} GiB per rank ({listed}); there are "
        f"{device.memory_gib:.2f} GiB."
    )
    usable_gib = device.memory_gib * (1.0 if planner.on_gpu else USABLE_OF_HOST)
    usable = replace(plan, device=replace(device, memory_gib=usable_gib))
    if usable.fits:
        return f"{text} That fits, so something else takes the memory: end other programs."
    less = Planner(config, usable.device, parallel=parallel)
    change = next(cheapest_changes(config, less, usable, pixels), None)
    if change is None:
        return f"{text} No single change fits: combine several, or use another device."
    return f"{text} The cheapest change that fits: {change}."


def cheapest_changes(
    config: StreamInferencePipelineConfig,
    planner: Planner,
    plan: Plan,
    pixels: int | None = None,
) -> Iterator[str]:
    """Changes after which one rollout fits, those with the least effect on the video first."""
    encoder: Any = config.text_encoder
    if not getattr(encoder, "offload", True) and planner.on_gpu:
        offloaded = derive_config(config, text_encoder={"offload": True})
        if _fits(offloaded, planner, plan):
            yield "--pipeline.text-encoder.offload True, with which prompts take longer"
    takes_embeddings = pixels is not None  # commands with --height have --prompt-embeds as well
    if takes_embeddings and encoder is not None and not config.release_text_encoder:
        without = derive_config(config, text_encoder=None)
        if _fits(without, planner, plan):
            yield "--prompt-embeds FILE, so that the text encoder is not loaded"
    for ranks in MORE_RANKS if planner.on_gpu else ():  # ranks on a host share its memory
        if ranks > plan.degrees.world_size:
            better = planner.plans(ranks)[0]
            if better.fits:
                yield f"{ranks} ranks: torchrun --nproc-per-node {ranks} ... {better.degrees.flags}"
                break
    transformer: Any = config.diffusion_model.transformer
    window = plan.longest_window_t
    least = transformer.len_t + getattr(transformer, "sink_size_t", 0)
    if window is not None and least <= window < plan.window_t:
        size = window - getattr(transformer, "sink_size_t", 0)
        yield f"--pipeline.diffusion-model.transformer.window-size-t {size}"
    for name, value in (("kv_cache_dtype", "int8"), ("dtype", "bfloat16")):
        if name in config_fields(transformer) and getattr(transformer, name) != value:
            changed = derive_config(config, diffusion_model={"transformer": {name: value}})
            if _fits(changed, planner, plan):
                flag = name.replace("_", "-")
                yield f"--pipeline.diffusion-model.transformer.{flag} {value}, which is less exact"
    yield from _smaller_sizes(config, planner, plan, pixels)


def _smaller_sizes(
    config: StreamInferencePipelineConfig, planner: Planner, plan: Plan, pixels: int | None
) -> Iterator[str]:
    """The largest of the tried sizes that fits."""
    transformer: Any = config.diffusion_model.transformer
    _, rows, columns = getattr(transformer, "patch_size", (1, 1, 1))
    for share in SMALLER:
        height = int(transformer.latent_height * share) // rows * rows
        width = int(transformer.latent_width * share) // columns * columns
        sizes = {"latent_height": height, "latent_width": width}
        if not height or not width:
            return
        if _fits(derive_config(config, diffusion_model={"transformer": sizes}), planner, plan):
            flag = "--pipeline.diffusion-model.transformer.latent-" if pixels is None else "--"
            factor = pixels or 1
            yield f"a smaller video: {flag}height {factor * height} {flag}width {factor * width}"
            return


def _fits(config: StreamInferencePipelineConfig, planner: Planner, plan: Plan) -> bool:
    other = Planner(config, planner.device, fps=planner.fps, parallel=planner.parallel)
    return other.plan(plan.degrees).fits
