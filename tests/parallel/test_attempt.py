"""Starts of a group in one store, as torchrun keeps it over restarts."""

import threading
import time

import pytest
import torch.distributed as dist

from flashdreams.parallel.attempt import agree_on_attempt


def start(store, world_size, delays=()):
    found = {}

    def run(rank):
        time.sleep(delays[rank] if delays else 0)
        found[rank] = agree_on_attempt(store, rank, world_size, 20)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("delays", [(), (0.3, 0, 0.1), (0, 0.3, 0.1)])
def test_every_start_has_a_name_of_its_own(delays):
    store = dist.HashStore()
    names = set()
    for size in (3, 2, 3, 3):
        found = start(store, size, delays[:size])
        assert len({attempt.name for attempt in found.values()}) == 1
        names.add(found[0].name)
    assert len(names) == 4


def test_starts_are_counted():
    store = dist.HashStore()
    assert max(attempt.starts for attempt in start(store, 3).values()) == 3
    assert max(attempt.starts for attempt in start(store, 2).values()) == 5


def test_a_rank_that_does_not_come_is_waited_for_so_long():
    store = dist.HashStore()
    start(store, 2)  # leaves answers that look like those of rank 1
    with pytest.raises(TimeoutError, match=r"Rank 0 waited 0 s for the other 1 ranks"):
        agree_on_attempt(store, 0, 2, 0.2)
