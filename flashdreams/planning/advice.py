"""What did not fit into memory, and the cheapest change that would."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flashdreams.infra.config import config_fields, derive_config
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees
from flashdreams.planning.devices import GIB, Device
from flashdreams.planning.plans import Plan, Planner

MORE_RANKS = (2, 4, 8)


def explain(
    config: StreamInferencePipelineConfig,
    device: Device,
    degrees: ParallelDegrees,
    parallel: ParallelConfig | None = None,
) -> str:
    """What a rollout needs on a rank and for what, what there is, and what would fit.

    Args:
        config: the pipeline that ran out of memory.
        device: with the memory that there is.
        degrees: of the run.
        parallel: strategy of the run.
    """
    planner = Planner(config, device, parallel=parallel)
    plan = planner.plan(degrees)
    parts = {name: value for name, value in vars(plan.memory).items() if value}
    listed = ", ".join(f"{n.replace('_', ' ')} {v / GIB:.2f}" for n, v in parts.items())
    text = (
        f"A rollout needs {plan.memory.total / GIB:.2f} GiB per rank ({listed}); there are "
        f"{device.memory_gib:.2f} GiB."
    )
    change = next(cheapest_changes(config, planner, plan), None)
    if change is None:
        return f"{text} No single change fits: use more ranks, a smaller size, or another device."
    return f"{text} The cheapest change that fits: {change}."


def cheapest_changes(
    config: StreamInferencePipelineConfig, planner: Planner, plan: Plan
) -> Iterator[str]:
    """Changes after which one rollout fits, those that alter the video least first."""
    if config.text_encoder is not None and not config.release_text_encoder:
        without = derive_config(config, text_encoder=None)
        if _fits(without, planner, plan):
            yield "--prompt-embeds FILE, so that the text encoder is not loaded"
    for ranks in MORE_RANKS:
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


def _fits(config: StreamInferencePipelineConfig, planner: Planner, plan: Plan) -> bool:
    other = Planner(config, planner.device, fps=planner.fps, parallel=planner.parallel)
    return other.plan(plan.degrees).fits


def with_memory(device: Device, free_bytes: int) -> Device:
    """The device with other memory, such as what is free."""
    return replace(device, memory_gib=free_bytes / GIB)
