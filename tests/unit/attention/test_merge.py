"""Attention over parts of the keys, merged (float32, atol 1e-5)."""

import pytest
import torch

from flashdreams.attention.backends import sdpa, sdpa_math
from flashdreams.attention.merge import attend_with_lse, merge

ATOL = 1e-5


@pytest.mark.parametrize("backend", [sdpa, sdpa_math])
def test_merged_parts_equal_attention_over_all_keys(backend):
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    parts = [
        attend_with_lse(q, k[:, part], v[:, part], scale=0.3, backend=backend)
        for part in (slice(0, 2), slice(2, 8), slice(8, 9))
    ]
    expected = sdpa(q, k, v, scale=0.3)
    two, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(merge(two, lse, *parts[2])[0], expected, rtol=0, atol=ATOL)
    assert (two - expected).abs().max() > 100 * ATOL  # negative control: a key is missing
