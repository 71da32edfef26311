"""The default tier in bfloat16: no worse than one rank against float32, at every AR step."""

import torch

from flashdreams.parallel.mesh import Mesh, ParallelConfig
from tests.harness import run_ranks
from tests.parallel.rollout import make_mesh, run_case

STEPS = 20


def errors_per_step(world_size):
    meshes = [
        make_mesh(ParallelConfig(), world_size),
        make_mesh(ParallelConfig(tensor_parallel_degree=2), world_size),
    ]
    exact = run_case(Mesh(), "relative_rope", "float32", STEPS)

    def errors(mesh):
        latents = run_case(mesh, "relative_rope", "bfloat16", STEPS)
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(latents, exact)]

    return errors(Mesh()), [errors(mesh) for mesh in meshes]


def test_bfloat16_error_does_not_grow_with_ranks():
    for single, several in run_ranks(errors_per_step, 4, 4):
        for errors in several:
            ratios = torch.tensor(errors) / torch.tensor(single)
            assert len(ratios) == STEPS
            assert float(ratios.max()) <= 1.5, ratios
