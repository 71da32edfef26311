"""Regions against sets of indices, for random ranges."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdreams.runtime.region import (
    intersect,
    positions_in,
    region_shape,
    select_region,
    whole_region,
)

ranges = st.builds(
    lambda start, length, step: range(start, start + length * step, step),
    st.integers(0, 12), st.integers(1, 9), st.integers(1, 5),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(ranges, ranges)
def test_shared_entries_are_those_of_both(a, b):
    shared = intersect((a,), (b,))
    assert set(shared[0] if shared else ()) == set(a) & set(b)
    if shared:
        assert [a[i] for i in positions_in((a,), shared)[0]] == list(shared[0])


def test_entries_of_a_tensor_are_found_again_in_a_part_of_it():
    x = torch.arange(4 * 12 * 6).reshape(4, 12, 6)
    part = (range(4), range(1, 12, 3), range(2, 6))
    wanted = (range(1, 3), range(4, 12, 2), range(0, 5))
    shared = intersect(part, wanted)
    cut = select_region(x, part)
    assert cut.shape == region_shape(part)
    assert torch.equal(select_region(cut, positions_in(part, shared)), select_region(x, shared))
    assert not torch.equal(cut, select_region(x, (range(4), range(0, 12, 3), range(2, 6))))


def test_what_does_not_meet_shares_nothing():
    assert intersect((range(0, 8, 2),), (range(1, 8, 2),)) is None
    assert select_region(torch.tensor(3), whole_region(())) == 3
