"""The mode of autograd in which rollouts run."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def without_grad(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run under ``torch.no_grad`` and never in ``torch.inference_mode``.

    Tensors that are made in inference mode can be written in that mode alone, so a rollout that is
    begun in it could not go on outside.
    """
    # Leaving inference mode switches gradients on, so no_grad comes inside of it.
    changed = torch.inference_mode(False)(torch.no_grad()(function))

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        # To enter a mode costs microseconds in every AR step, also where it is on already.
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            return changed(*args, **kwargs)
        return function(*args, **kwargs)

    return called
