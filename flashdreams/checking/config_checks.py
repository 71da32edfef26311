"""Checks of a method that need no rollout: its config, and its build on the meta device."""

from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.checking.report import Problem
from flashdreams.checking.subject import Subject
from flashdreams.infra.component import Component
from flashdreams.infra.config import config_fields, derive_config, is_config
from flashdreams.infra.config_file import dump_config, load_config

COMPONENTS = ("text_encoder", "image_encoder", "encoder", "decoder")


def check_config(subject: Subject) -> str:
    """The config is unchanged by a file round trip and an empty derivation.

    Raises:
        Problem: names the field.
    """
    full = subject.full
    try:
        again = load_config(dump_config(full), [full], "the file")
    except (TypeError, ValueError) as error:
        raise Problem(
            f"the config cannot be written to a file and read back: {error} Keep configs to "
            "numbers, strings, paths, enums, lists, dicts and configs, all annotated."
        ) from error
    for other, how in ((again, "read back from a file"), (derive_config(full), "derived")):
        where = _difference(full, other, "")
        if where is not None:
            raise Problem(
                f"{where} has another value once the config is {how}. A value that __post_init__ "
                "computes belongs in field(init=False); a field needs an annotation."
            )
    return f"{len(dump_config(full).splitlines())} lines of YAML, read back equal"


def _difference(a: Any, b: Any, path: str) -> str | None:
    """Dotted name of the first field in which two configs differ."""
    if is_config(a) and type(a) is type(b):
        for name in config_fields(a):
            found = _difference(getattr(a, name), getattr(b, name), f"{path}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if a == b else path or type(a).__name__


def check_meta(subject: Subject) -> str:
    """Every component is built on the meta device at full size, so weights can come from files.

    Raises:
        Problem: names the tensor that is on another device.
    """
    pipeline, counts = subject.full.pipeline, []
    configs = {name: getattr(pipeline, name) for name in COMPONENTS}
    for name, config in {**configs, "transformer": pipeline.diffusion_model.transformer}.items():
        if config is None:
            continue
        with torch.device("meta"):
            component = config.setup()
        drawn = _drawn_parts(component)
        for tensor_name, tensor, what in _tensors(component):
            if tensor_name.startswith(drawn):
                continue
            if what != "attribute" and not tensor.is_meta:
                raise Problem(
                    f"{name}: {tensor_name} is on {tensor.device} after a build on the meta "
                    "device, so it takes memory before weights are read. Create it without "
                    "device= and without reading values; fill buffers in init_buffers."
                )
            if what == "attribute" and tensor.is_meta:
                raise Problem(
                    f"{name}: {tensor_name} is a plain attribute and would stay on the meta "
                    "device. Use register_buffer(name, tensor, persistent=False) and fill it in "
                    "init_buffers."
                )
        total = sum(parameter.numel() for parameter in component.parameters())
        counts.append(f"{name} {total / 1e6:.1f}M")
    _check_buffers(subject)
    return "at full size, parameters: " + ", ".join(counts)


def _drawn_parts(component: nn.Module) -> tuple[str, ...]:
    """Prefixes of the components inside that no file gives weights to; they are drawn at once."""
    return tuple(
        f"{name}."
        for name, module in component.named_modules()
        if name and isinstance(module, Component) and module.config.checkpoint is None
    )


def _check_buffers(subject: Subject) -> None:
    """``init_buffers`` fills the buffers that a build on the meta device leaves empty."""
    pipeline = subject.config.pipeline
    configs = {name: getattr(pipeline, name) for name in COMPONENTS}
    for name, config in {**configs, "transformer": pipeline.diffusion_model.transformer}.items():
        if config is None:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = config.setup()
            with torch.device("meta"):
                component = config.setup()
        component.load_state_dict(built.state_dict(), assign=True)
        component.init_buffers()
        wanted = dict(built.named_buffers())
        for buffer_name, buffer in component.named_buffers():
            if buffer.is_meta or not torch.equal(buffer, wanted[buffer_name]):
                raise Problem(
                    f"{name}: the buffer {buffer_name} is not filled after a build on the meta "
                    "device. It is not in checkpoints (persistent=False), so compute it in "
                    "init_buffers as in __init__."
                )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor, str]]:
    """Parameters, buffers and plain tensor attributes by dotted name."""
    found = [(name, x.data, "parameter") for name, x in module.named_parameters()]
    found += [(name, x, "buffer") for name, x in module.named_buffers()]
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, Tensor):
                found.append((f"{path}.{name}".lstrip("."), value, "attribute"))
    return found
