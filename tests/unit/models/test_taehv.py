import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.models.taehv import (
    DECODER_IGNORES,
    TAEHVDecoder,
    TAEHVDecoderConfig,
)
from flashdreams.models.wan.vae import WAN21_LATENT_MEAN, WAN21_LATENT_STD, denormalise
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.manifests import load_manifest, write_sparse_safetensors
from tests.wan_vae import decode

ATOL = 1e-5  # float32, against a whole-sequence reference and across pass lengths


def tiny_decoder(**overrides) -> TAEHVDecoder:
    torch.manual_seed(3)
    decoder = TAEHVDecoderConfig(channels=(16, 8, 6, 6), **overrides).setup()
    liven(decoder)
    return decoder


def liven(module: torch.nn.Module) -> None:
    """Larger weights than the default, so that values spread over the whole range."""
    for parameter in module.parameters():
        parameter.data.mul_(1.7)


def latents(frames: int, batch: int = 1, channels: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, channels, frames, 3, 4, generator=generator)


# A reference that has no state: the whole clip, memory padded with zeros along time


def memory_block(weights: dict[str, Tensor], name: str, x: Tensor, lag: int = 1) -> Tensor:
    """One clip ``[F, C, rows, columns]``; ``lag`` is how far back the memory looks."""
    past = F.pad(x, (0, 0, 0, 0, 0, 0, lag, 0))[: len(x)]
    y = torch.cat((x, past), dim=1)
    for layer in ("0", "2", "4"):
        w, b = (weights[f"{name}.conv.{layer}.{kind}"] for kind in ("weight", "bias"))
        y = F.conv2d(y, w, b, padding=1)
        if layer != "4":
            y = y.relu()
    return (y + x).relu()


def reference_decode(decoder: TAEHVDecoder, clip: Tensor, patch: int = 1, lag: int = 1) -> Tensor:
    """``[C, T, H, W]`` to ``[F, 3, height, width]``, in the order of the public layers."""
    weights = decoder.state_dict()
    x = clip.transpose(0, 1)
    x = F.conv2d(
        torch.tanh(x / 3) * 3, weights["decoder.1.weight"], weights["decoder.1.bias"], 1, 1
    )
    x = x.relu()
    for index in (3, 9, 15):
        for block in range(3):
            x = memory_block(weights, f"decoder.{index + block}", x, lag)
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        grown = F.conv2d(x, weights[f"decoder.{index + 4}.conv.weight"])
        x = grown.reshape(-1, x.shape[1], *x.shape[2:])
        x = F.conv2d(x, weights[f"decoder.{index + 5}.weight"], padding=1)
    x = F.conv2d(x.relu(), weights["decoder.22.weight"], weights["decoder.22.bias"], padding=1)
    return F.pixel_shuffle(x, patch).clamp(0, 1)[3:] * 2 - 1


# Decoding


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("split", [[1] * 6, [3, 3], [2, 1, 3], [6]])
def test_streamed_decode_equals_the_whole_sequence(split, at_once):
    decoder, z = tiny_decoder(decode_frames_at_once=at_once), latents(6)
    video = torch.cat(decode(decoder, z, split), dim=1)
    expected = reference_decode(decoder, z[0])
    torch.testing.assert_close(video[0], expected, rtol=0, atol=ATOL)
    wrong = reference_decode(decoder, z[0], lag=2)  # negative control: memory one frame too old
    assert (video[0] - wrong).abs().max() > 1000 * ATOL
    assert ((expected > -1) & (expected < 1)).float().mean() > 0.3  # not all clamped


def test_raw_latents_are_denormalised_first():
    z = latents(3)
    raw = denormalise(z, WAN21_LATENT_MEAN, WAN21_LATENT_STD)
    light = tiny_decoder(latents="raw")(z)
    assert torch.equal(light, tiny_decoder()(raw))
    assert (light - tiny_decoder()(z)).abs().max() > 0.1  # negative control


def test_patched_pixels_and_other_latents_decode():
    decoder = tiny_decoder(latent_channels=48, patch_size=2)
    z = latents(2, channels=48)
    video = torch.cat(decode(decoder, z, [1, 1]), dim=1)
    assert video.shape == (1, 5, 3, 48, 64)
    torch.testing.assert_close(video[0], reference_decode(decoder, z[0], 2), rtol=0, atol=ATOL)


# Checkpoints


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("taehv", {}),
        ("taew2_1", {}),
        ("taew2_2", {"latent_channels": 48, "patch_size": 2}),
    ],
)
def test_full_size_takes_exactly_the_published_tensors(name, dims, tmp_path):
    manifest = load_manifest(name)
    write_sparse_safetensors(tmp_path / "tiny.safetensors", manifest)
    with torch.device("meta"):
        decoder = TAEHVDecoderConfig(**dims).setup()
    source = CheckpointConfig(source=str(tmp_path / "tiny.safetensors"), ignore=DECODER_IGNORES)
    taken = load_checkpoint(decoder, source, device="meta").tensors
    assert len(manifest) == 128
    assert taken == sum(tensor.startswith("decoder.") for tensor in manifest)


def test_oversized_grow_weights_keep_their_last_rows(tmp_path):
    decoder = tiny_decoder()
    state = decoder.state_dict()
    own = state["decoder.7.conv.weight"]
    source = CheckpointConfig(source=str(tmp_path / "light.safetensors"))
    other = TAEHVDecoderConfig(channels=(16, 8, 6, 6)).setup()

    state["decoder.7.conv.weight"] = torch.cat((torch.full_like(own, 9.0), own))
    save_file(state, tmp_path / "light.safetensors")
    load_checkpoint(other, source)
    assert torch.equal(other.state_dict()["decoder.7.conv.weight"], own)
    assert torch.equal(other(latents(2)), decoder(latents(2)))

    state["decoder.7.conv.weight"] = own[:3].clone()  # negative control: too short is refused
    save_file(state, tmp_path / "light.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.7\.conv\.weight"):
        load_checkpoint(other, source)


# Bad input


def test_wrong_input_is_refused():
    decoder = tiny_decoder()
    with pytest.raises(ValueError, match=r"expected \[batch, 16, latent frames"):
        decoder(latents(1, channels=48))
    cache = decoder.initialize_cache()
    with pytest.raises(ValueError, match=r"autoregressive_index=1.*expects 0"):
        decoder(latents(1), 1, cache)
    with pytest.raises(ValueError, match="latent_mean has 16 values for latent_channels=48"):
        TAEHVDecoderConfig(latent_channels=48, latents="raw")
    with pytest.raises(ValueError, match="needs one more entry"):
        TAEHVDecoderConfig(channels=(8, 8))
    with pytest.raises(ValueError, match="decode_frames_at_once=-2"):
        TAEHVDecoderConfig(decode_frames_at_once=-2)
