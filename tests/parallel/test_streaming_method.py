"""The example with a KV cache, a plan and a control input: small, and the same on 1 to 4 ranks.

Float32 within 1e-5 of the largest latent over a rollout that evicts; strict: bits.
"""

import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.session import Session, key_commands
from flashdreams.parallel.mesh import ParallelConfig
from tests.architecture.sources import EXAMPLES
from tests.harness import run_ranks
from tests.parallel.rollout import relative_error

EXAMPLE = EXAMPLES / "streaming_method"
MAX_NETWORK_LINES = 150
STEPS = 6
"""AR steps of 2 latent frames; 7 fit into sink and window."""

WAYS = {
    "ulysses": {},
    "ring": {"ulysses_degree": 1},
    "tensor": {"tensor_parallel_degree": 2},
}


def example():
    if str(EXAMPLE) not in sys.path:
        sys.path.insert(0, str(EXAMPLE))
    from streaming_method import config, runner

    return SimpleNamespace(pipeline=config.STREAMING_PIPELINE, config=config, runner=runner)


def roll(world_size: int, actions: str = "w6 wl4", strict: bool = False, **degrees):
    """Latents of a rollout that keys steer, and what was installed in the transformer."""
    found = example()
    pipeline = found.pipeline.setup(device="cpu", load=False)
    mesh = pipeline.build_mesh(world_size, ParallelConfig(strict=strict, **degrees))
    installed = pipeline.parallelize(mesh)["transformer"].installed
    pipeline.load()
    pipeline.warm_up()
    controller = found.runner.StreamingMethodRunner.controller(SimpleNamespace())
    session = Session(pipeline, {"text": ["silk"]}, seed=3, controller=controller)
    if torch.distributed.get_rank() == 0:
        for command in key_commands(actions):
            session.submit(command)
    return [session.step().cache.latent.clone() for _ in range(STEPS)], installed


@cache
def on_one_rank(actions: str = "w6 wl4", strict: bool = False):
    return run_ranks(roll, 1, 1, actions, strict)[0][0]


def spread(way: str, world_size: int):
    degrees = dict(WAYS[way])
    if "ulysses_degree" in degrees:
        degrees["ring_degree"] = world_size
    return degrees


def _roll_way(world_size: int, way: str, strict: bool):
    return roll(world_size, strict=strict, **spread(way, world_size))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_share_the_work_and_give_the_latents_of_one(way, world_size):
    for latents, installed in run_ranks(_roll_way, world_size, world_size, way, False):
        assert relative_error(latents, on_one_rank()) <= 1e-5
        strategy = {"ulysses": "UlyssesAttention", "ring": "GatherKVAttention"}.get(way)
        assert strategy in installed if strategy else "sliced layer" in installed


@pytest.mark.parametrize("world_size", [2, 4])
def test_strict_ranks_give_the_same_bits(world_size):
    expected = on_one_rank(strict=True)
    for latents, _ in run_ranks(_roll_way, world_size, world_size, "ulysses", True):
        assert all(torch.equal(a, b) for a, b in zip(latents, expected, strict=True))


def test_keys_steer_it():
    """Negative control: other keys are another rollout, from the frame on that they act on."""
    other = on_one_rank("w6 wj4")
    assert torch.equal(other[0], on_one_rank()[0])
    assert relative_error(other, on_one_rank()) > 1e-2


def test_its_network_file_is_small():
    lines = (EXAMPLE / "streaming_method" / "network.py").read_text("utf-8").splitlines()
    assert len(lines) <= MAX_NETWORK_LINES


def test_the_sink_and_the_window_are_seen():
    """The last step sees the sink: without it the rollout is another one."""
    found = example()
    latents = []
    for sink in (0, 1):
        config = derive_config(
            found.pipeline, diffusion_model={"transformer": {"sink_size_t": sink}}
        )
        pipeline = config.setup(device="cpu")
        session = Session(
            pipeline,
            {"text": ["silk"]},
            seed=3,
            controller=found.runner.StreamingMethodRunner.controller(SimpleNamespace()),
        )
        latents.append([session.step().cache.latent.clone() for _ in range(STEPS)])
    assert torch.equal(latents[0][0], latents[1][0])
    assert not torch.equal(latents[0][-1], latents[1][-1])
