"""A batch of forks on several ranks: the frames of forks in turn on these ranks (float32 1e-5)."""

import pytest
import torch

from flashdreams.infra import fork
from flashdreams.parallel.environment import OtherRankError
from tests.harness import run_ranks
from tests.parallel.pipelines import begin, build_pipeline, control
from tests.parallel.rollout import relative_error
from tests.parallel.test_migration import slowly


def step(pipeline, cache, given):
    index = cache.next_index
    chunk = pipeline.generate(index, cache, given)
    pipeline.finalize(index, cache)
    return cache.latent.clone(), chunk.clone()


@torch.no_grad()
def fork_both_ways(case, ranks):
    """Latents and frames of two forks in turn, as a batch, and of one that was taken out again."""
    pipeline, _ = build_pipeline(case, ranks)
    cache = begin(pipeline, case)
    for index in range(3):
        step(pipeline, cache, control(case, index))
    forks, batch = cache.fork(2), cache.fork_batch(2)
    expected, found = [], []
    for index in range(3, 6):
        inputs = [control(case, index), control(case, index + 7)]
        steps = [step(pipeline, f, x) for f, x in zip(forks, inputs, strict=True)]
        expected += [torch.cat(parts) for parts in zip(*steps, strict=True)]
        found += step(pipeline, batch, inputs)
    expected += step(pipeline, forks[1], control(case, 6))
    return expected, [*found, *step(pipeline, batch.pick(1), control(case, 6))]


@pytest.mark.parametrize(
    "case", ["plain", *slowly("relative_rope", "guided", "split_decode", "rotate", "tensor")]
)
def test_a_batch_of_forks_on_two_ranks(case):
    for expected, found in run_ranks(fork_both_ways, 2, case, 2):
        assert relative_error(found, expected) <= 1e-5
        assert not torch.allclose(expected[0][0], expected[0][1])  # negative control


def fork_without_memory_figures():
    """What each rank says of a fork for which the last rank cannot read its free memory."""
    pipeline, _ = build_pipeline("plain", 2)
    cache = begin(pipeline, "plain")
    real = fork.free_bytes

    def unreadable(device):
        raise OSError(24, "Too many open files")

    if torch.distributed.get_rank() == 1:
        fork.free_bytes = unreadable
    try:
        return str(cache.fork(1))
    except (OSError, OtherRankError) as error:
        fork.free_bytes = real
        assert len(cache.fork(1)) == 1  # and the ranks still agree
        return str(error)


def test_a_rank_that_cannot_read_its_free_memory_refuses_the_fork_on_all():
    said = run_ranks(fork_without_memory_figures, 2)
    assert "Another rank" in said[0] and "Too many open files" in said[1]
