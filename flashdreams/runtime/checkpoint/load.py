"""Strict loading of public checkpoints into modules, tensor by tensor."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flashdreams.runtime.checkpoint.config import CheckpointConfig, CheckpointError, LoRA
from flashdreams.runtime.checkpoint.keys import KeyMap, NameMatch, describe_mismatch, map_names
from flashdreams.runtime.checkpoint.lora import Update, resolve_loras, updated
from flashdreams.runtime.checkpoint.read import (
    NO_TENSOR,
    TensorInfo,
    TensorSlice,
    TensorStore,
    open_tensors,
)
from flashdreams.runtime.checkpoint.scaled import (
    dequantize,
    find_scales,
    refuse_missing_scales,
    refuse_scaled,
)
from flashdreams.runtime.checkpoint.source import ensure_local
from flashdreams.runtime.text import shown

logger = logging.getLogger(__name__)

DType = torch.dtype | Callable[[str], torch.dtype]
"""One for all tensors, or a function of a tensor's name."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Report of one call of `load_checkpoint`."""

    tensors: int
    """Tensors that were filled; tied ones count once."""

    bytes_read: int
    """Bytes that were read: with slices, only theirs."""

    seconds: float
    """Duration of the call."""

    key_map: str | None
    """Naming scheme that was recognised in the file; ``None``: the module's own."""

    prefix: str = ""
    """Prefix of the names that was dropped, such as ``diffusion_model.``."""

    scaled: int = 0
    """Number of FP8 tensors with scales."""

    updated: int = 0
    """Number of tensors changed by LoRAs."""


@dataclass
class _Target:
    """One tensor of a module with all references to it."""

    tensor: Tensor
    places: list[tuple[nn.Module, str]]
    names: list[str]


@dataclass
class _Source:
    """The source of one tensor of the module."""

    target: _Target
    part: TensorSlice | None
    shape: tuple[int, ...]
    scale: Tensor | None = None
    updates: Sequence[Update] = field(default_factory=tuple)


def load_checkpoint(
    module: nn.Module,
    config: CheckpointConfig,
    *,
    device: torch.device | str | None = None,
    dtype: DType | None = None,
    slices: Mapping[str, tuple[int, ...]] | None = None,
    loras: Sequence[LoRA] = (),
) -> LoadReport:
    """Fill all parameters and persistent buffers of a module from a checkpoint, strictly.

    Names, shapes and types are compared first; only if all of them fit is anything assigned.
    Tensors are then read one at a time by memory map, of a sliced tensor only the slice. A tensor
    on ``meta``, or one whose device or dtype changes, is replaced by a new one; all others are
    filled in place.

    A module may define: ``checkpoint_key_maps`` lists naming schemes,
    ``checkpoint_slices(shapes)`` returns slices of partly needed tensors. FP8 weights are
    read with their scales.

    Args:
        module: its state-dict names are the official names of the checkpoint.
        config: where the weights are and how their names are read.
        device: for all tensors; ``None``: ``meta`` goes to the CPU; ``"meta"``: compare only.
        dtype: for all floating point tensors, or of each by the module's name for it; ``None``:
            each keeps its own.
        slices: tensor name to `TensorSlice` or ``(dim, start, length)``: the part to load.
        loras: merged, in float32, into the tensors that they name; checked before any is read.

    Raises:
        CheckpointError: missing, damaged or refused files, or any tensor that does not fit.
        ValueError: ``slices`` names no tensor of the module.
    """
    started = time.perf_counter()
    key_maps = getattr(module, "checkpoint_key_maps", ())
    store = open_tensors(ensure_local(config), config.select)
    scales, aside = find_scales(store.infos)
    refuse_scaled(store.infos, config, {*scales, *aside})
    targets = _collect_targets(module)
    names = (name for name in store.infos if name not in aside)
    wanted = [name for target in targets for name in target.names]
    match = map_names(names, config, key_maps, wanted)
    _refuse_strange(match, store)
    refuse_missing_scales(store.infos, scales, aside, match.file_names.values())
    title = f"{config.source} {config.file or ''}".strip()
    sources = _sources_of(module, targets, match, store, slices or {}, title)
    _attach_updates(sources.values(), loras, key_maps)
    if match.prefix:
        logger.info("%s: names begin with %r, which is dropped.", title, match.prefix)
    read = 0
    if device is None or torch.device(device).type != "meta":
        _attach_scales(sources, scales, store)
        read = _fill(store, sources, device, dtype)
    return LoadReport(
        tensors=len(sources),
        bytes_read=read,
        seconds=time.perf_counter() - started,
        key_map=match.key_map,
        prefix=match.prefix,
        scaled=sum(name in scales for name in sources),
        updated=sum(bool(source.updates) for source in sources.values()),
    )


def _sources_of(
    module: nn.Module,
    targets: Sequence[_Target],
    match: NameMatch,
    store: TensorStore,
    slices: Mapping[str, tuple[int, ...]],
    title: str,
) -> dict[str, _Source]:
    """The file's name of every tensor to be read; refuses mismatches."""
    adapt = getattr(module, "checkpoint_slices", None)
    shapes = {name: store.infos[file_name].shape for name, file_name in match.file_names.items()}
    adapted = adapt(shapes) if adapt is not None else {}
    parts = _slices_of(targets, {**adapted, **slices})
    _refuse_mismatch(
        targets, match.file_names, store.infos, parts, f"{title} -> {type(module).__name__}"
    )
    found = ((_first(target.names, match.file_names), target) for target in targets)
    return {
        name: _Source(target, parts.get(id(target.tensor)), store.infos[name].shape)
        for name, target in found
        if name is not None
    }


@torch.no_grad()
def merge_loras(
    module: nn.Module,
    loras: Sequence[LoRA],
    *,
    slices: Mapping[str, tuple[int, ...]] | None = None,
) -> int:
    """Merge LoRAs into existing weights, for modules without a checkpoint.

    Args:
        module: holds its tensors, or on ``meta`` to be compared only.
        loras: as for `load_checkpoint`.
        slices: `TensorSlice` of each tensor that the module has a part of.

    Returns:
        How many tensors were changed.

    Raises:
        CheckpointError: a LoRA is missing or does not fit; nothing is changed.
    """
    targets = _collect_targets(module)
    parts = _slices_of(targets, slices or {})
    sources = []
    for target in targets:
        part = parts.get(id(target.tensor))
        shape = list(target.tensor.shape)
        if part is not None:
            shape[part.dim] = part.size or shape[part.dim]
        sources.append(_Source(target, part, tuple(shape)))
    _attach_updates(sources, loras, getattr(module, "checkpoint_key_maps", ()))
    changed = [source for source in sources if source.updates]
    for source in changed:
        tensor = source.target.tensor
        if not tensor.is_meta:
            tensor.copy_(updated(tensor, source.updates, source.shape, source.part))
    return len(changed)


def _attach_updates(
    sources: Iterable[_Source], loras: Sequence[LoRA], key_maps: Sequence[KeyMap]
) -> None:
    """Attach the LoRA updates to every source."""
    by_name = {name: source for source in sources for name in source.target.names}
    shapes = {name: source.shape for name, source in by_name.items()}
    for name, updates in resolve_loras(loras, shapes, key_maps).items():
        by_name[name].updates = (*by_name[name].updates, *updates)


def _attach_scales(
    sources: Mapping[str, _Source], scales: Mapping[str, str], store: TensorStore
) -> None:
    """Read the scales of the wanted tensors."""
    weights = {scales[name]: name for name in sources if name in scales}
    for name, value in store.read(dict.fromkeys(weights)):
        sources[weights[name]].scale = value.clone()


def _refuse_strange(match: NameMatch, store: TensorStore) -> None:
    """Refuse entries of a pickle that are not tensors, unless they are ignored."""
    strange = [n for n in match.file_names.values() if store.infos[n].refused == NO_TENSOR]
    if strange:
        raise CheckpointError(
            f"{store.infos[strange[0]].file}: {len(strange)} entries are not dense tensors with a "
            f"name: {', '.join(strange[:10])}. Choose a sub-dictionary with checkpoint.select"
        )


def _first(names: Sequence[str], file_names: Mapping[str, str]) -> str | None:
    return next((file_names[name] for name in names if name in file_names), None)


def _collect_targets(module: nn.Module) -> list[_Target]:
    """List parameters and persistent buffers; tied ones once, under all of their names."""
    targets: dict[int, _Target] = {}
    for name, owner, leaf, tensor in _state(module):
        target = targets.setdefault(id(tensor), _Target(tensor, [], []))
        target.places.append((owner, leaf))
        target.names.append(name)
    return list(targets.values())


def _state(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, owner in module.named_modules(remove_duplicate=False):
        held: dict[str, Tensor | None] = {**owner._parameters, **owner._buffers}
        for leaf, tensor in held.items():
            if tensor is not None and leaf not in owner._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, owner, leaf, tensor


def _slices_of(
    targets: Sequence[_Target], slices: Mapping[str, tuple[int, ...]]
) -> dict[int, TensorSlice]:
    by_name = {name: target for target in targets for name in target.names}
    unknown = [name for name in slices if name not in by_name]
    if unknown:
        raise ValueError(
            f"slices name no tensor of the module: {', '.join(map(shown, unknown[:10]))}"
        )
    return {id(by_name[name].tensor): TensorSlice(*part) for name, part in slices.items()}


def _refuse_mismatch(
    targets: Sequence[_Target],
    file_names: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    parts: Mapping[int, TensorSlice],
    title: str,
) -> None:
    known = {name for target in targets for name in target.names}
    missing = [t.names[0] for t in targets if _first(t.names, file_names) is None]
    unexpected = [name for name in file_names if name not in known]
    misfits = {
        name: wrong
        for target in targets
        for name in target.names
        if name in file_names
        and (wrong := _misfit(target.tensor, infos[file_names[name]], parts.get(id(target.tensor))))
    }
    if missing or unexpected or misfits:
        listing = describe_mismatch(
            missing, unexpected, misfits, wanted=sorted(known), present=list(file_names)
        )
        raise CheckpointError(
            f"checkpoint does not fit the model, nothing was loaded: {title}\n{listing}"
        )


def _misfit(tensor: Tensor, info: TensorInfo, part: TensorSlice | None) -> str | None:
    """The reason why a tensor of the file does not fit a tensor of the module."""
    if info.refused:
        return info.refused
    shape = list(info.shape)
    taken = ""
    if part is not None:
        dim, start, length, size, parts = part
        whole = shape[dim] if 0 <= dim < len(shape) else -1
        wrong = whole % parts != 0 or start + length > whole // parts or (size or whole) != whole
        if start < 0 or length < 0 or wrong:
            of = f"of {size} " if size is not None else ""
            return f"{shape} in the file, no slice [{start}:{start + length}] {of}along dim {dim}"
        shape[dim] = length * parts
        taken = f", {shape} of it needed,"
    if shape != list(tensor.shape):
        return f"{list(info.shape)} in the file{taken}, {list(tensor.shape)} in the module"
    if info.dtype.is_floating_point != tensor.dtype.is_floating_point:
        return f"{info.dtype} in the file, {tensor.dtype} in the module"
    return None


def _fill(
    store: TensorStore,
    sources: Mapping[str, _Source],
    device: torch.device | str | None,
    dtype: DType | None,
) -> int:
    """Read the needed tensors into the module; returns the bytes read."""
    read = 0
    with torch.no_grad():
        for name, value in store.read({name: source.part for name, source in sources.items()}):
            source = sources[name]
            read += value.nbytes
            place = _place(source.target, device, dtype)
            if source.scale is not None:
                value = dequantize(value, source.scale, source.part)
            if source.updates:
                value = updated(value.to(place.device), source.updates, source.shape, source.part)
            place.copy_(value)
    return read


def _place(target: _Target, device: torch.device | str | None, dtype: DType | None) -> Tensor:
    """Return the tensor to fill: the module's own, or a new one set at all references."""
    old = target.tensor
    if device is None:
        device = "cpu" if old.is_meta else old.device
    wanted_dtype = old.dtype
    if dtype is not None and old.is_floating_point():
        wanted_dtype = dtype if isinstance(dtype, torch.dtype) else dtype(target.names[0])
    new = torch.empty(0, device=device, dtype=torch.float32)
    if not old.is_meta and new.device == old.device and wanted_dtype == old.dtype:
        return old
    new = torch.empty(old.shape, device=device, dtype=wanted_dtype)
    if isinstance(old, nn.Parameter):
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        parameter.__dict__.update(old.__dict__)
        for owner, leaf in target.places:
            owner._parameters[leaf] = parameter
    else:
        for owner, leaf in target.places:
            owner._buffers[leaf] = new
    return new
