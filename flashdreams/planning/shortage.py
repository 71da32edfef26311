"""Readable out-of-memory errors: what was needed, and what would fit."""

import re
import traceback
from typing import Any

import torch

from flashdreams.parallel.environment import process_count
from flashdreams.parallel.mesh import resolve_degrees
from flashdreams.planning.advice import explain
from flashdreams.planning.devices import GIB, Device, host_memory_bytes
from flashdreams.runtime.stats import is_shortage


class ShortageError(OSError):
    """A device or the host has too little memory; the message says what would fit."""


def with_advice(error: Exception, config: Any) -> Exception:
    """The error or, if memory ran out, one with what was needed and what would fit.

    Args:
        error: of a run.
        config: the runner's.
    """
    if not is_shortage(error):
        return error
    traceback.clear_frames(error.__traceback__)  # they hold the tensors that took the memory
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    place = torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "the host"
    text = f"out of memory on {place}{_asked(str(error))}."
    try:
        advice = explain(*_situation(config, on_gpu))
    except Exception as problem:  # the advice may fail, the error stays
        advice = f"What it needs is unknown: {problem}"
    found = ShortageError(f"{text} {advice}")
    found.__cause__ = error
    return found


def _asked(text: str) -> str:
    """The allocation that failed, as torch's message has it."""
    found = re.search(r"allocate ([\d.]+ [KMG]iB|\d+ bytes)", text)
    if found is None:
        return ""
    size, unit = found[1].split()
    asked = f"{int(size) / GIB:.2f} GiB" if unit == "bytes" else found[1]
    return f" ({asked} more could not be allocated)"


def _situation(config: Any, on_gpu: bool) -> tuple[Any, Device, Any, Any, int | None]:
    """Pipeline, device, degrees and strategy of a run, and pixels of a row of the latent."""
    pipeline = resolved_pipeline(config)
    transformer = pipeline.diffusion_model.transformer
    degrees = resolve_degrees(
        config.parallel,
        process_count(),
        getattr(transformer, "num_heads", None),
        pipeline.diffusion_model.guidance_scale is not None,
    )
    pixels = getattr(config, "spatial_factor", None)
    return pipeline, _device(on_gpu), degrees, config.parallel, pixels


def resolved_pipeline(config: Any) -> Any:
    """The pipeline of a runner's config, with the size of its shorthand fields."""
    from flashdreams.infra.video_runner import TextToVideoRunnerConfig, resolve_config

    return (
        resolve_config(config) if isinstance(config, TextToVideoRunnerConfig) else config
    ).pipeline


def _device(on_gpu: bool) -> Device:
    if on_gpu and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        name, total = "the host", host_memory_bytes()
    return Device(
        name=name, memory_gib=total / GIB, peak_tflops=1, gemm_tflops=1, attention_tflops=1,
        fp8_tflops=1, fp8_gemm_tflops=1, convolution_tflops=1, bandwidth_gb_s=1, link_gb_s=1,
        is_host=not on_gpu,
    )  # fmt: skip
