"""Whole methods of a tiny size on a real GPU: graphs change no bit."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from flashdreams.parallel.environment import Environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SLUGS = (
    "self-forcing-tiny-random",
    "causal-forcing-tiny-random",
    "matrix-game-2-tiny-random",
    "lingbot-world-tiny-random",
    "longlive-tiny-random",
    "toy-world",
)


@pytest.fixture
def load_subject(monkeypatch):
    """The benchmarks' way to build a method with something to stream."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("rollout").load_subject
    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)


@torch.no_grad()
def roll(subject, seeds=(1, 2)) -> list[torch.Tensor]:
    """Latents and frames of two rollouts, one after the other in one storage."""
    found = []
    for seed in seeds:
        cache = subject.new_rollout(seed)
        for _ in range(subject.steps_to_fill + 2):
            chunk = subject.step(cache)
            found += [cache.latent.cpu(), chunk.cpu()]
        cache.release()
    return found


@pytest.mark.parametrize("slug", SLUGS)
def test_graphs_change_no_bit_of_a_method(load_subject, slug):
    place, results = Environment(0, 0, 1, torch.device("cuda", 0)), []
    for use_cuda_graph in (True, False):
        # A named backend: two measurements of "auto" may end with two choices.
        subject = load_subject(slug, place, use_cuda_graph=use_cuda_graph, backend="sdpa")
        with torch.no_grad():
            subject.pipeline.warm_up()
        results.append(roll(subject))
        if use_cuda_graph:
            graphs = subject.pipeline.stats()["cuda_graphs"]
            assert graphs["captures_after_ready"] == 0 < graphs["replays"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(x.isfinite().all() for x in results[0])
    assert not torch.equal(results[0][-2], roll(subject, (5,))[-2]), "negative control: the seed"
