"""Forks: futures that do not meet, the bytes that they take, and what does not fit."""

from dataclasses import dataclass, field

import pytest
import torch

from flashdreams.infra import fork as fork_module
from flashdreams.infra.fork import copied_bytes
from flashdreams.parallel.plan import state
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_snapshot import begin
from tests.unit.infra.test_state import advance, prompt


def test_forks_go_on_apart_and_like_their_source():
    pipeline, cache = begin(tiny_pipeline(), 3)
    first, second, third = cache.fork(3)
    pipeline.update_prompt(second, prompt(7), reencode_window=True)
    same, other = advance(pipeline, first, 3, 6), advance(pipeline, second, 3, 6)
    expected = advance(pipeline, cache, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))
    assert not torch.equal(other[-1], expected[-1])  # negative control
    late = advance(pipeline, third, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(late, expected, strict=True))


def test_the_bytes_are_those_of_what_is_copied():
    pipeline, cache = begin(tiny_pipeline(), 3)
    fork = cache.fork(1)[0]
    held = [x for layer in fork.diffusion.conditional.layers() for x in (layer.k, layer.v)]
    caches = sum(x.nbytes for x in held)
    assert caches == pipeline.diffusion_model.transformer.cache_nbytes(1)
    rest = copied_bytes(cache, pipeline.layout) - caches
    assert 0 < rest < copied_bytes(cache, pipeline.layout)
    assert fork.context["text"] is cache.context["text"]  # shared
    mine = {
        x.data_ptr() for layer in cache.diffusion.conditional.layers() for x in (layer.k, layer.v)
    }
    assert mine.isdisjoint(x.data_ptr() for x in held)


def test_forks_that_do_not_fit_are_refused_with_how_many_do(monkeypatch):
    pipeline, cache = begin(tiny_pipeline(), 1)
    each = copied_bytes(cache, pipeline.layout)
    monkeypatch.setattr(fork_module, "free_bytes", lambda device: 3 * each + each // 2)
    assert len(cache.fork(3)) == 3
    with pytest.raises(ValueError, match=r"4 forks take .* GiB each.*: 3 fit"):
        cache.fork(4)


def test_a_bad_count_and_the_log(caplog):
    _, cache = begin(tiny_pipeline(), 1)
    with pytest.raises(ValueError, match=r"fork\(0\)"):
        cache.fork(0)
    with caplog.at_level("INFO"):
        cache.fork(2)
    assert "2 forks: " in caplog.text and " MiB in " in caplog.text


@dataclass
class Counter:
    """A state that its controller changes in place."""

    total: torch.Tensor = state("whole", default_factory=lambda: torch.zeros(1))
    seen: list[int] = field(default_factory=list, metadata=state("host").metadata)


def test_a_state_that_its_controller_writes_in_place_is_not_shared():
    _, cache = begin(tiny_pipeline(), 1)
    cache.controller = Counter()
    fork = cache.fork(1)[0]
    fork.controller.total += 1
    fork.controller.seen.append(1)
    assert float(cache.controller.total) == 0 and cache.controller.seen == []
