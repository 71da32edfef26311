"""The batched optimiser of the toy worlds' training beside PyTorch's own."""

import torch
from torch import Tensor, nn

from training.toy_world.muon import BatchedMuon

SHAPES = [(8, 8), (12, 6), (6, 12), (12, 6), (6, 12)]
STEPS = 4
ATOL = 0.02
"""Of steps whose singular values are near 1, computed in bfloat16."""


def moved(make) -> list[Tensor]:
    """How far the same gradients have moved each matrix, in learning rates."""
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = make(matrices)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=draw)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def largest_difference(**changes: float) -> float:
    plain = moved(lambda m: torch.optim.Muon(m, lr=1.0, momentum=0.95, weight_decay=0.0))
    ours = moved(lambda m: BatchedMuon(m, **{"lr": 1.0, "momentum": 0.95, **changes}))
    return max(float((a - b).abs().max()) for a, b in zip(plain, ours, strict=True))


def test_steps_are_those_of_pytorch():
    assert largest_difference() < ATOL


def test_other_numbers_are_other_steps():
    """Negative control."""
    assert largest_difference(momentum=0.9) > 5 * ATOL
    assert largest_difference(lr=1.1) > 5 * ATOL


def test_a_matrix_without_a_gradient_stays_where_it_is():
    matrices = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    matrices[0].grad = torch.eye(4)
    BatchedMuon(matrices, lr=0.1).step()
    assert not torch.equal(matrices[0], torch.ones(4, 4))
    assert torch.equal(matrices[1], torch.ones(4, 4))
