"""Low-rank updates of weights (LoRA), in the published formats."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdreams.runtime.checkpoint.config import (
    WRAPPER_MARKERS,
    CheckpointError,
    LoRA,
    concerning,
)
from flashdreams.runtime.checkpoint.keys import KeyMap, describe_mismatch, rename
from flashdreams.runtime.checkpoint.read import TensorInfo, TensorSlice, TensorStore, open_tensors
from flashdreams.runtime.checkpoint.source import MAX_INDEX_BYTES, ensure_local
from flashdreams.runtime.text import quoted, read_text, shown

logger = logging.getLogger(__name__)

_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet."),
    *("model.", "lora_unet_", "lora_transformer_"),
)
_KINDS = {
    "down": r"\.(?:lora_A|lora_down|lora\.down)(?:\.default)?(?:\.weight)?$",
    "up": r"\.(?:lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?$",
    "alpha": r"\.alpha$",
    "weight": r"\.diff$",
    "bias": r"\.diff_b$",
    "modulation": r"\.diff_m$",
}


MAX_ALPHA = 1e6
"""Largest alpha; in use are some thousand at most."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one LoRA adds to one tensor."""

    store: TensorStore
    scale: float
    """The LoRA's weight, times alpha / rank for a pair of matrices."""
    names: tuple[str, ...]
    """``(up, down)``, with the update ``up @ down``, or the update itself."""

    def whole(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The update of the whole tensor, float32."""
        read = dict(self.store.read(dict.fromkeys(self.names)))
        first, *rest = (read[name].to(device).float() for name in self.names)
        product = first.flatten(1) @ rest[0].flatten(1) if rest else first
        return self.scale * product.reshape(list(shape))


Entry = Mapping[str, str]
"""The tensors of a file that change one module: kind -> the file's name."""


def resolve_loras(
    loras: Sequence[LoRA],
    shapes: Mapping[str, tuple[int, ...]],
    key_maps: Sequence[KeyMap] = (),
) -> dict[str, list[Update]]:
    """Determine what each LoRA adds to which tensor; reads headers and alphas.

    Known are the names of PEFT (``lora_A``, ``lora_B``), kohya (``lora_down``, ``lora_up``,
    ``alpha``, underscores for dots) and ComfyUI (``diffusion_model.``, ``diff``, ``diff_b``,
    ``diff_m``). Without an alpha, in the file or in ``adapter_config.json`` beside it, it is the
    rank.

    Args:
        loras: in the order in which they are added.
        shapes: of the model's whole tensors, by name.
        key_maps: naming schemes beside the module's own.

    Returns:
        Name of a tensor -> its updates.

    Raises:
        CheckpointError: a file is missing or damaged, is not a LoRA, or does not fit.
    """
    updates: dict[str, list[Update]] = {}
    for lora in loras:
        source = lora.checkpoint.source
        with concerning(lora.checkpoint):
            try:
                local = ensure_local(lora.checkpoint)
                store = open_tensors(local, lora.checkpoint.select)
                settings = _adapter_settings(local.files[0].parent / "adapter_config.json")
            except CheckpointError as error:
                raise type(error)(f"LoRA {source}: {error}") from error
            length = len(lora.part)
            own = {name[length:]: x for name, x in shapes.items() if name.startswith(lora.part)}
            found = _resolve(lora, store, own, key_maps, settings)
        for name, several in found.items():
            updates.setdefault(f"{lora.part}{name}", []).extend(several)
        logger.info("LoRA %s: %d tensors, weight %g.", source, len(found), lora.weight)
    return updates


def updated(
    value: Tensor, updates: Iterable[Update], shape: Sequence[int], part: TensorSlice | None
) -> Tensor:
    """A tensor and its updates, summed in float32.

    Updates are computed in full and then sliced, so a weight has the same bits on any number of
    ranks.

    Args:
        value: the tensor, or the part of it that a rank holds.
        updates: of the whole tensor.
        shape: of the whole tensor.
        part: the slice that ``value`` is.
    """
    total = value.float()
    for update in updates:
        whole = update.whole(shape, value.device)
        total = total + (whole if part is None else part.of(whole))
    return total


def _resolve(
    lora: LoRA,
    store: TensorStore,
    shapes: Mapping[str, tuple[int, ...]],
    key_maps: Sequence[KeyMap],
    settings: Mapping[str, object],
) -> dict[str, list[Update]]:
    """The updates of one file, by the names of the module."""
    source = lora.checkpoint.source
    entries = _entries(lora, store)
    paths = [name.rpartition(".")[0] for name in shapes]
    by_underscores = {path.replace(".", "_"): path for path in paths}
    found: dict[str, list[Update]] = {}
    unknown: list[str] = []
    misfits: dict[str, str] = {}
    for path, entry in entries.items():
        for leaf, files in _leaves(entry, path, source):
            name = _find(path, leaf, shapes, by_underscores, key_maps)
            if name is None:
                unknown.append(f"{path}.{leaf}")
                continue
            infos = [store.infos[file] for file in files]
            wrong = _misfit([info.shape for info in infos], shapes[name]) or next(
                filter(None, map(_why_refused, infos)), None
            )
            if any(len(update.names) == len(files) for update in found.get(name, [])):
                wrong = f"is changed twice, the second time by {files[0]}"
            if wrong:
                misfits[name] = wrong
                continue
            scale = 1.0
            if files[1:]:
                scale = _scale(entry, store, settings, infos[1].shape[0], source)
            update = Update(store=store, scale=lora.weight * scale, names=files)
            found.setdefault(name, []).append(update)
    if unknown or misfits or not found:
        listing = describe_mismatch([], unknown, misfits, wanted=sorted(shapes), present=[])
        listing = listing.replace("unexpected in the file", "without a target in the model")
        raise CheckpointError(
            f"LoRA {source} does not fit the model, nothing was loaded\n"
            f"{listing or '  it changes no tensor'}"
        )
    return found


def _entries(lora: LoRA, store: TensorStore) -> dict[str, dict[str, str]]:
    """The tensors of a file by the module path that they belong to, as the file spells it."""
    ignored = [re.compile(pattern) for pattern in lora.checkpoint.ignore]
    entries: dict[str, dict[str, str]] = {}
    strange = []
    for name in store.infos:
        if any(pattern.match(name) for pattern in ignored):
            continue
        plain = rename(name, tuple((re.escape(part), "") for part in WRAPPER_MARKERS))
        for kind, pattern in _KINDS.items():
            path, count = re.subn(pattern, "", plain)
            if count:
                entries.setdefault(path, {})[kind] = name
                break
        else:
            strange.append(name)
    if strange:
        raise CheckpointError(
            f"LoRA {lora.checkpoint.source}: {len(strange)} tensors are of no known kind: "
            f"{', '.join(strange[:5])}. Known are lora_A/lora_B, lora_down/lora_up, alpha, diff, "
            "diff_b, diff_m; DoRA, LoHa and LoKr are not"
        )
    return entries


def _leaves(names: Entry, path: str, source: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The parameters that an entry changes: leaf name and the file's tensors."""
    if ("up" in names) != ("down" in names):
        there, absent = ("up", "down") if "up" in names else ("down", "up")
        raise CheckpointError(
            f"LoRA {source}: {path} has {names[there]} but no tensor for {absent}. "
            "Download it again"
        )
    if set(names) == {"alpha"}:
        raise CheckpointError(f"LoRA {source}: {path} has an alpha but no update")
    if "up" in names:
        yield "weight", (names["up"], names["down"])
    for leaf in ("weight", "bias", "modulation"):
        if leaf in names:
            yield leaf, (names[leaf],)


def _misfit(tensors: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> str | None:
    """The reason why an update does not fit a tensor of this shape."""
    if len(tensors) == 1:
        given = tensors[0]
        fits = given == shape
        return None if fits else f"{list(given)} in the file, {list(shape)} in the model"
    up, down = tensors
    if len(up) < 2 or len(down) < 2:
        return f"up {list(up)} and down {list(down)} are not matrices"
    if up[1] == 0:
        return f"up {list(up)} and down {list(down)} have rank 0"
    if up[1] != down[0]:
        return f"rank {up[1]} in up {list(up)}, rank {down[0]} in down {list(down)}"
    if math.prod(up[2:]) != 1 or (up[0], *down[1:]) != shape:
        return f"up {list(up)} by down {list(down)} in the file, {list(shape)} in the model"
    return None


def _why_refused(info: TensorInfo) -> str | None:
    """The reason why a tensor cannot be a part of an update."""
    return info.refused or (None if info.dtype.is_floating_point else f"{info.dtype}, not a float")


def _scale(
    names: Entry, store: TensorStore, settings: Mapping[str, object], rank: int, source: str
) -> float:
    """alpha / rank.

    Raises:
        CheckpointError: an alpha that is not a finite number.
    """
    root = False
    if "alpha" in names:
        name = names["alpha"]
        info = store.infos[name]
        if math.prod(info.shape) != 1 or info.refused:
            shape = quoted(list(info.shape))
            raise CheckpointError(f"LoRA {source}: {shown(name)} {shape} must be a single number")
        alpha: Any = float(next(value for _, value in store.read({name: None})))
    else:
        name, alpha = "lora_alpha of adapter_config.json", settings.get("lora_alpha", rank)
        root = bool(settings.get("use_rslora")) and "lora_alpha" in settings
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not abs(alpha) < MAX_ALPHA:
        raise CheckpointError(f"LoRA {source}: {shown(name)} cannot be {quoted(alpha)}")
    return alpha / (math.sqrt(rank) if root else rank)


def _adapter_settings(path: Path) -> Mapping[str, object]:
    """PEFT's settings beside its weights; empty where there are none.

    Raises:
        CheckpointError: not JSON, or unsupported settings.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(read_text(path, MAX_INDEX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON. Download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} should be a JSON object. Download it again")
    other = [name for name in ("use_dora", "alpha_pattern", "rank_pattern") if settings.get(name)]
    if other:
        raise CheckpointError(f"{path} sets {', '.join(other)}, which is not supported")
    return settings


def _find(
    path: str,
    leaf: str,
    shapes: Mapping[str, tuple[int, ...]],
    by_underscores: Mapping[str, str],
    key_maps: Sequence[KeyMap],
) -> str | None:
    """The model's name of ``leaf`` of a module that a LoRA names, or None."""
    for candidate in _without_prefixes(path):
        name = f"{by_underscores.get(candidate, candidate)}.{leaf}"
        for names in ((), *(key_map.rename for key_map in key_maps)):
            translated = rename(name, names)
            if translated in shapes:
                return translated
    return None


def _without_prefixes(path: str) -> Iterable[str]:
    """The path as it is, and without one known prefix after the other."""
    yield path
    while prefix := next((p for p in _PREFIXES if path.startswith(p)), None):
        path = path.removeprefix(prefix)
        yield path
