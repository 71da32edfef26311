"""The Wan 2.2 autoencoder against the official code, ``diffusers`` and itself in pieces."""

import re
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.models.wan import vae22
from flashdreams.models.wan.vae import (
    DECODER_IGNORES,
    ENCODER_IGNORES,
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
from tests.manifests import load_manifest, write_sparse_safetensors
from tests.wan_vae import decode, draw_latents, draw_pixels, drawn

GOLDEN = "c2_wan22_vae_tiny"
ATOL = 5e-5  # float32 against the official code and across pass lengths


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
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 4 else 0.1)
    save_file(peer.state_dict(), tmp_path / "peer.safetensors")
    decoder = WanVAE22DecoderConfig(dim=6).setup()
    encoder = WanVAE22ImageEncoderConfig(dim=4).setup()
    for half, ignore in ((decoder, DECODER_IGNORES), (encoder, ENCODER_IGNORES)):
        source = CheckpointConfig(source=str(tmp_path / "peer.safetensors"), ignore=ignore)
        assert load_checkpoint(half, source).key_map == "diffusers"

    z, video = latents(4), pixels(9)
    with torch.no_grad():
        raw = denormalise(z, WAN22_LATENT_MEAN, WAN22_LATENT_STD)
        expected = peer.decode(raw).sample
        mean = peer.encode(video).latent_dist.mean
    decoded = torch.cat(decode(decoder, z, [1, 3]), dim=1).transpose(1, 2)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=ATOL)
    assert expected.abs().min() < 0.5  # not all clamped
    encoded = denormalise(encoder(video), WAN22_LATENT_MEAN, WAN22_LATENT_STD)
    torch.testing.assert_close(encoded, mean, rtol=1e-5, atol=ATOL)
    wrong = decoder(z.flip(1), 0, decoder.initialize_cache()).transpose(1, 2)
    assert (wrong - expected).abs().max() > 20 * ATOL  # negative control: channels reversed


def test_full_size_takes_exactly_the_published_tensors(tmp_path):
    manifest = load_manifest("wan22_vae")
    write_sparse_safetensors(tmp_path / "vae.safetensors", manifest)
    with torch.device("meta"):
        halves = {
            DECODER_IGNORES: WanVAE22DecoderConfig().setup(),
            ENCODER_IGNORES: WanVAE22ImageEncoderConfig().setup(),
        }
        other = WanVAEDecoderConfig().setup()
    taken = 0
    for ignore, half in halves.items():
        source = CheckpointConfig(source=str(tmp_path / "vae.safetensors"), ignore=ignore)
        taken += load_checkpoint(half, source, device="meta").tensors
    assert taken == len(manifest) == 196
    source = CheckpointConfig(source=str(tmp_path / "vae.safetensors"), ignore=DECODER_IGNORES)
    with pytest.raises(CheckpointError, match="does not fit"):  # negative control: Wan 2.1
        load_checkpoint(other, source, device="meta")


# Streaming


def test_decode_is_bit_equal_for_any_split_into_chunks():
    decoder, z = tiny_decoder(), latents(6)
    whole = decoder(z)
    assert whole.shape == (1, 21, 3, 48, 32)
    for split in ([1] * 6, [3, 3], [2, 3, 1], [4, 2]):
        assert torch.equal(torch.cat(decode(decoder, z, split), dim=1), whole)
    restarted = torch.cat([decoder(z[:, :, :3]), decoder(z[:, :, 3:])], dim=1)
    assert not torch.equal(restarted[:, 9:], whole[:, 9 : restarted.shape[1]])  # negative control


def test_streamed_encode_is_bit_equal_to_the_whole_video():
    encoder, video = tiny_encoder(), pixels(13)
    whole = encoder(video)
    assert whole.shape == (1, 48, 4, 2, 3)
    for split in ([1, 4, 8], [5, 8], [9, 4]):
        cache = encoder.initialize_cache()
        parts = [encoder.encode_chunk(part, cache) for part in video.split(split, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), whole)
    fresh = encoder.encode_chunk(video[:, :, 4:5], encoder.initialize_cache())
    assert not torch.equal(fresh, whole[:, :, 1:2])  # negative control: no carried frames
    longer = encoder(torch.cat([video, video[:, :, :3]], dim=2))
    assert torch.equal(longer, whole), "frames that fill no latent frame are left out"


def test_interleaved_rollouts_equal_solo_rollouts_and_state_keeps_its_size():
    decoder, first, second = tiny_decoder(), latents(4), latents(4).flip(2)
    solo = decode(decoder, first, [1] * 4), decode(decoder, second, [1] * 4)
    caches, sizes = (decoder.initialize_cache(), decoder.initialize_cache()), set()
    for i, (a, b) in enumerate(zip(first.split(1, dim=2), second.split(1, dim=2), strict=True)):
        if i == 2:
            resumed = deepcopy(caches[0])
        assert torch.equal(decoder(a, i, caches[0]), solo[0][i])
        assert torch.equal(decoder(b, i, caches[1]), solo[1][i])
        sizes.add(caches[0].num_bytes())
    assert len(sizes) == 1
    assert torch.equal(decoder(first[:, :, 2:3], 2, resumed), solo[0][2])


def test_clips_of_a_batch_do_not_touch_each_other():
    decoder, z = tiny_decoder(decode_frames_at_once=None), latents(4, batch=2)
    both = torch.cat(decode(decoder, z, [2, 2]), dim=1)
    for i in range(2):
        alone = torch.cat(decode(decoder, z[i : i + 1], [2, 2]), dim=1)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=ATOL)


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


# Bad input


def test_latents_and_images_of_wan_21_are_refused():
    with pytest.raises(ValueError, match=r"expected \[batch, 48, latent frames"):
        tiny_decoder()(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(ValueError, match=r"width 24 is not divisible by 16.*16 and 32"):
        tiny_encoder()(torch.zeros(1, 3, 16, 24))
