"""The default tier in bfloat16: no worse than one rank against float32, at every AR step."""

import torch

from flashdreams.parallel.mesh import ParallelConfig
from tests.harness import run_ranks
from tests.parallel.rollout import make_mesh, run_case, single_rank, step_errors

STEPS = 20


def rollouts(configs):
    return [
        run_case(make_mesh(config, 2), "relative_rope", "bfloat16", STEPS) for config in configs
    ]


def test_bfloat16_error_does_not_grow_with_ranks():
    exact = single_rank("relative_rope", "float32", STEPS)
    single = step_errors(single_rank("relative_rope", "bfloat16", STEPS), exact)
    configs = [ParallelConfig(), ParallelConfig(tensor_parallel_degree=2)]
    for latents in run_ranks(rollouts, 2, configs):
        for several in latents:
            ratios = torch.tensor(step_errors(several, exact)) / torch.tensor(single)
            assert len(ratios) == STEPS
            assert float(ratios.max()) <= 1.5, ratios
