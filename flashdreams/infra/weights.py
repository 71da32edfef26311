"""Requirements of a pipeline: files, disk and memory."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from flashdreams.infra.component import Component
from flashdreams.infra.config import derive_config, walk
from flashdreams.parallel.environment import first_on_node, from_rank_zero, process_rank
from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    MissingWeightsError,
    can_download,
    concerning,
    describe_missing,
    describe_size,
    ensure_local,
    find_local,
    parse_lora,
)

_FIELD = re.compile(r"(?<![\w.-])checkpoint\.(source|file|select|download|ignore)\b(=(\w+))?")


PipelineConfigT = TypeVar("PipelineConfigT")

_TEXT_ENCODER = "text_encoder."
"""Prefix of the paths of the text encoder's files."""

_LORAS = "loras"
"""Suffix of the fields that name LoRAs; these are downloaded if the checkpoint of their network
may be."""


def _checkpoint_of(loras: str) -> str:
    """The field beside a field of LoRAs that names the weights file of the same network."""
    return f"{loras.removesuffix(_LORAS)}checkpoint"


def named_checkpoints(config: Any) -> Iterator[tuple[str, CheckpointConfig]]:
    """Every checkpoint that a config names, LoRAs included, with the dotted path of its field."""
    for path, owner, value in walk(config):
        if isinstance(value, CheckpointConfig):
            yield path, value
        elif path.endswith(_LORAS):
            name = path.rpartition(".")[2]
            beside = getattr(owner, _checkpoint_of(name), None) or owner.checkpoint
            download = beside is not None and beside.download
            for text in value:
                yield path, parse_lora(text, download=download).checkpoint


def option_of(path: str) -> str:
    """The command-line option of a pipeline field, from its dotted path."""
    return f"--pipeline.{path.replace('_', '-')}"


@contextmanager
def typed_options(config: Any) -> Iterator[None]:
    """Rewrite checkpoint errors to name command-line options.

    Args:
        config: the pipeline that the checkpoint belongs to.

    Raises:
        CheckpointError: the same, with ``--pipeline.decoder.checkpoint.source`` in the place of
            ``checkpoint.source``, or before it all.
    """
    try:
        yield
    except CheckpointError as error:
        failed = error.checkpoint
        paths = [path for path, checkpoint in named_checkpoints(config) if checkpoint == failed]
        if not paths:
            raise
        option, text = option_of(paths[0]), _with_options(str(error), paths[0])
        if option not in text:
            text = f"{option}{'' if _is_lora(paths[0]) else '.source'}: {text}"
        raise type(error)(text) from error


def _is_lora(path: str) -> bool:
    return path.endswith(_LORAS)


def _with_options(text: str, path: str) -> str:
    def option(field: re.Match[str]) -> str:
        value = f" {field[3]}" if field[3] else ""
        if _is_lora(path) and field[1] == "source":
            return option_of(path)
        return f"{option_of(path)}.{field[1].replace('_', '-')}{value}"

    return _FIELD.sub(option, text)


def require_packages(config: Any, *, fetch_all: str | None = None) -> None:
    """Refuse a pipeline whose text encoder needs packages that are not installed.

    Called before anything is built. The same error also lists missing weights.

    Args:
        config: the pipeline.
        fetch_all: as for `require_weights`.

    Raises:
        ImportError: says what to install, and lists missing weights.
    """
    needed: dict[str, str] = {}
    for _, _, part in walk(config):
        needed |= getattr(part, "packages", {})
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if not absent:
        return
    wanted = " ".join(f"'{needed[name]}'" for name in absent)
    line = (
        f"{config.name} needs packages that are not installed: {', '.join(absent)}. Install them "
        f"with: pip install {wanted}"
    )
    raise ImportError("\n".join([line, *_list_missing(config, fetch_all, encodes_text=True)]))


def require_weights(
    config: Any,
    *,
    fetch_all: str | None = None,
    encodes_text: bool | None = None,
    shared: bool = False,
) -> None:
    """Refuse a pipeline whose weights are neither on this machine nor allowed to be downloaded.

    Nothing is read or downloaded. Collective where several ranks share the pipeline.

    Args:
        config: the pipeline.
        fetch_all: the option that downloads all of them; None names one option per file.
        encodes_text: whether this process runs the text encoder; None: it does on rank zero, as
            with a runner.
        shared: whether all ranks of the process group share the pipeline: the first rank of each
            node then checks for its node.

    Raises:
        MissingWeightsError: all missing files, with sizes, the memory that a rollout will
            take, and how to get it.
        CheckpointError: an existing file is not a checkpoint.
        OtherRankError: the first rank of some node has raised it.
    """
    if encodes_text is None:
        encodes_text = process_rank() == 0
    require = partial(_refuse_missing, config, fetch_all, encodes_text)
    if shared:
        first_on_node(require)
    else:
        require()


def _refuse_missing(config: Any, fetch_all: str | None, encodes_text: bool) -> None:
    lines = _list_missing(config, fetch_all, encodes_text)
    if lines:
        raise MissingWeightsError("\n".join(lines))


def _list_missing(config: Any, fetch_all: str | None, encodes_text: bool) -> list[str]:
    """The missing files, one or two lines each; empty if nothing is missing."""
    missing: dict[tuple[str, str | None], tuple[str, CheckpointConfig]] = {}
    named_files = list(named_checkpoints(config))
    paths = {path for path, _ in named_files}
    for path, checkpoint in named_files:
        wanted = encodes_text or not path.startswith(_TEXT_ENCODER)
        with concerning(checkpoint):
            fetched = checkpoint.download and can_download(checkpoint)
            if wanted and not fetched and find_local(checkpoint) is None:
                missing.setdefault((checkpoint.source, checkpoint.file), (path, checkpoint))
    if not missing:
        return []
    count = "1 checkpoint that is" if len(missing) == 1 else f"{len(missing)} checkpoints that are"
    sizes = [checkpoint.size_bytes for _, checkpoint in missing.values()]
    lines = [
        f"{config.name} needs {count} not on this machine, {_total(sizes)}.",
        memory_estimate(config),
    ]
    for path, checkpoint in missing.values():
        owner, _, field = path.rpartition(".")
        named = "checkpoint.source"
        if _is_lora(path):
            named = option_of(path)
            lines.append(f"LoRA of {named}:")
            beside = f"{owner}.{_checkpoint_of(field)}"
            path = beside if beside in paths else f"{owner}.checkpoint"
        description = describe_missing(checkpoint, flag=f"{option_of(path)}.download").splitlines()
        kept = description[:2] if fetch_all else description
        lines += [_with_options(line.replace("checkpoint.source", named), path) for line in kept]
    fetchable = [can_download(checkpoint) for _, checkpoint in missing.values()]
    if fetch_all and any(fetchable):
        which = "all of them" if all(fetchable) else "those with a command"
        lines.append(f"To let this program download {which}: {fetch_all}.")
    return lines


def _total(sizes: list[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    if not known:
        return "of unknown size"
    least = "at least " if len(known) < len(sizes) else ""
    return f"{least}{describe_size(sum(known))} on disk"


def fetch_weights(config: Any, *, text_on_rank_zero: bool = False) -> None:
    """Download missing files that may be downloaded; one rank per node does it.

    Collective where there are several ranks.

    Args:
        config: the pipeline.
        text_on_rank_zero: only rank zero runs the text encoder and downloads its files.

    Raises:
        MissingWeightsError: a download failed.
    """
    for path, checkpoint in named_checkpoints(config):
        if checkpoint.download:
            alone = text_on_rank_zero and path.startswith(_TEXT_ENCODER)
            take_turns = from_rank_zero if alone else first_on_node
            take_turns(partial(_fetch, checkpoint))


def _fetch(checkpoint: CheckpointConfig) -> None:
    with concerning(checkpoint):
        ensure_local(checkpoint)


def weight_nbytes(component: Component) -> int:
    """Bytes of a component's weights in their storage dtypes; it may be on ``meta``."""
    named = component.named_parameters()
    return sum(x.numel() * component.dtype_of(name).itemsize for name, x in named)


def encoder_nbytes(config: Any, on_gpu: bool) -> int:
    """Bytes that an encoder's weights take on the device, from its config; None takes none.

    Also where the package that builds it is not installed, if the config says the size of the file.
    An offloaded one takes none on a GPU: the copies of one layer, for a prompt, do not count.
    """
    if config is None or (on_gpu and getattr(config, "offload", False)):
        return 0
    try:
        with torch.device("meta"):
            return weight_nbytes(config.setup())
    except ImportError:
        checkpoint = config.checkpoint
        if checkpoint is None or checkpoint.size_bytes is None:
            raise
        return int(checkpoint.size_bytes)


def memory_estimate(config: Any) -> str:
    """Text with the bytes of weights and one rollout's KV cache, from shapes, not measured."""
    with torch.device("meta"):
        transformer = config.diffusion_model.transformer.setup()
        transformer.quantize_weights()
    branches = 1 if config.diffusion_model.guidance_scale is None else 2
    cache = transformer.cache_nbytes(1) * branches
    dtype_of = transformer.dtype_of
    weights = weight_nbytes(transformer)
    others = [
        checkpoint.size_bytes
        for path, checkpoint in named_checkpoints(config)
        if not path.startswith("diffusion_model.")
    ]
    dtypes = [transformer.dtype, *(dtype_of(name) for name, _ in transformer.named_parameters())]
    types = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)]
    return (
        f"Memory, from shapes: transformer {describe_size(weights)} in {' and '.join(types)}, "
        f"KV cache {describe_size(cache)}, other networks {_total(others)}, and activations."
    )


def with_downloads(config: PipelineConfigT) -> PipelineConfigT:
    """The same pipeline with downloads of missing checkpoints enabled."""
    overrides: dict[str, Any] = {}
    for path, _ in named_checkpoints(config):
        *owners, leaf = path.split(".")
        if leaf.endswith(_LORAS):
            continue
        place = overrides
        for owner in owners:
            place = place.setdefault(owner, {})
        place[leaf] = {"download": True}
    return derive_config(config, **overrides)
