"""The default tier in bfloat16: no worse than one rank against float32, at every AR step."""

import pytest
import torch

from flashdreams.parallel import collectives
from flashdreams.parallel.mesh import ParallelConfig
from tests.harness import run_ranks
from tests.parallel.rollout import make_mesh, run_case, single_rank, step_errors

STEPS = 20
ALLOWED_RATIO = 1.5


def rollouts(configs, world_size):
    return [
        run_case(make_mesh(config, world_size), "relative_rope", "bfloat16", STEPS)
        for config in configs
    ]


def error_ratios(latents):
    """Error against float32 of each AR step, over that of the bfloat16 run on one rank."""
    exact = single_rank("relative_rope", "float32", STEPS)
    single = step_errors(single_rank("relative_rope", "bfloat16", STEPS), exact)
    return torch.tensor(step_errors(latents, exact)) / torch.tensor(single)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bfloat16_error_does_not_grow_with_ranks(world_size):
    configs = [ParallelConfig()]
    if world_size == 2:
        configs.append(ParallelConfig(tensor_parallel_degree=2))
    for latents in run_ranks(rollouts, world_size, configs, world_size):
        for several in latents:
            ratios = error_ratios(several)
            assert len(ratios) == STEPS
            assert float(ratios.max()) <= ALLOWED_RATIO, ratios


def without_exchange():
    collectives.Channel.all_to_all = lambda self, x: x.clone()
    return rollouts([ParallelConfig()], 2)[0]


def test_bfloat16_bound_sees_a_forgotten_exchange():
    for wrong in run_ranks(without_exchange, 2):
        assert float(error_ratios(wrong).max()) > 2 * ALLOWED_RATIO
