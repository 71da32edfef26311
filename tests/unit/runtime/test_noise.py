"""Noise as a pure function of seed, AR step, denoising step and shape."""

import itertools

import pytest
import torch

from flashdreams.runtime.noise import NoiseSource

SHAPE = (2, 4, 3, 8, 8)


def test_noise_does_not_depend_on_the_order_of_calls() -> None:
    asked = list(itertools.product(range(3), range(3)))
    forward = {key: NoiseSource(7)(*key, SHAPE) for key in asked}
    source = NoiseSource(7)
    for key in reversed(asked):
        torch.rand(5)
        assert torch.equal(source(*key, SHAPE), forward[key])
        assert torch.equal(source(*key, SHAPE), forward[key])


def test_noise_differs_with_seed_step_and_index() -> None:
    keys = [(seed, i, k) for seed in (0, 1, 2**63) for i in (0, 1, 2) for k in (0, 1, 2)]
    drawn = [NoiseSource(seed)(i, k, SHAPE).flatten() for seed, i, k in keys]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    # 1536 values each: independent streams stay below five standard deviations, 5 / sqrt(1536).
    assert correlation.abs().max() < 0.13


def test_noise_is_standard_normal_float32_on_the_cpu() -> None:
    noise = NoiseSource(3)(0, 0, (100_000,))
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    assert noise.is_contiguous()
    assert abs(noise.mean().item()) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)


def test_noise_is_the_same_on_every_machine() -> None:
    """Pinned values: another numpy or machine that draws differently must not pass unseen."""
    found = NoiseSource(42)(3, 1, (4,))
    expected = torch.tensor(PINNED)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


PINNED = [-1.577844500541687, -0.9052121043205261, 0.7348651885986328, -1.0410360097885132]


def test_the_first_sample_does_not_depend_on_the_batch() -> None:
    alone = NoiseSource(5)(2, 0, (1, 4, 3, 8, 8))
    batch = NoiseSource(5)(2, 0, (3, 4, 3, 8, 8))
    assert torch.equal(batch[:1], alone)
    assert not torch.equal(batch[1:2], alone)


def test_shapes_may_be_scalar_or_empty() -> None:
    assert NoiseSource(0)(0, 0, ()).shape == ()
    assert NoiseSource(0)(0, 0, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_numbers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"seed={number}"):
        NoiseSource(number)
    with pytest.raises(ValueError, match=f"autoregressive_index={number}"):
        NoiseSource(0)(number, 0, (1,))
    with pytest.raises(ValueError, match=f"denoising_step={number}"):
        NoiseSource(0)(0, number, (1,))
    with pytest.raises(TypeError):
        NoiseSource(0.5)  # type: ignore[arg-type]


def test_noise_drawn_ahead_is_the_same_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, draws = NoiseSource(7), []
    draw = source._draw
    monkeypatch.setattr(source, "_draw", lambda *key: (draws.append(key), draw(*key))[1])
    source.draw_ahead(1, 0, SHAPE)
    for key in ((1, 1), (1, 0), (2, 0)):
        assert torch.equal(source(*key, SHAPE), NoiseSource(7)(*key, SHAPE))
    assert [key[:2] for key in draws] == [(1, 0), (1, 1), (2, 0)]


def test_what_is_drawn_ahead_serves_its_own_call_alone() -> None:
    """Another step, index or shape is not what was drawn; the second time it is drawn again."""
    source = NoiseSource(7)
    source.draw_ahead(1, 0, SHAPE)
    for key in ((1, 1, SHAPE), (0, 0, SHAPE), (1, 0, (2, 4, 3, 8, 7))):
        assert torch.equal(source(*key), NoiseSource(7)(*key))
    taken, again = source(1, 0, SHAPE), source(1, 0, SHAPE)
    assert taken is not again and torch.equal(taken, again)
