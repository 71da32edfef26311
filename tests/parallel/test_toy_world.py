"""The toy world's raw latents and frames on 1, 2, 3 and 4 ranks (float32, 1e-5)."""

from pathlib import Path

import pytest

from flashdreams.integrations.toy_world import config
from tests.harness import run_ranks
from tests.parallel.pipelines import roll
from tests.parallel.rollout import relative_error

STEPS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
        reason="needs the toy world's weights",
    ),
]


def test_the_toy_world_is_the_same_on_any_number_of_ranks():
    latents, frames, state = run_ranks(roll, 1, "toy_world", 1, 0, STEPS, None)[0]
    for world_size in (2, 3, 4):
        for rank in run_ranks(roll, world_size, "toy_world", world_size, 0, STEPS, None):
            assert relative_error(rank[0], latents) <= 1e-5
            assert relative_error(rank[1], frames) <= 1e-5
    lost = "conditional/caches/blocks.*.self_attn.core/0/v"
    args = ("toy_world", 1, STEPS, STEPS + 1, state, False, None)
    whole, without = run_ranks(roll, 1, *args)[0], run_ranks(roll, 1, *args, lost)[0]
    assert relative_error(whole[0], without[0]) > 1e-3
