"""The Wan 2.1 autoencoder against the official code, ``diffusers`` and itself in pieces."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdreams.models.wan.vae import (
    WAN21_LATENT_MEAN,
    WAN21_LATENT_STD,
    WanVAEDecoder,
    WanVAEDecoderConfig,
    WanVAEImageEncoderConfig,
    denormalise,
    normalise,
)
from flashdreams.runtime.checkpoint import CheckpointError, load_checkpoint
from tests.goldens import golden_config, load_golden
from tests.wan_vae import (
    ATOL,
    check_against_diffusers,
    check_published_tensors,
    check_streamed_encode,
    decode,
    draw_latents,
    draw_pixels,
    drawn,
)

GOLDEN = "b3_wan_vae_tiny"


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
    configs = WanVAEDecoderConfig(dim=4), WanVAEImageEncoderConfig(dim=4)
    check_against_diffusers(peer, *configs, tmp_path)


def test_full_size_takes_exactly_the_published_tensors(tmp_path):
    configs = WanVAEDecoderConfig(), WanVAEImageEncoderConfig()
    source = check_published_tensors("wan21_vae", *configs, tmp_path)
    with torch.device("meta"):
        decoder = configs[0].setup()
    with pytest.raises(CheckpointError, match="does not fit"):  # negative control: both halves
        load_checkpoint(decoder, replace(source, ignore=()), device="meta")


# Streaming


def test_one_cache_serves_inference_mode_and_no_grad():
    decoder, z = tiny_decoder(), latents(2)
    cache = decoder.initialize_cache()
    with torch.inference_mode():
        decoder(z[:, :, :1], 0, cache)
    second = decoder(z[:, :, 1:], 1, cache)
    assert torch.equal(second, decode(decoder, z, [1, 1])[1])


# Encoding


def test_streamed_encode_is_bit_equal_to_the_whole_video():
    check_streamed_encode(tiny_encoder(), pixels(13))


def test_an_image_is_a_video_of_one_frame_and_a_short_tail_is_left_out():
    encoder, video = tiny_encoder(), pixels(8)
    image = encoder(video[:, :, 0])
    assert torch.equal(image, encoder(video[:, :, :1]))
    assert torch.equal(encoder(video), encoder(video[:, :, :5]))


# Bad input


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
