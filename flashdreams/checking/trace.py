"""A record of the torch calls of a network, with those that a GPU could not run well."""

import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_HOST = "_flashdreams_on_host"
_MADE = "_flashdreams_made_in"

FACTORIES = frozenset(
    {"arange", "zeros", "ones", "full", "tensor", "linspace", "logspace", "empty", "eye", "rand",
     "randn", "randint", "randperm", "scalar_tensor", "as_tensor", "from_numpy"}
)  # fmt: skip
"""Functions that create tensors on the host by default."""

SYNCS = frozenset(
    {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__",
     "__complex__", "__array__", "nonzero", "argwhere", "unique", "unique_consecutive",
     "masked_select", "is_nonzero", "equal", "allclose", "bincount"}
)  # fmt: skip
"""Functions whose result the host has to wait for."""

MOVES = frozenset({"to", "cuda", "type_as"})

READ_ONLY = frozenset({"__get__", "size", "dim", "stride", "data_ptr", "numel", "is_contiguous",
                       "element_size", "__len__", "is_floating_point", "storage_offset", "ndim",
                       "shape", "requires_grad_"})  # fmt: skip
"""Functions that read a tensor's metadata, not its values."""


class Recorder(TorchFunctionMode):
    """Records torch calls on a CPU as if it were a GPU.

    Existing tensors count as device tensors. A tensor that is created without ``device=``
    is a host tensor until it is moved with ``.to``; using both in one operation, and reading
    the value of a device tensor, are recorded with their source locations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        """Name and all arguments except the values of tensors."""
        self.places: list[str] = []
        """Where each call is in the source."""
        self.read: list[int] = []
        """Addresses of tensors that were made before the recording, in the order of their use."""
        self.read_places: list[str] = []
        self.syncs: list[str] = []
        """Places where the host waits for the device."""
        self.mixes: list[str] = []
        """Places where a host tensor is combined with a device tensor."""
        self._key = object()
        self.ignored: set[int] = set()
        """Addresses that may change: arguments that are copied for every call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record one call."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        inputs = _tensors((args, kwargs))
        if name in READ_ONLY:
            out = func(*args, **kwargs)
            return self._note_results(name, args, kwargs, inputs, out)
        place = _place()
        self._look_at(name, args, kwargs, inputs, place)
        out = func(*args, **kwargs)
        return self._note_results(name, args, kwargs, inputs, out)

    def _look_at(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], place: str) -> None:
        device = [x for x in inputs if not getattr(x, _HOST, False)]
        self.calls.append((name, tuple(_form((args, kwargs)))))
        self.places.append(place)
        for x in device:
            known = getattr(x, _MADE, None) is self._key or x.data_ptr() in self.ignored
            if not known:
                self.read.append(x.data_ptr())
                self.read_places.append(place)
        masked = name in ("__getitem__", "__setitem__") and any(
            x.dtype == torch.bool for x in inputs[1:]
        )
        to_cpu = name == "to" and "cpu" in [
            a for a in (*args[1:], kwargs.get("device")) if isinstance(a, str)
        ]
        if device and (name in SYNCS or masked or to_cpu):
            what = "a boolean mask as index" if masked else f".{name}()"
            self.syncs.append(f"{what} at {place}")
        host = [x for x in inputs if getattr(x, _HOST, False) and x.ndim > 0]
        indexing = name in ("__getitem__", "__setitem__", "copy_", *MOVES)
        if device and host and not indexing:
            self.mixes.append(f"{name} at {place}")

    def _note_results(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
    ) -> Any:
        device = [x for x in inputs if not getattr(x, _HOST, False)]
        where = kwargs.get("device")
        told = where is not None or any(isinstance(a, torch.device) for a in args[1:])
        if where == "cpu":  # x.device is not a string
            told = False
        moved = name in MOVES and (told or any(isinstance(a, Tensor | str) for a in args[1:]))
        if moved and isinstance(out, Tensor) and getattr(out, _HOST, False):
            out = out.view(out.shape)  # a new tensor: the host tensor stays on the host
            setattr(out, _HOST, False)
        on_host = (name in FACTORIES and not told and not device) or (
            bool(inputs) and not device and not moved
        )
        for x in _tensors(out):
            if any(x is given for given in inputs):
                continue
            setattr(x, _MADE, self._key)
            if on_host:
                setattr(x, _HOST, True)
        return out


def mark_host(x: Tensor) -> Tensor:
    """A tensor of the same values that counts as one of the host."""
    copy = x.clone()
    setattr(copy, _HOST, True)
    return copy


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _form(value: Any) -> Iterable[Any]:
    """Shapes and types of tensors, and plain values as they are."""
    if isinstance(value, Tensor):
        yield (tuple(value.shape), str(value.dtype))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _form(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _form(item)
    elif value is None or isinstance(value, bool | int | float | str):
        yield value
    else:
        yield type(value).__name__


def _place() -> str:
    """File and line of the innermost caller outside of torch and this file."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack(limit=24)[:-2]):
        if frame.filename != __file__ and not frame.filename.startswith(torch_folder):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return "an unknown place"
