"""Muon for many small matrices: those of one shape are orthogonalised together.

PyTorch's implementation handles one matrix at a time with some 25 launches each, which together
take longer than a training step of a network of this size on a GPU.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of Jordan et al., as in torch.optim.Muon
_ROUNDS = 5


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum, then the nearest orthogonal matrix.

    Its steps equal those of ``torch.optim.Muon`` without weight decay, up to bfloat16 rounding.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """Create the optimizer.

        Args:
            matrices: 2-D parameters.
            lr: learning rate.
            momentum: decay of the running mean of gradients, 0 to 1.
        """
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._step(parameters, group["lr"], group["momentum"])

    def _step(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
        means = [self.state[p]["mean"] for p in parameters]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, means, momentum)
        directions = orthogonalised(torch.stack(updates))
        rows, columns = parameters[0].shape
        scale = lr * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(parameters, list(directions.to(parameters[0].dtype)), alpha=-scale)


def orthogonalised(batch: Tensor) -> Tensor:
    """Matrices ``[N, rows, columns]`` with nearly equal singular values, in bfloat16."""
    tall = batch.shape[1] > batch.shape[2]
    x = (batch.mT if tall else batch).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
