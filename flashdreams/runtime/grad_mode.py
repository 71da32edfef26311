"""The mode of autograd in which rollouts run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def grad_off() -> AbstractContextManager[object]:
    """A context under ``torch.no_grad`` and never in ``torch.inference_mode``.

    Tensors that are made in inference mode can be written in that mode alone, so a rollout that is
    begun in it could not go on outside. Costs nothing where both modes are as wanted.
    """
    if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
        return nullcontext()
    modes = ExitStack()
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
