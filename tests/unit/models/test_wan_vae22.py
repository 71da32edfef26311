"""The Wan 2.2 autoencoder against the official code, ``diffusers`` and itself in pieces."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdreams.models.wan import vae22
from flashdreams.models.wan.vae import (
    WanVAEDecoderConfig,
    denormalise,
    normalise,
)
from flashdreams.models.wan.vae22 import (
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    WanVAE22Decoder,
    WanVAE22DecoderConfig,
    WanVAE22ImageEncoder,
    WanVAE22ImageEncoderConfig,
    spread_channels,
)
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.goldens import golden_config, golden_path, load_golden
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

GOLDEN = "c2_wan22_vae_tiny"


tiny_decoder = partial(drawn, WanVAE22DecoderConfig, seed=7)
tiny_encoder = partial(drawn, WanVAE22ImageEncoderConfig, seed=8)
latents = partial(draw_latents, 48)
pixels = partial(draw_pixels, (32, 48))


def golden_half(file: str, config):
    """A half with the official weights, read as a run reads them."""
    half = config.setup()
    source = CheckpointConfig(source=str(golden_path(GOLDEN, f"weights_{file}.safetensors")))
    load_checkpoint(half, source)
    return half


def golden_decoder(**overrides) -> WanVAE22Decoder:
    dim = golden_config(GOLDEN)["config"]["dec_dim"]
    return golden_half("decoder", WanVAE22DecoderConfig(dim=dim, **overrides))


def golden_encoder() -> WanVAE22ImageEncoder:
    dim = golden_config(GOLDEN)["config"]["dim"]
    return golden_half("encoder", WanVAE22ImageEncoderConfig(dim=dim))


# Against the official code


@pytest.mark.parametrize("at_once", [1, 2, None])
@pytest.mark.parametrize("split", [[1, 1, 1], [2, 1], [3]])
def test_decode_matches_the_golden(split, at_once):
    golden = load_golden(GOLDEN, "decode.safetensors")
    chunks = decode(golden_decoder(decode_frames_at_once=at_once), golden["z"], split)
    video = torch.cat(chunks, dim=1).transpose(1, 2)
    expected = golden["decoded_raw"].clamp(-1, 1)
    torch.testing.assert_close(video, expected, rtol=0, atol=ATOL)
    assert expected.abs().lt(0.9).any()  # not all clamped


def test_carried_frames_are_the_official_ones():
    golden, decoder = load_golden(GOLDEN, "decode.safetensors"), golden_decoder()
    cache = decoder.initialize_cache()
    for i, chunk in enumerate(golden["z"].split(1, dim=2)):
        decoder(chunk, i, cache)
    slots = list(cache.slots.values())
    official = golden_config(GOLDEN)["decoder_slots_after"]["frame2"]
    assert [list(x.shape) for x in slots] == [shape for shape in official if shape is not None]
    for name, expected in golden.items():
        if name.startswith("cache_final/"):
            found = slots[int(name.removeprefix("cache_final/"))]
            torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_encode_matches_the_golden():
    golden, encoder = load_golden(GOLDEN, "encode.safetensors"), golden_encoder()
    latent = encoder(golden["video"])
    torch.testing.assert_close(latent, golden["latent"], rtol=0, atol=ATOL)
    cache = encoder.initialize_cache()
    for part in golden["video"].split([1, 4, 4], dim=2):
        encoder.encode_chunk(part, cache)
    found = [list(x.shape) for x in cache.slots.values()]
    official = golden_config(GOLDEN)["encoder_slots_after"]["chunk2"]
    assert found == [shape for shape in official if shape is not None]


def wrong_spread(order):
    """The shortcut of the decoder with its cells read in another order."""

    def spread(x: Tensor, out_channels: int, scale_t: int) -> Tensor:
        batch, channels, frames, rows, columns = x.shape
        repeated = x.repeat_interleave(out_channels * scale_t * 4 // channels, dim=1)
        cells = repeated.unflatten(1, (out_channels, scale_t, 2, 2)).permute(order)
        return cells.reshape(batch, out_channels, scale_t * frames, 2 * rows, 2 * columns)

    return spread


MISTAKES = {
    "no shortcut": ("spread_channels", lambda *args: 0 * spread_channels(*args)),
    "rows and columns exchanged": ("spread_channels", wrong_spread((0, 1, 5, 2, 6, 4, 7, 3))),
    "pixels by rows": ("unpatch_pixels", lambda x: torch.pixel_shuffle(
        x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, -1)).transpose(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_in_the_shortcuts_and_patches_are_seen(mistake, monkeypatch):
    """Negative controls: each moves the frames far beyond the tolerance."""
    golden, decoder = load_golden(GOLDEN, "decode.safetensors"), golden_decoder()
    name, wrong = MISTAKES[mistake]
    if mistake == "rows and columns exchanged":
        assert torch.equal(wrong_spread((0, 1, 5, 2, 6, 3, 7, 4))(golden["z"], 6, 2),
                           spread_channels(golden["z"], 6, 2))  # fmt: skip
    monkeypatch.setattr(vae22, name, wrong)
    video = torch.cat(decode(decoder, golden["z"], [3]), dim=1).transpose(1, 2)
    assert (video - golden["decoded_raw"].clamp(-1, 1)).abs().max() > 0.1


def test_the_encoder_puts_zeros_before_the_first_frame(monkeypatch):
    """Negative control: the first frame repeated in their place."""
    golden, encoder = load_golden(GOLDEN, "encode.safetensors"), golden_encoder()
    right = vae22.gather_channels

    def repeated(x: Tensor, out_channels: int, scale_t: int, scale: int) -> Tensor:
        x = torch.cat([x[:, :, :1]] * (-x.shape[2] % scale_t) + [x], dim=2)
        return right(x, out_channels, scale_t, scale)

    monkeypatch.setattr(vae22, "gather_channels", repeated)
    assert (encoder(golden["video"]) - golden["latent"]).abs().max() > 0.1


def test_constants_match_the_golden():
    config = golden_config(GOLDEN)
    assert pytest.approx(config["mean"], rel=1e-6) == list(WAN22_LATENT_MEAN)
    assert pytest.approx(config["std"], rel=1e-6) == list(WAN22_LATENT_STD)
    z = latents(1)
    raw = denormalise(z, WAN22_LATENT_MEAN, WAN22_LATENT_STD)
    torch.testing.assert_close(normalise(raw, WAN22_LATENT_MEAN, WAN22_LATENT_STD), z)


# Against diffusers


@pytest.mark.slow
def test_both_halves_match_diffusers(tmp_path):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(11)
    peer: Any = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=6, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        attn_scales=[], temperal_downsample=[False, True, True], is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )  # fmt: skip
    configs = WanVAE22DecoderConfig(dim=6), WanVAE22ImageEncoderConfig(dim=4)
    check_against_diffusers(peer, *configs, tmp_path)


def test_full_size_takes_exactly_the_published_tensors(tmp_path):
    configs = WanVAE22DecoderConfig(), WanVAE22ImageEncoderConfig()
    source = check_published_tensors("wan22_vae", *configs, tmp_path)
    with torch.device("meta"):
        other = WanVAEDecoderConfig().setup()
    with pytest.raises(CheckpointError, match="does not fit"):  # negative control: Wan 2.1
        load_checkpoint(other, source, device="meta")


# Streaming


def test_streamed_encode_is_bit_equal_to_the_whole_video():
    encoder, video = tiny_encoder(), pixels(13)
    check_streamed_encode(encoder, video)
    longer = encoder(torch.cat([video, video[:, :, :3]], dim=2))
    assert torch.equal(longer, encoder(video)), "frames that fill no latent frame are left out"


# Bad input


def test_latents_and_images_of_wan_21_are_refused():
    with pytest.raises(ValueError, match=r"expected \[batch, 48, latent frames"):
        tiny_decoder()(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(ValueError, match=r"width 24 is not divisible by 16.*16 and 32"):
        tiny_encoder()(torch.zeros(1, 3, 16, 24))
