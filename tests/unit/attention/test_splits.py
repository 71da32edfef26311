"""How many KV splits a call gets: a rule of sizes, held against what one GPU measured."""

import pytest
import torch

from flashdreams.attention.splits import MAX_SPLITS, choose_kv_splits, count_processors

SMS = 132  # H100 and H200


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "expected"),
    [
        (4680, 32760, 12, 2),  # 1.3B, window 21: 703 TFLOP/s with 2, 664, 593, 587 with 1, 3, 4
        (4680, 14040, 12, 2),  # window 9: 666 with 2, 655 with 1
        (4680, 512, 12, 1),  # cross-attention: merging would cost more than it saves
        (4524, 27144, 40, 1),  # 14B: 10.9 waves
        (4680, 32760, 1, 3),  # one head on a rank: 37 tiles would leave most of the GPU idle
    ],
)
def test_the_rule_takes_what_was_or_would_be_fastest(queries, keys, heads, expected):
    assert choose_kv_splits(queries, keys, heads, 1, SMS) == expected


def test_fewer_keys_and_more_tiles_never_ask_for_more_splits():
    counts = [choose_kv_splits(4680, keys, 12, 1, SMS) for keys in (100, 2000, 14040, 32760)]
    assert counts == sorted(counts) and counts[0] == 1
    assert choose_kv_splits(10**6, 32760, 12, 4, SMS) == 1


def test_a_batch_counts_like_heads():
    for heads, batch in ((12, 1), (6, 2), (3, 4)):
        assert choose_kv_splits(4680, 32760, heads, batch, SMS) == 2


def test_no_size_breaks_the_rule():
    for queries in (1, 127, 129, 5000):
        for keys in (0, 1, 10**6):
            for heads in (1, 7, 40):
                assert 1 <= choose_kv_splits(queries, keys, heads, 1, SMS) <= MAX_SPLITS


def test_on_a_cpu_nothing_is_counted():
    assert count_processors(torch.device("cpu")) == 1
    assert choose_kv_splits(4680, 32760, 12, 1, 1) == 1
