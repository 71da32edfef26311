"""The Wan 2.1 autoencoder against the official code, ``diffusers`` and itself in pieces."""

import re
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.models.wan.vae import (
    DECODER_IGNORES,
    ENCODER_IGNORES,
    WAN21_LATENT_MEAN,
    WAN21_LATENT_STD,
    WanVAEDecoder,
    WanVAEDecoderConfig,
    WanVAEImageEncoderConfig,
    denormalise,
    normalise,
)
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.goldens import golden_config, load_golden
from tests.manifests import load_manifest, write_sparse_safetensors
from tests.wan_vae import decode, draw_latents, draw_pixels, drawn

GOLDEN = "b3_wan_vae_tiny"
ATOL = 5e-5  # float32 against the official code and across pass lengths


tiny_decoder = partial(drawn, WanVAEDecoderConfig, seed=7)
tiny_encoder = partial(drawn, WanVAEImageEncoderConfig, seed=8)
latents = partial(draw_latents, 16)
pixels = partial(draw_pixels, (16, 24))


def load_half(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    names = module.state_dict().keys()
    module.load_state_dict({name: weights[name] for name in names}, strict=True)


def golden_weights() -> dict[str, Tensor]:
    files = ("weights_decoder_1of2", "weights_decoder_2of2", "weights_encoder")
    return {k: v for f in files for k, v in load_golden(GOLDEN, f"{f}.safetensors").items()}


def golden_decoder(**overrides) -> WanVAEDecoder:
    decoder = WanVAEDecoderConfig(dim=golden_config(GOLDEN)["config"]["dim"], **overrides).setup()
    load_half(decoder, golden_weights())
    return decoder


# Against the official code


@pytest.mark.parametrize("at_once", [1, 2, None])
@pytest.mark.parametrize("split", [[1, 1, 1, 1, 1], [3, 2], [5]])
def test_decode_matches_the_golden(split, at_once):
    golden = load_golden(GOLDEN, "decode.safetensors")
    chunks = decode(golden_decoder(decode_frames_at_once=at_once), golden["z"], split)
    video = torch.cat(chunks, dim=1).transpose(1, 2)
    torch.testing.assert_close(video, golden["decoded_clamped"], rtol=0, atol=ATOL)


def test_decode_matches_every_golden_chunk_only_with_the_carried_frames():
    golden = load_golden(GOLDEN, "decode.safetensors")
    decoder = golden_decoder()
    chunks = decode(decoder, golden["z"], [1] * 5)
    for i, chunk in enumerate(chunks):
        expected = golden[f"chunk{i}"].clamp(-1, 1)
        torch.testing.assert_close(chunk.transpose(1, 2), expected, rtol=0, atol=ATOL)

    cache = decoder.initialize_cache()
    decoder(golden["z"][:, :, :1], 0, cache)
    cache.slots["decoder.upsamples.0.residual.2"].zero_()  # negative control: one layer forgets
    forgetful = decoder(golden["z"][:, :, 1:2], 1, cache)
    assert (forgetful - chunks[1]).abs().max() > 20 * ATOL


def test_second_latent_frame_sees_zeros_in_the_temporal_upsampling():
    golden = load_golden(GOLDEN, "decode.safetensors")
    decoder = golden_decoder()
    cache = decoder.initialize_cache()
    decoder(golden["z"][:, :, :1], 0, cache)
    slot = cache.slots["decoder.upsamples.3.time_conv"]
    assert torch.equal(slot, torch.zeros_like(slot))
    slot[:, :, -1] = cache.slots["decoder.upsamples.2.residual.6"][:, :, -1]  # negative control
    remembered = decoder(golden["z"][:, :, 1:2], 1, cache).transpose(1, 2)
    assert (remembered - golden["chunk1"].clamp(-1, 1)).abs().max() > 20 * ATOL


@pytest.mark.parametrize("name", ["", "_i2v_first_frame_only"])
def test_encode_matches_the_golden(name):
    golden = load_golden(GOLDEN, "encode.safetensors")
    encoder = WanVAEImageEncoderConfig(dim=golden_config(GOLDEN)["config"]["dim"]).setup()
    load_half(encoder, golden_weights())
    latent = encoder(golden[f"video{name}"])
    torch.testing.assert_close(latent, golden[f"latent{name}"], rtol=0, atol=ATOL)
    others = golden["latent" if name else "latent_i2v_first_frame_only"]
    assert (latent - others).abs().max() > 20 * ATOL  # negative control: the other clip's latents


def test_constants_match_the_golden():
    golden = load_golden(GOLDEN, "decode.safetensors")
    assert torch.equal(torch.tensor(WAN21_LATENT_MEAN), golden["mean"])
    assert torch.equal(torch.tensor(WAN21_LATENT_STD), golden["std"])
    raw = denormalise(golden["z"], WAN21_LATENT_MEAN, WAN21_LATENT_STD)
    torch.testing.assert_close(raw, golden["denormalised_z"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalise(raw, WAN21_LATENT_MEAN, WAN21_LATENT_STD), golden["z"])


@pytest.mark.slow
def test_both_halves_match_diffusers(tmp_path):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(11)
    dims = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    peer: Any = AutoencoderKLWan(base_dim=4, temperal_downsample=[False, True, True], **dims)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 4 else 0.1)
    save_file(peer.state_dict(), tmp_path / "peer.safetensors")
    decoder, encoder = WanVAEDecoderConfig(dim=4).setup(), WanVAEImageEncoderConfig(dim=4).setup()
    for half, ignore in ((decoder, DECODER_IGNORES), (encoder, ENCODER_IGNORES)):
        source = CheckpointConfig(source=str(tmp_path / "peer.safetensors"), ignore=ignore)
        assert load_checkpoint(half, source).key_map == "diffusers"

    z, video = latents(4), pixels(9)
    with torch.no_grad():
        raw = denormalise(z, WAN21_LATENT_MEAN, WAN21_LATENT_STD)
        expected = peer.decode(raw).sample
        mean = peer.encode(video).latent_dist.mean
    decoded = torch.cat(decode(decoder, z, [1, 3]), dim=1).transpose(1, 2)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=ATOL)
    assert expected.abs().min() < 0.5  # not all clamped
    encoded = denormalise(encoder(video), WAN21_LATENT_MEAN, WAN21_LATENT_STD)
    torch.testing.assert_close(encoded, mean, rtol=1e-5, atol=ATOL)
    wrong = decoder(z.flip(1), 0, decoder.initialize_cache()).transpose(1, 2)
    assert (wrong - expected).abs().max() > 20 * ATOL  # negative control: channels reversed


def test_full_size_takes_exactly_the_published_tensors(tmp_path):
    manifest = load_manifest("wan21_vae")
    write_sparse_safetensors(tmp_path / "vae.safetensors", manifest)
    decoder, encoder = WanVAEDecoderConfig(), WanVAEImageEncoderConfig()
    with torch.device("meta"):
        halves = {DECODER_IGNORES: decoder.setup(), ENCODER_IGNORES: encoder.setup()}
    taken = 0
    for ignore, half in halves.items():
        source = CheckpointConfig(source=str(tmp_path / "vae.safetensors"), ignore=ignore)
        taken += load_checkpoint(half, source, device="meta").tensors
    assert taken == len(manifest) == 194
    strict = CheckpointConfig(source=str(tmp_path / "vae.safetensors"))
    with pytest.raises(CheckpointError, match="does not fit"):  # negative control: both halves
        load_checkpoint(halves[DECODER_IGNORES], strict, device="meta")


# Streaming


def test_decode_is_bit_equal_for_any_split_into_chunks():
    decoder, z = tiny_decoder(), latents(6)
    whole = decoder(z)
    for split in ([1] * 6, [3, 3], [2, 3, 1], [4, 2]):
        assert torch.equal(torch.cat(decode(decoder, z, split), dim=1), whole)
    restarted = torch.cat([decoder(z[:, :, :3]), decoder(z[:, :, 3:])], dim=1)
    assert not torch.equal(restarted[:, 9:], whole[:, 9 : restarted.shape[1]])  # negative control


@pytest.mark.parametrize("at_once", [0, None, 2, 5])
def test_longer_passes_equal_single_frames_up_to_rounding(at_once):
    z = latents(7)
    single = torch.cat(decode(tiny_decoder(), z, [3, 4]), dim=1)
    longer = torch.cat(decode(tiny_decoder(decode_frames_at_once=at_once), z, [3, 4]), dim=1)
    torch.testing.assert_close(longer, single, rtol=0, atol=ATOL)


@pytest.mark.parametrize("at_once", [1, None])
@pytest.mark.parametrize(("split", "frames"), [([3, 3, 3], [9, 12, 12]), ([1, 1, 2], [1, 4, 8])])
def test_decode_yields_the_exact_number_of_frames(split, frames, at_once):
    chunks = decode(tiny_decoder(decode_frames_at_once=at_once), latents(sum(split)), split)
    assert [chunk.shape for chunk in chunks] == [(1, n, 3, 24, 16) for n in frames]
    assert all(chunk.dtype == torch.float32 and chunk.abs().max() <= 1 for chunk in chunks)


def test_interleaved_rollouts_equal_solo_rollouts():
    decoder, first, second = tiny_decoder(), latents(4), latents(4).flip(2)
    solo = decode(decoder, first, [2, 2]), decode(decoder, second, [2, 2])
    caches = decoder.initialize_cache(), decoder.initialize_cache()
    for i, (a, b) in enumerate(zip(first.split(2, dim=2), second.split(2, dim=2), strict=True)):
        assert torch.equal(decoder(a, i, caches[0]), solo[0][i])
        assert torch.equal(decoder(b, i, caches[1]), solo[1][i])


def test_clips_of_a_batch_do_not_touch_each_other():
    decoder = tiny_decoder(decode_frames_at_once=None)
    z = latents(4, batch=2)
    both = torch.cat(decode(decoder, z, [2, 2]), dim=1)
    for i in range(2):
        alone = torch.cat(decode(decoder, z[i : i + 1], [2, 2]), dim=1)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=ATOL)


def test_cache_round_trips_and_stays_at_constant_size():
    decoder, z = tiny_decoder(), latents(12)
    cache, sizes, expected = decoder.initialize_cache(), [], []
    for i, chunk in enumerate(z.split(2, dim=2)):
        if i == 3:
            resumed = deepcopy(cache)
        expected.append(decoder(chunk, i, cache))
        sizes.append(cache.num_bytes())
    assert len(set(sizes)) == 1
    assert all(isinstance(value, Tensor) for value in resumed.slots.values())
    for i in (3, 4, 5):
        assert torch.equal(decoder(z[:, :, 2 * i : 2 * i + 2], i, resumed), expected[i])
    assert not torch.equal(decoder(z[:, :, 6:8], 6, resumed), expected[3])  # negative control


def test_one_cache_serves_inference_mode_and_no_grad():
    decoder, z = tiny_decoder(), latents(2)
    cache = decoder.initialize_cache()
    with torch.inference_mode():
        decoder(z[:, :, :1], 0, cache)
    second = decoder(z[:, :, 1:], 1, cache)
    assert torch.equal(second, decode(decoder, z, [1, 1])[1])


def test_bfloat16_stays_near_float32():
    z = latents(3)
    exact, rounded = tiny_decoder()(z), tiny_decoder(dtype="bfloat16")(z)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs()
    assert error.max() < 0.2 and error.mean() < 0.02


def test_every_place_of_the_plan_exists_and_only_those_look_sideways():
    decoder = tiny_decoder()
    plan = decoder.parallel_plan().spatial
    patterns = [re.compile(re.escape(p).replace(r"\*", "[^.]+")) for p in plan]
    modules = dict(decoder.named_modules())
    matched = {n for n in modules if any(p.fullmatch(n) for p in patterns)}
    assert all(any(p.fullmatch(n) for n in modules) for p in patterns)
    wide = {n for n, p in decoder.named_parameters() if p.dim() >= 4 and p.shape[-1] > 1}
    assert {n.removesuffix(".weight") for n in wide} == matched - {"decoder.middle.1.core"}


# Encoding


def test_streamed_encode_is_bit_equal_to_the_whole_video():
    encoder, video = tiny_encoder(), pixels(13)
    whole = encoder(video)
    assert whole.shape == (1, 16, 4, 2, 3)
    for split in ([1, 4, 8], [5, 8], [9, 4]):
        cache = encoder.initialize_cache()
        parts = [encoder.encode_chunk(part, cache) for part in video.split(split, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), whole)
    fresh = encoder.encode_chunk(video[:, :, 4:5], encoder.initialize_cache())
    assert not torch.equal(fresh, whole[:, :, 1:2])  # negative control: no carried frames


def test_an_image_is_a_video_of_one_frame_and_a_short_tail_is_left_out():
    encoder, video = tiny_encoder(), pixels(8)
    image = encoder(video[:, :, 0])
    assert torch.equal(image, encoder(video[:, :, :1]))
    assert torch.equal(encoder(video), encoder(video[:, :, :5]))


# Bad input


def test_chunks_out_of_turn_are_refused():
    decoder, z = tiny_decoder(), latents(1)
    cache = decoder.initialize_cache()
    decoder(z, 0, cache)
    with pytest.raises(ValueError, match=r"autoregressive_index=2.*expects 1"):
        decoder(z, 2, cache)


def test_a_cache_of_another_size_or_network_is_refused():
    decoder, z = tiny_decoder(), latents(1)
    cache = decoder.initialize_cache()
    decoder(z, 0, cache)
    with pytest.raises(ValueError, match="fixed for a rollout"):
        decoder(latents(1, (4, 4)), 1, cache)
    encoder = tiny_encoder()
    with pytest.raises(ValueError, match="belongs to another network"):
        encoder.encode_chunk(pixels(4), cache)
    del cache.slots["decoder.upsamples.0.residual.2"]
    with pytest.raises(ValueError, match=r"nothing for decoder\.upsamples\.0\.residual\.2"):
        decoder(z, 1, cache)


@pytest.mark.parametrize("shape", [(1, 4, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_wrong_latents_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[batch, 16, latent frames"):
        tiny_decoder()(torch.zeros(shape))


def test_wrong_images_are_refused():
    encoder = tiny_encoder()
    with pytest.raises(ValueError, match=r"width 20 is not divisible by 8.*16 and 24"):
        encoder(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"shape \[1, 4, 1, 16, 16\]"):
        encoder(torch.zeros(1, 4, 16, 16))
    with pytest.raises(TypeError, match=r"uint8.*127\.5"):
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 frames cannot be encoded as the first chunk"):
        encoder.encode_chunk(pixels(3), encoder.initialize_cache())


def test_wrong_dimensions_are_refused():
    with pytest.raises(ValueError, match="temporal_downsample has 2 entries"):
        WanVAEDecoderConfig(temporal_downsample=(False, True))
    with pytest.raises(ValueError, match="latent_mean has 16 values for z_dim=48"):
        WanVAEDecoderConfig(z_dim=48)
    with pytest.raises(ValueError, match="decode_frames_at_once=-1"):
        WanVAEDecoderConfig(decode_frames_at_once=-1)
