"""Decoding by replay, with a recorder that runs on a CPU, against eager decoding: equal bits."""

import gc
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from flashdreams.models.decode_graph import DecodeGraph
from flashdreams.models.taehv import TAEHVDecoder
from tests.unit.models.test_decoder_forms import FORMS, decoder_of
from tests.unit.runtime.test_cuda_graph import TraceCapture

CHUNK = 3


def graphed(form: str | None = None, backend: TraceCapture | None = None) -> TAEHVDecoder:
    decoder = decoder_of("taehv", *([] if form is None else [FORMS[form]]))
    decoder.graph = DecodeGraph(decoder.decode, decoder.device, backend or TraceCapture())
    with torch.no_grad():
        assert decoder.graph.capture(clip(0)[:, :, :CHUNK])
    return decoder


def clip(seed: int) -> Tensor:
    return torch.randn(1, 16, 5 * CHUNK, 3, 2, generator=torch.Generator().manual_seed(seed))


def advance(decoder: TAEHVDecoder, z: Tensor, cache) -> Tensor:
    start = CHUNK * cache.chunks
    return decoder(z[:, :, start : start + CHUNK], cache.chunks, cache)


def eager(z: Tensor, form: str | None = None) -> list[Tensor]:
    decoder = decoder_of("taehv", *([] if form is None else [FORMS[form]]))
    cache = decoder.initialize_cache()
    return [advance(decoder, z, cache) for _ in range(5)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", [None, "all"])
def test_rollouts_that_take_turns_give_the_bits_of_eager_decoding(form: str | None) -> None:
    decoder = graphed(form)
    clips = clip(1), clip(2)
    caches = decoder.initialize_cache(), decoder.initialize_cache()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for turn in (0, 0, 1, 0, 1, 1, 0, 0, 1, 1):
        found[turn].append(advance(decoder, clips[turn], caches[turn]))
    assert same(found[0], eager(clips[0], form)) and same(found[1], eager(clips[1], form))
    assert (decoder.graph.call.replays, decoder.graph.call.captures) == (8, 1)
    assert decoder.graph.call.eager_calls == 2, "the first chunk of each"


def test_a_rollout_that_stayed_in_the_memory_of_another_is_seen(monkeypatch) -> None:
    """Negative control."""
    decoder, z = graphed(), clip(1)
    monkeypatch.setattr(DecodeGraph, "_move_in", lambda *_: None)
    cache = decoder.initialize_cache()
    assert not same([advance(decoder, z, cache) for _ in range(5)], eager(z))


def test_one_rollout_keeps_its_frames_in_the_memory_of_the_graph() -> None:
    decoder, cache = graphed(), None
    cache = decoder.initialize_cache()
    for _ in range(3):
        advance(decoder, clip(1), cache)
    places = {name: x.data_ptr() for name, x in cache.slots.items()}
    advance(decoder, clip(1), cache)
    assert places == {name: x.data_ptr() for name, x in cache.slots.items()}
    other = decoder.initialize_cache()
    for _ in range(2):
        advance(decoder, clip(2), other)
    assert places == {name: x.data_ptr() for name, x in other.slots.items()}
    assert all(x.data_ptr() != places[name] for name, x in cache.slots.items())


def test_copies_and_rollouts_that_are_gone_do_not_disturb_others() -> None:
    decoder, z = graphed(), clip(1)
    cache, expected = decoder.initialize_cache(), eager(z)
    found = [advance(decoder, z, cache) for _ in range(3)]
    fork = deepcopy(cache)
    found += [advance(decoder, z, cache) for _ in range(2)]
    assert same(found, expected)
    del cache
    gc.collect()
    assert same([advance(decoder, z, fork) for _ in range(2)], expected[3:])
    for name, x in fork.slots.items():  # as a load does, in place
        x.copy_(torch.zeros_like(x) if name else x)
    fork.chunks = 4
    assert not torch.equal(advance(decoder, z, fork), expected[4])


def test_other_shapes_and_what_comes_after_the_drop_are_decoded_eagerly() -> None:
    decoder, z = graphed(), clip(1)
    cache = decoder.initialize_cache()
    whole = decoder_of("taehv")
    reference = whole.initialize_cache()
    for index, part in enumerate(z.split([3, 3, 2, 3, 4], dim=2)):
        assert torch.equal(decoder(part, index, cache), whole(part, index, reference))
        if index == 3:
            replays = decoder.graph.call.replays
            decoder.drop_graphs()
    assert replays == 2 == decoder.graph.call.replays


def test_a_capture_that_fails_leaves_eager_decoding(caplog) -> None:
    backend = TraceCapture()
    backend.refuse = True
    decoder = decoder_of("taehv")
    decoder.graph = DecodeGraph(decoder.decode, decoder.device, backend)
    with torch.no_grad():
        assert not decoder.graph.capture(clip(0)[:, :, :CHUNK])
    assert "cannot be captured" in caplog.text
    cache = decoder.initialize_cache()
    assert same([advance(decoder, clip(1), cache) for _ in range(5)], eager(clip(1)))


def test_a_cpu_captures_nothing() -> None:
    decoder = decoder_of("taehv")
    decoder.capture(clip(0)[:, :, :CHUNK])
    cache = decoder.initialize_cache()
    assert same([advance(decoder, clip(1), cache) for _ in range(5)], eager(clip(1)))
    assert decoder.graphed_calls()[0].eager_calls == 0
