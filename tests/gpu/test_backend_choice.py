"""How attention backends are timed on a GPU."""

import time

import pytest
import torch

from flashdreams.attention import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")


def test_the_time_of_a_launch_is_no_part_of_a_call() -> None:
    """Some milliseconds of device work, of which the host spends a quarter on the launch.

    Tolerance: 10 %, in one of three tries, as other tests may use the GPU; with the launch it
    would be 25 % or more in each.
    """
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)

    def work() -> torch.Tensor:
        y = x
        for _ in range(3):
            y = y @ x
        return y

    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        work()
    end.record()
    end.synchronize()
    pause_s = begin.elapsed_time(end) / 10 / 4 / 1e3

    def slowly() -> torch.Tensor:
        time.sleep(pause_s)
        return work()

    calls = {"plain": work, "slow launch": slowly}
    tries = [choose._time_in_turns(calls, DEVICE, 5) for _ in range(3)]
    assert min(times["slow launch"] / times["plain"] for times in tries) < 1.1, tries


def test_what_writes_all_scores_is_not_measured_and_says_so() -> None:
    shape = choose.AttentionShape(batch_size=1, queries=64, keys=128, num_heads=2, head_dim=64)
    rows = choose.choose_backend(shape, DEVICE, torch.bfloat16, repeats=1).rows
    (row,) = (row for row in rows if row.name == choose.WRITES_SCORES)
    assert row.ms is None and "materializes all scores" in row.verdict
    assert any(other.ms is not None for other in rows)
