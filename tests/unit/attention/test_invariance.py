"""Which backends give a query the same bits whatever else is computed with it."""

import itertools
import re

import pytest
import torch

from flashdreams.attention.backends import sdpa, sdpa_math
from flashdreams.attention.choose import AttentionShape, draw_inputs
from flashdreams.attention.invariance import (
    STRICT_ORDER,
    choose_invariant_backend,
    find_variance,
    same_bits,
    strict_backends,
)
from flashdreams.parallel.strict import TiledAttention

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch_size=1, queries=30, keys=90, num_heads=6, head_dim=16)
INVARIANT = TiledAttention(sdpa, 16)


def nudged(amount):
    """A backend whose last places move with something that should not matter."""

    def attend(q, k, v, *, scale):
        return INVARIANT(q, k, v, scale=scale) * (1 + 1e-6 * amount(q))

    return attend


CALLS = itertools.count()
VARIANT = {
    r"the number of heads \(6 and 1\), with 30 keys": nudged(lambda q: q.shape[2]),
    r"the number of queries \(30 and 15\)": nudged(lambda q: min(q.shape[1], 30)),
    "padding": nudged(lambda q: max(q.shape[1], 30)),
    "two equal ones differ": nudged(lambda q: next(CALLS)),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tiled_backend_depends_on_nothing():
    assert find_variance(INVARIANT, SHAPE, CPU, torch.float32) is None
    assert find_variance(INVARIANT, SHAPE, CPU, torch.bfloat16) is None


@pytest.mark.parametrize("what", VARIANT)
def test_what_bits_depend_on_is_named(what):
    """Negative controls, one for each thing that may differ between ranks."""
    found = find_variance(VARIANT[what], SHAPE, CPU, torch.float32)
    assert found is not None and re.search(what, found)


def test_the_order_of_queries_is_looked_at():
    """A backend that spoils one query, whichever it is, is seen by the permutation alone."""
    whole = draw_inputs(SHAPE, CPU, torch.float32)[0]

    def amount(q):
        permuted = q.shape[1:3] == whole.shape[1:3] and not torch.equal(q, whole)
        return float(permuted)

    found = find_variance(nudged(amount), SHAPE, CPU, torch.float32)
    assert found is not None and "the order of queries" in found


def test_bits_are_compared_and_not_numbers():
    zero, nan = torch.tensor([0.0]), torch.tensor([torch.nan])
    assert same_bits(nan, nan) and not same_bits(zero, -zero)
    assert same_bits(zero.bfloat16(), zero.bfloat16())


def test_the_first_invariant_one_is_chosen_and_no_clock_is_asked(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a clock was asked"))
    candidates = {
        "wrong": lambda q, k, v, *, scale: q,
        "heads": nudged(lambda q: q.shape[2]),
        "tiles": INVARIANT,
        "later": INVARIANT,
    }
    choice = choose_invariant_backend(SHAPE, CPU, torch.float32, candidates)
    assert choice.name == "tiles" and not choice.tiled
    verdicts = {row.name: row.verdict for row in choice.rows}
    assert "wrong: differs" in verdicts["wrong"] and "number of heads" in verdicts["heads"]
    assert verdicts["later"] == "not needed" and "attention_tiled" not in choice.stats()


def test_without_an_invariant_one_the_first_right_one_is_tiled():
    candidates = {"heads": nudged(lambda q: q.shape[2]), "rows": nudged(lambda q: q.shape[1])}
    choice = choose_invariant_backend(SHAPE, CPU, torch.float32, candidates)
    assert choice.name == "heads" and choice.tiled and choice.stats()["attention_tiled"]
    with pytest.raises(ValueError, match=r"No attention backend is right (.|\n)*wrong: differs"):
        choose_invariant_backend(SHAPE, CPU, torch.float32, {"wrong": lambda q, k, v, *, scale: q})


def test_strict_tries_backends_in_a_fixed_order():
    found = strict_backends(SHAPE, CPU)
    assert tuple(found) == STRICT_ORDER and found["sdpa"] is sdpa
    assert strict_backends(SHAPE, CPU, ("sdpa_math",)) == {"sdpa_math": sdpa_math}
    choice = choose_invariant_backend(SHAPE, CPU, torch.float32, found)
    assert choice.name == "sdpa"
    assert "needs a CUDA device" in {row.name: row.verdict for row in choice.rows}["sdpa_cudnn"]
