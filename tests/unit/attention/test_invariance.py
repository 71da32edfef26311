"""Which backends give a query the same bits whatever else is computed with it."""

import itertools
import re

import pytest
import torch

from flashdreams.attention import backends as table
from flashdreams.attention import choose as choose_module
from flashdreams.attention import invariance
from flashdreams.attention.backends import PREFERENCE, sdpa
from flashdreams.attention.choose import AttentionShape, draw_inputs
from flashdreams.attention.invariance import (
    check_fp8_invariance,
    choose_invariant_backend,
    find_variance,
    same_bits,
)
from flashdreams.attention.splits import choose_kv_splits
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


@pytest.fixture
def backends(monkeypatch):
    """Backends of a table of the test's own."""
    table = {
        "wrong": lambda q, k, v, *, scale: q,
        "heads": nudged(lambda q: q.shape[2]),
        "rows": nudged(lambda q: q.shape[1]),
        "tiles": INVARIANT,
        "later": INVARIANT,
    }
    monkeypatch.setattr(invariance, "BACKENDS", table)
    return table


def choose(*names):
    return choose_invariant_backend(SHAPE, CPU, torch.float32, names)


def test_the_first_invariant_one_is_chosen_and_no_clock_is_asked(backends, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a clock was asked"))
    choice = choose("wrong", "heads", "tiles", "later")
    assert choice.name == "tiles" and not choice.tiled and str(choice) == "tiles"
    verdicts = {row.name: row.verdict for row in choice.rows}
    assert "wrong: differs" in verdicts["wrong"] and "number of heads" in verdicts["heads"]
    assert verdicts["later"] == "not needed" and "attention_tiled" not in choice.stats()


def test_without_an_invariant_one_the_first_right_one_is_tiled(backends):
    choice = choose("wrong", "heads", "rows")
    assert choice.name == "heads" and choice.tiled and choice.stats()["attention_tiled"]
    assert str(choice) == "heads, in tiles"
    with pytest.raises(ValueError, match=r"No attention backend is accurate (.|\n)*wrong: differs"):
        choose("wrong")


def test_what_cannot_run_is_passed_over():
    choice = choose(*PREFERENCE)
    assert choice.name == "sdpa"
    assert "needs a CUDA device" in {row.name: row.verdict for row in choice.rows}["sdpa_cudnn"]


def test_a_backend_that_fits_its_splits_to_every_call_gets_a_number(monkeypatch):
    called = []

    def triton(q, k, v, *, scale, num_splits):
        called.append(num_splits)
        return INVARIANT(q, k, v, scale=scale)

    for module in (invariance, table):
        monkeypatch.setattr(module, "BACKENDS", {"triton": triton})
    monkeypatch.setattr(choose_module, "why_unusable", lambda *args: None)
    monkeypatch.setattr(choose_module, "count_processors", lambda device: 7)
    wanted = choose_kv_splits(30, 90, 6, 1, 7)
    assert choose("triton").kv_splits == wanted and set(called) == {wanted, 1}


def test_fp8_attention_is_compared_as_well(monkeypatch):
    """On a CPU it dequantizes and calls the backend of the table."""
    for backend, refused in ((INVARIANT, False), (nudged(lambda q: q.shape[2] * 1e4), True)):
        monkeypatch.setattr(invariance, "BACKENDS", {"sdpa": backend})
        if not refused:
            check_fp8_invariance(SHAPE, CPU, torch.float32)
            continue
        with pytest.raises(ValueError, match=r"is not strict here, its bits depend on the number"):
            check_fp8_invariance(SHAPE, CPU, torch.float32)
