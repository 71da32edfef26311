"""What a pipeline needs before it can run: files, disk and memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from flashdreams.infra.config import config_fields, derive_config, is_config
from flashdreams.infra.low_precision import weight_nbytes
from flashdreams.parallel.environment import first_on_node, from_rank_zero, process_rank
from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    describe_missing,
    ensure_local,
    find_local,
    parse_lora,
)


class NamedPipelineConfig(Protocol):
    """What is read here of a `StreamInferencePipelineConfig`."""

    name: str
    """Name of the method."""
    diffusion_model: Any
    """A `DiffusionModelConfig`."""


PipelineConfigT = TypeVar("PipelineConfigT", bound=NamedPipelineConfig)

_TEXT_ENCODER = "text_encoder."
"""What the paths of the text encoder's files begin with."""

_LORAS = "loras"
"""Field whose texts name LoRAs; they are fetched where the checkpoint beside them may be."""


def named_checkpoints(config: Any, prefix: str = "") -> Iterator[tuple[str, CheckpointConfig]]:
    """Every checkpoint that a config names, LoRAs included, with the dotted path of its field."""
    for name in config_fields(config):
        value = getattr(config, name)
        if isinstance(value, CheckpointConfig):
            yield f"{prefix}{name}", value
        elif name == _LORAS:
            download = config.checkpoint is not None and config.checkpoint.download
            for text in value:
                yield f"{prefix}{name}", parse_lora(text, download=download).checkpoint
        elif is_config(value):
            yield from named_checkpoints(value, f"{prefix}{name}.")


def require_weights(
    config: NamedPipelineConfig,
    *,
    fetch_all: str | None = None,
    encodes_text: bool | None = None,
    shared: bool = False,
) -> None:
    """Refuse a pipeline whose weights are neither on this machine nor allowed to be fetched.

    Nothing is read or downloaded. Collective where several ranks share the pipeline.

    Args:
        config: the pipeline.
        fetch_all: what to type to have all of them fetched; None names one option per file.
        encodes_text: whether this process runs the text encoder; None: it does on rank zero, as
            with a runner.
        shared: whether all ranks of the process group share the pipeline: the first one of each
            node then asks for its node.

    Raises:
        CheckpointError: all that is missing, with its size, the memory that a rollout will take,
            and how to get it.
        OtherRankError: the first rank of some node has raised that.
    """
    if encodes_text is None:
        encodes_text = process_rank() == 0
    require = partial(_refuse_missing, config, fetch_all, encodes_text)
    if shared:
        first_on_node(require)
    else:
        require()


def _refuse_missing(config: NamedPipelineConfig, fetch_all: str | None, encodes_text: bool) -> None:
    missing: dict[tuple[str, str | None], tuple[str, CheckpointConfig]] = {}
    for path, checkpoint in named_checkpoints(config):
        wanted = encodes_text or not path.startswith(_TEXT_ENCODER)
        if wanted and not checkpoint.download and find_local(checkpoint) is None:
            missing.setdefault((checkpoint.source, checkpoint.file), (path, checkpoint))
    if not missing:
        return
    size = sum(checkpoint.size_bytes or 0 for _, checkpoint in missing.values())
    count = "1 checkpoint that is" if len(missing) == 1 else f"{len(missing)} checkpoints that are"
    lines = [
        f"{config.name} needs {count} not on this machine, {size / 1e9:.1f} GB on disk.",
        memory_estimate(config),
    ]
    for path, checkpoint in missing.values():
        owner, _, field = path.replace("_", "-").rpartition(".")
        lora = field == _LORAS
        if lora:
            lines.append(f"LoRA of --pipeline.{owner}.loras:")
            field = "checkpoint"
        option = f"--pipeline.{owner}.{field}.download"
        description = describe_missing(checkpoint, flag=option).splitlines()
        if lora:
            generic = "--...checkpoint.source"
            description = [x.replace(generic, f"--pipeline.{owner}.loras") for x in description]
        lines += description[:2] if fetch_all else description
    if fetch_all:
        lines.append(f"To let this program fetch all of them: {fetch_all}.")
    raise CheckpointError("\n".join(lines))


def fetch_weights(config: NamedPipelineConfig, *, text_on_rank_zero: bool = False) -> None:
    """Download what may be downloaded and is not here yet; one rank per node does it.

    Collective where there are several ranks.

    Args:
        config: the pipeline.
        text_on_rank_zero: rank zero alone runs the text encoder and fetches its files.

    Raises:
        CheckpointError: a download failed.
    """
    for path, checkpoint in named_checkpoints(config):
        if checkpoint.download:
            alone = text_on_rank_zero and path.startswith(_TEXT_ENCODER)
            take_turns = from_rank_zero if alone else first_on_node
            take_turns(partial(ensure_local, checkpoint))


def memory_estimate(config: NamedPipelineConfig, batch_size: int = 1) -> str:
    """Bytes of the weights and of one rollout's KV cache, in words; from shapes, not measured."""
    with torch.device("meta"):
        transformer = config.diffusion_model.transformer.setup()
    branches = 1 if config.diffusion_model.guidance_scale is None else 2
    cache = transformer.cache_nbytes(batch_size) * branches
    precision, dtype_of = transformer.config.linear_precision, transformer.dtype_of
    weights = weight_nbytes(transformer, transformer.parallel_plan(), precision, dtype_of)
    others = sum(
        checkpoint.size_bytes or 0
        for path, checkpoint in named_checkpoints(config)
        if not path.startswith("diffusion_model.")
    )
    dtypes = [transformer.dtype, *(dtype_of(name) for name, _ in transformer.named_parameters())]
    types = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)]
    types += [] if precision == "native" else ["fp8"]
    return (
        f"Memory, from shapes: transformer {weights / 1e9:.1f} GB in {' and '.join(types)}, "
        f"KV cache {cache / 1e9:.1f} GB, "
        f"other networks at most {others / 1e9:.1f} GB, and activations."
    )


def with_downloads(config: PipelineConfigT) -> PipelineConfigT:
    """The same pipeline with every missing checkpoint allowed to be fetched."""
    overrides: dict[str, Any] = {}
    for path, _ in named_checkpoints(config):
        *owners, leaf = path.split(".")
        if leaf == _LORAS:
            continue
        place = overrides
        for owner in owners:
            place = place.setdefault(owner, {})
        place[leaf] = {"download": True}
    return derive_config(config, **overrides)
