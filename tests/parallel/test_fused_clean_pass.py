"""Fused clean passes on 2 ranks against plain ones on one (float32, 1e-5)."""

from dataclasses import replace

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.encoder.base import EncoderConfig
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import run_ranks
from tests.parallel.rollout import relative_error
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_pipeline

STRATEGIES = {
    "ulysses": ParallelConfig(cfg_parallel_degree=1),
    "gather": ParallelConfig(ulysses_degree=1, ring_degree=2),
    "tensor": ParallelConfig(tensor_parallel_degree=2),
    "cfg": ParallelConfig(cfg_parallel_degree=2),
}
STEPS = 7


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(parallel: ParallelConfig, world_size: int, fused: bool, guided: bool):
    """One row of three tokens, so that 2 ranks have to pad a chunk of one latent frame."""
    sizes = dict(len_t=1, latent_height=2, latent_width=6, window_size_t=3, sink_size_t=1)
    config = tiny_pipeline(**sizes, fuse_clean_pass=fused)
    config = derive_config(config, diffusion_model=dict(guidance_scale=3.0 if guided else None))
    config.encoder, config.decoder = EncoderConfig(), None
    degrees = resolve_degrees(parallel, world_size, 2, guided)
    pipeline = config.setup(device="cpu", load=False)
    pipeline.parallelize(build_mesh(degrees, "cpu", parallel))
    pipeline.load()
    return pipeline


def roll(strategy: str, world_size: int, fused: bool, guided: bool) -> list[torch.Tensor]:
    """Latents; the prompt changes in the middle and the rollout goes on from its export."""
    parallel = STRATEGIES[strategy] if world_size > 1 else ParallelConfig()
    pipeline = build(parallel, world_size, fused, guided)
    negative = draw(1, 1, 4, TEXT_DIM) if guided else None
    cache = pipeline.initialize_cache(text=draw(0, 1, 4, TEXT_DIM), negative_text=negative)
    latents = []
    for index in range(STEPS):
        if index == 3:
            pipeline.update_prompt(cache, draw(2, 1, 4, TEXT_DIM))
        if index == 5:
            cache = pipeline.load_cache(cache.state_dict())
        pipeline.generate(index, cache, draw(10 + index, 1, 3, CONTROL_DIM))
        pipeline.end_step(index, cache)
        latents.append(cache.latent.clone())
    return latents


@pytest.mark.parametrize(
    ("strategy", "guided"),
    [("ulysses", False), ("tensor", False), ("gather", False), ("cfg", True), ("ulysses", True)],
)
def test_fused_on_two_ranks_equals_plain_on_one(strategy, guided):
    expected = run_ranks(roll, 1, strategy, 1, False, guided)[0]
    for latents in run_ranks(roll, 2, strategy, 2, True, guided):
        assert relative_error(latents, expected) <= 1e-5


def exchanges(fused: bool) -> int:
    """Exchanges of one AR step."""
    pipeline = build(STRATEGIES["ulysses"], 2, fused, False)
    cache = pipeline.initialize_cache(text=draw(0, 1, 4, TEXT_DIM))
    counts = pipeline.exchange.mesh.meter.counts
    sent = []
    for index in range(3):
        pipeline.generate(index, cache, draw(10 + index, 1, 3, CONTROL_DIM))
        pipeline.end_step(index, cache)
        sent.append(sum(count.calls for count in counts.values()))
    return sent[2] - sent[1]


def test_a_step_has_fewer_rounds_of_exchange():
    """Two layers exchange twice per call, and the head once; a clean pass of its own: 2 + 1."""
    assert run_ranks(exchanges, 2, False)[0] == 2 * 5 + 3
    assert run_ranks(exchanges, 2, True)[0] == 2 * 5


def test_another_prompt_would_be_seen():
    """Negative control: the middle of the rollout counts."""
    plain = run_ranks(roll, 1, "ulysses", 1, False, False)[0]
    guided = run_ranks(roll, 1, "ulysses", 1, False, True)[0]
    assert relative_error(plain, guided) > 1e-3


def refused(changes: dict) -> str:
    parallel = replace(ParallelConfig(ulysses_degree=1, ring_degree=2), **changes)
    try:
        build(parallel, 2, True, False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "typed"),
    [
        (dict(strict=True), "--parallel.strict False"),
        (dict(ring_method="rotate"), "--parallel.ring-method gather"),
    ],
)
def test_ranks_that_cannot_fuse_are_refused(changes, typed):
    for message in run_ranks(refused, 2, changes):
        assert typed in message and "fuse-clean-pass False" in message
