"""What all streaming decoders of video autoencoders promise: chunks, rollouts and batches apart."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor

from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.models.wan.vae22 import WanVAE22DecoderConfig
from tests.wan_vae import decode, draw_latents

ATOL = 5e-5  # float32, across batches and pass lengths
CONFIGS = {
    "wan": (partial(WanVAEDecoderConfig, dim=4), 16, 8),
    "wan22": (partial(WanVAE22DecoderConfig, dim=4), 48, 16),
    "taehv": (partial(TAEHVDecoderConfig, channels=(16, 8, 6, 6)), 16, 8),
}
"""Kind -> config at toy size, channels of its latents, pixels per latent row."""


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def build(kind: str, at_once: int | None = 1, **overrides):
    """A decoder whose values spread over the whole range."""
    torch.manual_seed(7)
    decoder = CONFIGS[kind][0](decode_frames_at_once=at_once, **overrides).setup()
    for parameter in decoder.parameters() if kind == "taehv" else ():
        parameter.data.mul_(1.7)
    return decoder


def latents(kind: str, frames: int, batch: int = 1) -> Tensor:
    return draw_latents(CONFIGS[kind][1], frames, batch=batch)


def test_single_frame_passes_are_bit_equal_for_any_split_into_chunks(kind):
    decoder, z = build(kind), latents(kind, 6)
    whole = decoder(z)
    for split in ([1] * 6, [3, 3], [2, 3, 1], [4, 2]):
        assert torch.equal(torch.cat(decode(decoder, z, split), dim=1), whole)
    restarted = torch.cat([decoder(z[:, :, :3]), decoder(z[:, :, 3:])], dim=1)
    assert not torch.equal(restarted[:, 9:], whole[:, 9 : restarted.shape[1]])  # negative control


@pytest.mark.parametrize("at_once", [0, None, 2, 5])
def test_longer_passes_equal_single_frames_up_to_rounding(kind, at_once):
    z = latents(kind, 7)
    single, longer = (
        torch.cat(decode(build(kind, count), z, [3, 4]), dim=1) for count in (1, at_once)
    )
    torch.testing.assert_close(longer, single, rtol=0, atol=ATOL)


@pytest.mark.parametrize("at_once", [1, None])
@pytest.mark.parametrize(("split", "frames"), [([3, 3, 3], [9, 12, 12]), ([1, 1, 2], [1, 4, 8])])
def test_decode_yields_the_exact_number_of_frames(kind, split, frames, at_once):
    chunks = decode(build(kind, at_once), latents(kind, sum(split)), split)
    scale = CONFIGS[kind][2]
    assert [chunk.shape for chunk in chunks] == [(1, n, 3, 3 * scale, 2 * scale) for n in frames]
    assert all(chunk.dtype == torch.float32 and chunk.abs().max() <= 1 for chunk in chunks)


def test_interleaved_rollouts_equal_solo_rollouts(kind):
    decoder, first, second = build(kind), latents(kind, 4), latents(kind, 4).flip(2)
    solo = decode(decoder, first, [2, 2]), decode(decoder, second, [2, 2])
    caches = decoder.initialize_cache(), decoder.initialize_cache()
    for i, (a, b) in enumerate(zip(first.split(2, dim=2), second.split(2, dim=2), strict=True)):
        assert torch.equal(decoder(a, i, caches[0]), solo[0][i])
        assert torch.equal(decoder(b, i, caches[1]), solo[1][i])


def test_clips_of_a_batch_do_not_touch_each_other(kind):
    decoder, z = build(kind, None), latents(kind, 4, batch=2)
    both = torch.cat(decode(decoder, z, [2, 2]), dim=1)
    for i in range(2):
        alone = torch.cat(decode(decoder, z[i : i + 1], [2, 2]), dim=1)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=ATOL)


def test_cache_round_trips_and_stays_at_constant_size(kind):
    decoder, z = build(kind), latents(kind, 8)
    cache, sizes, expected = decoder.initialize_cache(), [], []
    for i, chunk in enumerate(z.split(2, dim=2)):
        if i == 2:
            resumed = deepcopy(cache)
        expected.append(decoder(chunk, i, cache))
        sizes.append(cache.num_bytes())
    assert len(set(sizes)) == 1
    assert all(isinstance(value, Tensor) for value in resumed.slots.values())
    for i in (2, 3):
        assert torch.equal(decoder(z[:, :, 2 * i : 2 * i + 2], i, resumed), expected[i])
    assert not torch.equal(decoder(z[:, :, 4:6], 4, resumed), expected[2])  # negative control


def test_bfloat16_stays_near_float32(kind):
    z = latents(kind, 3)
    exact, rounded = build(kind)(z), build(kind, dtype="bfloat16")(z)
    error = (rounded - exact).abs()
    assert rounded.dtype == torch.float32 and error.max() < 0.3 and error.mean() < 0.02


def test_every_place_of_the_plan_exists_and_only_those_look_sideways(kind):
    decoder = build(kind)
    plan = decoder.parallel_plan().spatial
    patterns = [re.compile(re.escape(p).replace(r"\*", "[^.]+")) for p in plan]
    modules = dict(decoder.named_modules())
    matched = {n for n in modules if any(p.fullmatch(n) for p in patterns)}
    assert all(any(p.fullmatch(n) for n in modules) for p in patterns)
    wide = {n for n, p in decoder.named_parameters() if p.dim() >= 4 and p.shape[-1] > 1}
    assert {n.removesuffix(".weight") for n in wide} == matched - {"decoder.middle.1.core"}


def test_chunks_out_of_turn_and_wrong_latents_are_refused(kind):
    decoder, z = build(kind), latents(kind, 1)
    cache = decoder.initialize_cache()
    decoder(z, 0, cache)
    with pytest.raises(ValueError, match=r"autoregressive_index=2.*expects 1"):
        decoder(z, 2, cache)
    channels = CONFIGS[kind][1]
    for shape in ((1, 4, 1, 2, 2), (channels, 1, 2, 2), (1, channels, 0, 2, 2)):
        with pytest.raises(ValueError, match=rf"expected \[batch, {channels}, latent frames"):
            decoder(torch.zeros(shape))
