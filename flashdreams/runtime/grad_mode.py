"""The modes of PyTorch in which rollouts run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST = ("cpu", "cuda")


def grad_off() -> AbstractContextManager[object]:
    """A context under ``torch.no_grad``, never in ``torch.inference_mode`` nor under autocast.

    Tensors that are made in inference mode can be written in that mode alone, so a rollout that is
    begun in it could not go on outside. Types of intermediate values are the config's, which the
    autocast of a program around the pipeline would change; a component may use its own. Costs
    nothing where all modes are as wanted.
    """
    cast = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    if not (cast or torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
        return nullcontext()
    modes = ExitStack()
    for kind in cast:
        modes.enter_context(torch.autocast(kind, enabled=False))
    # Leaving inference mode switches gradients on, so no_grad comes inside of it.
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.no_grad())
    return modes


def without_grad(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run within `grad_off`."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with grad_off():
            return function(*args, **kwargs)

    return called
