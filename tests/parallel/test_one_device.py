"""All wrappers on one rank, and tensors that go through the host; the same runs on a GPU."""

from itertools import starmap

import pytest
import torch
import torch.distributed as dist

from flashdreams.parallel import collectives
from tests.harness import run_ranks
from tests.one_device import ONE_RANK, on_one_rank, on_two_ranks

pytestmark = pytest.mark.slow

EXACT = ("ulysses", "gather")
"""Ways that leave every sum as it is; the others add up in another order (float32)."""


def test_groups_of_one_rank_give_the_plain_bits():
    (found,) = run_ranks(on_one_rank, 1, "cpu", False)
    for way, (axes, _) in ONE_RANK.items():
        assert found[way]["latents"] <= (0.0 if way in (*EXACT, "split_decode") else 1e-5), way
        assert found[way]["frames"] <= (0.0 if way in EXACT else 2e-5), way
        assert found[way]["calls"] > 0 or axes == {"decode"}, "one rank has no neighbour"
        part = "decoder" if axes == {"decode"} else "transformer"
        assert found[way]["installed"][part], "wrappers are there"


def through_the_host(staged: bool) -> list[torch.Tensor]:
    """Every collective, with tensors that claim to be of a GPU."""
    channel = collectives.Channel("all", dist.group.WORLD, collectives.TrafficMeter())
    rank, copies = dist.get_rank(), []

    class Counted(torch.Tensor):
        def cpu(self):
            copies.append(self.shape)
            return super().cpu().as_subclass(torch.Tensor)

    collectives.needs_host = lambda device, group: staged

    def new(*shape: int) -> torch.Tensor:
        x = torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * rank
        return x.as_subclass(Counted) if staged else x

    first, second = channel.exchange_edges(new(3), new(3))
    results = [
        channel.all_gather(new(2, 3), dim=1),
        channel.all_to_all(new(2, 3)),
        channel.all_reduce(new(4)),
        channel.start_rotate(new(5))(),
        *(x for x in (first, second) if x is not None),
    ]
    assert len(copies) == (5 if staged else 0), "the edge that nobody wants stays"
    return [x.as_subclass(torch.Tensor) for x in results]


def test_collectives_through_the_host_give_the_same():
    staged, plain = (run_ranks(through_the_host, 2, choice) for choice in (True, False))
    for a, b in zip(staged, plain, strict=True):
        assert all(starmap(torch.equal, zip(a, b, strict=True)))
    assert not torch.equal(plain[0][3], plain[1][3]), "negative control: ranks differ"


def test_only_gloo_needs_the_host(monkeypatch):
    for backends, needed in (("cpu:gloo,cuda:gloo", True), ("cpu:gloo,cuda:nccl", False)):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, b=backends: b)
        assert collectives.needs_host(torch.device("cuda", 0), None) is needed
        assert not collectives.needs_host(torch.device("cpu"), None)


def test_two_ranks_equal_one():
    """The check that `tests/gpu` makes on one GPU, here on a CPU."""
    for found in run_ranks(on_two_ranks, 2, "cpu"):
        assert found["strict"] == {"latents": 0.0, "frames": 0.0}
        assert all(errors["latents"] <= 1e-5 for errors in found.values())
        assert all((errors["frames"] or 0.0) <= 3e-5 for errors in found.values())
