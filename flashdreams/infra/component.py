"""The common base of all pipeline components."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from flashdreams.infra.config import InstantiateConfig
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    LoRA,
    concerning,
    load_checkpoint,
    merge_loras,
    parse_lora,
)
from flashdreams.runtime.offload import offload

ComponentT = TypeVar("ComponentT", bound="Component")
DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class ComponentConfig(InstantiateConfig):
    """The fields that every component config has."""

    _target: type["Component"] = field(default_factory=lambda: Component)

    packages: ClassVar[Mapping[str, str]] = {}
    """Optional packages that the component imports: module -> pip requirement. A runner
    checks them before it builds anything."""

    checkpoint: CheckpointConfig | None = None
    """Where the weights come from; None leaves the parameters as they were initialised."""

    dtype: DTypeName = "float32"
    """Storage dtype of the parameters. Internal computations that need more precision keep it."""


class Component(nn.Module):
    """A plain, single-device module that is built from its config and holds no rollout state.

    Subclasses call ``super().__init__(config)`` and then build their layers. The pipeline builds
    components that name a checkpoint on the meta device, loads them, and calls ``init_buffers``;
    all others are initialised where they are built.
    """

    config: ComponentConfig

    def __init__(self, config: ComponentConfig) -> None:
        super().__init__()
        self.config = config
        self._runs_on: torch.device | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the parameters."""
        return getattr(torch, self.config.dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """Storage type of one parameter or floating-point buffer; a subclass may override it.

        Args:
            name: as in ``named_parameters``.
        """
        return self.dtype

    def run_on(self, device: torch.device) -> None:
        """Compute on a device while the weights stay where they are; see `offload`."""
        self._runs_on = device
        offload(self, device)

    def cast(self: ComponentT) -> ComponentT:
        """Cast every parameter and floating-point buffer to its storage dtype, in place."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(self.dtype_of(name))
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters and buffers, unless these are offloaded; otherwise the CPU."""
        if self._runs_on is not None:
            return self._runs_on
        for tensor in self._tensors():
            return tensor.device
        return torch.device("cpu")

    def check_device(self, device: torch.device) -> None:
        """Refuse a device on which this config cannot run; called before any weights are read.

        Raises:
            ValueError: says what is missing and what to set instead.
        """

    def parallel_plan(self) -> ParallelPlan | None:
        """How this component may be split; None: every rank runs all of it."""
        return None

    @property
    def loads_parts(self) -> bool:
        """Whether nested components load their own weights, from their own configs."""
        return self.config.checkpoint is None

    def loras(self) -> list[LoRA]:
        """The LoRAs to merge into the weights that this component loads.

        They are downloaded if its checkpoint may be.
        """
        checkpoint = self.config.checkpoint
        download = checkpoint is not None and checkpoint.download
        return [parse_lora(text, download=download) for text in getattr(self.config, "loras", ())]

    def init_buffers(self) -> None:
        """Fill the non-persistent buffers after a build on the meta device."""

    def after_load(self) -> None:
        """Update what depends on the weights; called once they are loaded, split and in place."""
        if type(self).finish_loading is not Component.finish_loading:
            warnings.warn(
                f"{type(self).__name__}.finish_loading is now after_load; the old name will "
                "be removed in 0.3.",
                DeprecationWarning,
                stacklevel=2,
            )
            self.finish_loading()

    def finish_loading(self) -> None:
        """Deprecated name of ``after_load``."""

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.parameters()
        yield from self.buffers()


def build_component(config: ComponentConfig | None) -> Any:
    """Set up a component, on the meta device if a checkpoint will give its weights.

    It draws from its own generator, which is seeded with one number of the current one. So its
    weights do not depend on the other components.

    Args:
        config: None for a component that the pipeline does not have.

    Returns:
        The component, or None.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    if config is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        with torch.device("cpu" if config.checkpoint is None else "meta"):
            return config.setup()


def load_component(
    component: Component, device: torch.device, slices: Mapping[str, Any] | None = None
) -> None:
    """Load one component and move it to its device and dtype.

    One that ``loads_parts`` may be made of others that have checkpoints. The weights of one whose
    config says ``offload`` stay on the CPU.

    Args:
        component: on the meta device where it names a checkpoint.
        device: where it will run.
        slices: this rank's parts, by parameter.

    Raises:
        CheckpointError: weights are missing or do not fit; see ``load_checkpoint``.
    """
    parts = _parts_that_load(component, slices)
    for part, own in parts:
        load_component(part, device, own)
    home = torch.device("cpu") if getattr(component.config, "offload", False) else device
    loras, checkpoint = component.loras(), component.config.checkpoint
    if checkpoint is not None and not component.loads_parts:
        dtype_of = component.dtype_of
        with concerning(checkpoint):
            load_checkpoint(
                component, checkpoint, device=home, dtype=dtype_of, slices=slices, loras=loras
            )
        component.init_buffers()
    elif loras:
        merge_loras(component, loras, slices=slices)
    if not parts:  # these keep their own dtypes: a pipeline may mix them
        component.cast()
    component.to(home)
    if home != device:
        component.run_on(device)
    component.after_load()


def check_weights(component: Component, slices: Mapping[str, Any] | None = None) -> None:
    """Compare a component with its checkpoint and its LoRAs; reads headers only.

    Args:
        component: including nested ones, as for `load_component`.
        slices: this rank's parts, by parameter.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit.
    """
    for part, own in _parts_that_load(component, slices):
        check_weights(part, own)
    loras, checkpoint = component.loras(), component.config.checkpoint
    if checkpoint is not None and not component.loads_parts:
        with concerning(checkpoint):
            load_checkpoint(component, checkpoint, device="meta", slices=slices, loras=loras)


def _parts_that_load(
    component: Component, slices: Mapping[str, Any] | None
) -> list[tuple[Component, dict[str, Any] | None]]:
    """The nested components that load their own weights, each with its part of ``slices``."""
    found = nested_components(component) if component.loads_parts else {}
    return [(part, slices_of_part(name, slices)) for name, part in found.items()]


def nested_components(component: Component) -> dict[str, Component]:
    """The directly nested components of a component, by their dotted names in it."""
    found: dict[str, Component] = {}
    waiting: list[tuple[str, nn.Module]] = list(component.named_children())
    for name, module in waiting:
        if isinstance(module, Component):
            found[name] = module
        else:
            waiting.extend((f"{name}.{leaf}", child) for leaf, child in module.named_children())
    return found


def slices_of_part(name: str, slices: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The slices of a component inside another, from those of the whole.

    Args:
        name: of the part.
        slices: by parameter of the whole.
    """
    if slices is None:
        return None
    start = f"{name}."
    return {n.removeprefix(start): part for n, part in slices.items() if n.startswith(start)}


def declared_context(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the keyword arguments that a component's method declares."""
    # Cached by the function of the class: AR steps need it, and no component is kept alive.
    method = getattr(function, "__func__", None)
    return _keyword_names(function if method is None else method, method is not None)


@lru_cache(maxsize=1024)
def _keyword_names(function: Callable[..., Any], is_method: bool) -> frozenset[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[is_method:]
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


def select_context(function: Callable[..., Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``context`` that ``function`` declares."""
    names = declared_context(function)
    return {name: value for name, value in context.items() if name in names}
