"""The identity of a rollout's state: the method's config and its weights."""

import enum
import hashlib
import re
from pathlib import Path, PurePath
from typing import Any

from flashdreams.infra.config import config_fields, is_config, walk
from flashdreams.infra.weights import named_checkpoints
from flashdreams.runtime.checkpoint import find_local

BEFORE_THE_ROLLOUT = ("text_encoder", "image_encoder", "release_text_encoder")
"""Fields of a pipeline's config that a running rollout does not depend on."""

HOW_IT_RUNS = frozenset(
    {
        *("attention_backend", "fused_kernels", "precision", "kv_cache_dtype"),
        *("residual_dtype", "use_cuda_graph", "overlap_clean_pass", "max_rollouts", "checkpoint"),
        "fp8_gemm_min_width",
    }
)
"""Fields that select how a method is computed, not which one: the numerics fingerprint has those
that change bits, and weights have a hash of their own."""

WHERE_IT_GOES = frozenset(
    {
        *("runner_name", "description", "output_dir", "fps", "scale", "device", "save_latents"),
        *("hash_frames", "snapshot_every", "snapshots_kept", "resume", "step_deadline_s"),
        *("start_deadline_s", "threads", "trace", "report", "log_json", "numerics_from"),
        *("parallel", "download", "compare_to_truth", "total_blocks"),
    }
)
"""Fields of a runner's config that do not affect the latents of an AR step."""

HEAD_BYTES = 2**20
"""The beginning of a weights file that goes into its hash: names, types and shapes."""
SAMPLES = 64
SAMPLE_BYTES = 2**16
"""Blocks, evenly spread over a weights file, that go into its hash."""


def describe_config(pipeline: Any) -> dict[str, Any]:
    """The fields of a pipeline's config that the state of a rollout depends on.

    Args:
        pipeline: a `StreamInferencePipelineConfig`.

    Returns:
        Dotted names and JSON values.
    """
    found = {"type": type(pipeline).__name__}
    for path, _, value in walk(pipeline):
        names = path.split(".")
        if names[0] not in BEFORE_THE_ROLLOUT and not HOW_IT_RUNS.intersection(names):
            found[path] = type(value).__name__ if is_config(value) else _plain(value)
    return found


def describe_inputs(runner: Any) -> dict[str, Any]:
    """The fields of a runner's config that determine a rollout's content: seed, prompt, actions.

    Args:
        runner: a `RunnerConfig`.

    Returns:
        Names and JSON values.
    """
    return {
        name: _plain(getattr(runner, name))
        for name in config_fields(runner)
        if name not in WHERE_IT_GOES and not is_config(getattr(runner, name))
    }


def hash_weights(pipeline: Any) -> dict[str, str]:
    """A hash for each checkpoint that the state of a rollout depends on, by its field.

    It covers each file's size, its beginning and `SAMPLES` blocks: a checkpoint of many gigabytes
    takes milliseconds, and fine-tuned weights differ in nearly every block.
    Components without a checkpoint have weights that follow from the config.

    Args:
        pipeline: a `StreamInferencePipelineConfig` whose files are on this machine.

    Raises:
        OSError: a file cannot be read.
    """
    found: dict[str, Any] = {}
    for name, checkpoint in named_checkpoints(pipeline):
        if name.split(".")[0] in BEFORE_THE_ROLLOUT:
            continue
        local = find_local(checkpoint)
        # A field may name several LoRAs.
        digest = found.setdefault(name.removesuffix(".checkpoint"), hashlib.sha256())
        for path in local.files if local is not None else ():
            _sample(path, digest)
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(HEAD_BYTES))
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return value.as_posix()
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
