import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run_ranks


def add_ranks(offset):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return float(total) + offset


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise KeyError("rank one has no key")
    dist.barrier()


def never_end():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_run_ranks_returns_every_result():
    assert run_ranks(add_ranks, 3, 10.0) == [13.0, 13.0, 13.0]


def test_run_ranks_raises_the_first_traceback():
    with pytest.raises(RankError, match="rank one has no key"):
        run_ranks(fail_on_rank_one, 2)


def test_run_ranks_ends_a_hang():
    with pytest.raises(TimeoutError, match=r"ranks \[0"):
        run_ranks(never_end, 2, timeout_s=2.0)


def environment_of_rank():
    return os.environ.get("OF_THIS_TEST")


def test_ranks_see_the_variables_of_the_test(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("OF_THIS_TEST", value)
        assert run_ranks(environment_of_rank, 1) == [value]
    monkeypatch.delenv("OF_THIS_TEST")
    assert run_ranks(environment_of_rank, 1) == [None]
