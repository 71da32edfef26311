"""The counter of what torch.compile has built."""

import pytest
import torch

from flashdreams.runtime.compilation import compiled_so_far


@pytest.mark.slow
def test_what_is_compiled_is_counted_once():
    before = compiled_so_far()
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))
    first = compiled_so_far() - before
    assert first.graphs == 1 and first.ms > 0
    double(torch.ones(3))
    assert compiled_so_far() - before == first
