"""The canonical form of a rollout: plain tensors and numbers that know no number of ranks.

``{"format": 1, "values": ..., "tensors": {name: tensor}}``: ``values`` may be written as JSON,
``tensors`` (contiguous, on the CPU) as safetensors. A value that stands for a tensor says its
shape, type and memory format; the tensor's name is the path that leads to that value.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from torch import Tensor

from flashdreams.infra.diffusion.model import CleanChunk
from flashdreams.parallel.environment import broadcast_from_rank_zero, from_rank_zero, group_rank
from flashdreams.parallel.rollout import RolloutExchange
from flashdreams.runtime.noise import NoiseFunction, NoiseSource

if TYPE_CHECKING:
    from flashdreams.infra.pipeline import StreamInferencePipeline, StreamInferencePipelineCache

FORMAT = 1
"""Number of the form; a state of another one is refused."""

HALVES = ("conditional", "unconditional")

_MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

RolloutState = dict[str, Any]
"""What ``cache.state_dict()`` returns on rank zero."""

Emit = Callable[[str, Tensor], Tensor]
"""Takes a tensor under its path; returns the whole of it, of which a rank may hold a part."""

Take = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""The tensor of a path, shape and type: this rank's part of it."""


def export_rollout(
    pipeline: "StreamInferencePipeline", cache: "StreamInferencePipelineCache"
) -> RolloutState | None:
    """Put a rollout into its canonical form; a collective call, one tensor at a time.

    Returns:
        The form on rank zero, None on all others.

    Raises:
        ValueError: a chunk is generated and not yet finalized.
        TypeError: state of a component that has no plain form.
    """
    if cache.pending:
        raise ValueError(
            "A rollout has no canonical form between generate and finalize. Call "
            f"pipeline.finalize(autoregressive_index={cache.next_index - 1}, cache=cache) first."
        )
    pipeline.diffusion_model.side.join()
    exchange, diffusion = pipeline.exchange, cache.diffusion
    tensors: dict[str, Tensor] = {}

    def keep(path: str, x: Tensor) -> Tensor:
        if group_rank() == 0:
            tensors[path] = x.detach().to("cpu", copy=True).contiguous()
        return x

    codec = StateCodec(pipeline.target_device)
    values: dict[str, Any] = {
        "name": pipeline.config.name,
        "seed": diffusion.noise.seed if isinstance(diffusion.noise, NoiseSource) else None,
        "next_index": cache.next_index,
        "context": codec.encode(cache.context, "context", keep),
        "negative_text": codec.encode(cache.negative_text, "negative_text", keep),
        "latent": codec.encode(diffusion.latent, "latent", keep),
        "history": codec.encode(diffusion.history, "history", keep),
    }
    values |= _encode_halves(codec, exchange, diffusion, keep)
    values["encoder"] = codec.encode(cache.encoder, "encoder", keep)
    values["decoder"] = codec.encode(exchange.whole_decoder(cache.decoder), "decoder", keep)
    if group_rank() != 0:
        return None
    return {"format": FORMAT, "values": values, "tensors": tensors}


def _encode_halves(
    codec: "StateCodec", exchange: RolloutExchange, diffusion: Any, keep: Emit
) -> dict[str, Any]:
    """The transformer's cache under the prompt and, for a guided model, without it."""
    values: dict[str, Any] = {}
    for name in HALVES:
        branch = getattr(diffusion, name)
        if branch is None:
            values[name] = None
            continue

        def emit(path: str, x: Tensor, name: str = name) -> Tensor:
            whole = exchange.gather(path, x)
            for half, part in exchange.gather_halves(whole, name).items():
                keep(f"{half}/{path}", part)
            return whole

        values[name] = codec.encode(branch, "", emit, exchange.rebuilt)
    if exchange.halves_apart:  # each half's ranks know the form of their own, and it is the same
        values = dict.fromkeys(HALVES, values["conditional"] or values["unconditional"])
    return values


def import_rollout(
    pipeline: "StreamInferencePipeline",
    state: RolloutState | None,
    noise: NoiseFunction | None = None,
) -> "StreamInferencePipelineCache":
    """Go on with a rollout, on any number of ranks; a collective call, one tensor at a time.

    Args:
        pipeline: of the config that the rollout was begun with.
        state: the canonical form; what counts is rank zero's, the others may give None.
        noise: takes the place of the seeded noise; needed if the rollout was begun with one.

    Raises:
        ValueError: another format, pipeline or window, or a noise callable that is missing.
    """
    values = from_rank_zero(lambda: _checked_values(state, pipeline.config.name))
    seed, exchange = values["seed"], pipeline.exchange
    if noise is None and seed is None:
        raise ValueError(
            "The rollout was begun with a noise callable, which is not part of its state. "
            "Give it again: pipeline.load_cache(state, noise=...)."
        )

    def take(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stored = state["tensors"][path] if state is not None and group_rank() == 0 else None
        return broadcast_from_rank_zero(stored, shape, dtype)

    transformer = pipeline.diffusion_model.transformer
    parts = [transformer, pipeline.encoder, pipeline.decoder]
    makers = [part.initialize_cache for part in parts if hasattr(part, "initialize_cache")]
    classes = known_classes(*makers, *(p.forward for p in parts[1:] if p is not None))
    codec = StateCodec(pipeline.target_device, {**classes, CleanChunk.__name__: CleanChunk})
    cache = pipeline.new_cache(
        codec.restore(values["context"], "context", take),
        codec.restore(values["negative_text"], "negative_text", take),
        noise or NoiseSource(seed),
    )
    cache.next_index, diffusion = values["next_index"], cache.diffusion
    diffusion.latent = codec.restore(values["latent"], "latent", take)
    diffusion.history = codec.restore(values["history"], "history", take)
    for name in HALVES:

        def take_part(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            _, _, inner = path.partition("/")
            return exchange.shard(inner, take(path, shape, dtype))

        branch = getattr(diffusion, name)
        if branch is None:
            codec.skip(values[name], name, take)
        else:
            codec.restore(values[name], name, take_part, branch)
    cache.encoder = codec.restore(values["encoder"], "encoder", take, cache.encoder)
    decoder = exchange.whole_decoder(cache.decoder)
    restored = codec.restore(values["decoder"], "decoder", take, decoder)
    cache.decoder = cache.decoder if restored is decoder else restored
    return cache


def _checked_values(state: RolloutState | None, name: str) -> dict[str, Any]:
    if state is None or not {"format", "values", "tensors"} <= set(state):
        raise ValueError(
            "Rank zero needs the state of a rollout: what cache.state_dict() returned there."
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"The state has format {state['format']}; this release reads format {FORMAT}."
        )
    if state["values"]["name"] != name:
        raise ValueError(
            f"The state is of a rollout of {state['values']['name']!r}; this pipeline is {name!r}."
        )
    return state["values"]


class StateCodec:
    """Turns state into values and tensors, and back into objects of known classes.

    Plain are numbers, strings, None, tensors, devices, lists, tuples, mappings with string keys,
    dataclasses of these, and objects with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, device: torch.device, classes: Mapping[str, type] | None = None) -> None:
        """Prepare.

        Args:
            device: where the pipeline runs; tensors that lie elsewhere are host tensors.
            classes: dataclasses that may be made anew, by name.
        """
        self.device = device
        self.classes = classes or {}

    def encode(
        self, value: Any, path: str, emit: Emit, without: frozenset[str] = frozenset()
    ) -> Any:
        """The values of ``value``; its tensors go to ``emit`` under their paths.

        Args:
            value: what is to be written.
            path: prefix of the tensors' names.
            emit: takes the tensors.
            without: fields of a dataclass that are left out.

        Raises:
            TypeError: something that has no plain form.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._describe(value, emit(path, value))
        if isinstance(value, torch.device):
            return {"kind": "device"}
        if hasattr(value, "load_state_dict"):
            state = value.state_dict()
            return {"kind": "object", "parts": self._encode_all(state, path, emit)}
        if is_dataclass(value):
            named = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in without}
            name = type(value).__name__
            return {"kind": name, "parts": self._encode_all(named, path, emit)}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"kind": "mapping", "parts": self._encode_all(value, path, emit)}
        if type(value) in (list, tuple):
            items = [self.encode(x, _join(path, str(i)), emit) for i, x in enumerate(value)]
            return items if isinstance(value, list) else {"kind": "tuple", "items": items}
        raise TypeError(
            f"{path}: a {type(value).__name__} has no plain form. Keep rollout state in tensors, "
            "numbers, lists, dicts with string keys and dataclasses, or give its class "
            "state_dict() and load_state_dict(state)."
        )

    def _encode_all(self, parts: Mapping[str, Any], path: str, emit: Emit) -> dict[str, Any]:
        return {name: self.encode(x, _join(path, name), emit) for name, x in parts.items()}

    def _describe(self, own: Tensor, whole: Tensor) -> dict[str, Any]:
        order = next(
            (n for n, f in _MEMORY_FORMATS.items() if _has_format(own, f)),
            None,
        )
        return {
            "kind": "tensor",
            "shape": list(whole.shape),
            "dtype": str(whole.dtype)[6:],
            "order": order,
            "host": own.device.type != self.device.type,
        }

    def restore(self, value: Any, path: str, take: Take, into: Any = None) -> Any:
        """What ``encode`` was given, from its values and tensors.

        Args:
            value: from ``encode``.
            path: as there.
            take: gives the tensors; called in the order in which they were emitted.
            into: a fresh object of the same kind, filled in place where it can be.

        Raises:
            ValueError: a class that is not known, or state that does not fit ``into``.
        """
        if isinstance(value, list):
            return self._restore_items(value, path, take, into)
        if not isinstance(value, dict):
            return value
        kind = value["kind"]
        if kind == "tensor":
            return self._restore_tensor(value, path, take, into)
        if kind == "device":
            return self.device
        if kind == "tuple":
            return tuple(self._restore_items(value["items"], path, take, into))
        parts = {
            name: self.restore(x, _join(path, name), take, _part(into, name, kind))
            for name, x in value["parts"].items()
        }
        if kind == "mapping":
            return parts
        if kind == "object":
            if into is None:
                raise ValueError(f"{path}: nothing here that could take the state of an object.")
            into.load_state_dict(parts)
            return into
        return self._restore_dataclass(kind, parts, path, into)

    def skip(self, value: Any, path: str, take: Take) -> None:
        """Take the tensors of ``value`` in their turn and drop them."""
        if isinstance(value, dict) and value["kind"] == "tensor":
            take(path, tuple(value["shape"]), getattr(torch, value["dtype"]))
        elif isinstance(value, list):
            for i, x in enumerate(value):
                self.skip(x, _join(path, str(i)), take)
        elif isinstance(value, dict):
            self.skip(value.get("items"), path, take)
            for name, x in value.get("parts", {}).items():
                self.skip(x, _join(path, name), take)

    def _restore_items(self, items: list[Any], path: str, take: Take, into: Any) -> list[Any]:
        same = isinstance(into, list | tuple) and len(into) == len(items)
        places = into if same else [None] * len(items)
        restored = [
            self.restore(x, _join(path, str(i)), take, place)
            for i, (x, place) in enumerate(zip(items, places, strict=True))
        ]
        if not (same and isinstance(into, list)):
            return restored
        into[:] = restored  # others may refer to this very list
        return into

    def _restore_tensor(self, value: Any, path: str, take: Take, into: Any) -> Tensor:
        x = take(path, tuple(value["shape"]), getattr(torch, value["dtype"]))
        x = x.to("cpu" if value["host"] else self.device)
        if value["order"] is not None:
            x = x.contiguous(memory_format=_MEMORY_FORMATS[value["order"]])
        fits = isinstance(into, Tensor) and into.shape == x.shape and into.dtype == x.dtype
        return into.copy_(x) if fits else x.clone()

    def _restore_dataclass(self, kind: str, parts: dict[str, Any], path: str, into: Any) -> Any:
        if into is None:
            if kind not in self.classes:
                raise ValueError(
                    f"{path}: no known class {kind!r}. Name it in the annotations of the "
                    "component's initialize_cache or forward."
                )
            return self.classes[kind](**parts)
        for name, part in parts.items():
            setattr(into, name, part)
        return into


def known_classes(*functions: Callable[..., Any]) -> dict[str, type]:
    """Dataclasses that the annotations of functions name, and those that their fields name."""
    found: dict[str, type] = {}
    for function in functions:
        _collect_classes(function, found)
    return found


def _collect_classes(annotated: Any, found: dict[str, type]) -> None:
    try:
        waiting = list(get_type_hints(annotated).values())
    except NameError:  # named for type checkers only: nothing that could be made here
        return
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if isinstance(hint, type) and is_dataclass(hint) and hint.__name__ not in found:
            found[hint.__name__] = hint
            _collect_classes(hint, found)


def _part(into: Any, name: str, kind: str) -> Any:
    if into is None or kind == "object":
        return None
    return into.get(name) if isinstance(into, Mapping) else getattr(into, name, None)


def _has_format(x: Tensor, memory_format: torch.memory_format) -> bool:
    dims = 4 if memory_format == torch.channels_last else 5
    return x.ndim == dims and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
