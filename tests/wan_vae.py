"""Small Wan autoencoders, and what their tests decode and encode."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.models.wan.vae import DECODER_IGNORES, ENCODER_IGNORES, denormalise
from flashdreams.runtime.checkpoint import CheckpointConfig, load_checkpoint
from tests.manifests import load_manifest, write_sparse_safetensors

ATOL = 5e-5
"""In float32 against official code and across pass lengths."""


def drawn(config: type, *, seed: int, **overrides: Any) -> Any:
    """An encoder or decoder of width 4 with weights of a seed.

    Args:
        config: class of its config.
        seed: of the weights.
        overrides: other fields of the config.
    """
    torch.manual_seed(seed)
    return config(dim=4, **overrides).setup()


def draw_latents(
    channels: int, frames: int, size: tuple[int, int] = (3, 2), batch: int = 1
) -> Tensor:
    """Normal latents ``[batch, channels, frames, *size]``, always the same."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(batch, channels, frames, *size, generator=generator)


def draw_pixels(size: tuple[int, int], frames: int) -> Tensor:
    """A video ``[1, 3, frames, *size]`` in [-1, 1], always the same."""
    generator = torch.Generator().manual_seed(10)
    return torch.rand(1, 3, frames, *size, generator=generator) * 2 - 1


def decode(decoder: Any, z: Tensor, split: list[int]) -> list[Tensor]:
    """Decode latents in chunks of these many frames."""
    cache = decoder.initialize_cache()
    return [decoder(chunk, i, cache) for i, chunk in enumerate(z.split(split, dim=2))]


def check_against_diffusers(
    peer: Any, decoder_config: Any, encoder_config: Any, folder: Path
) -> None:
    """Both halves, with weights of a file of ``diffusers``, compute what it computes."""
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 4 else 0.1)
    save_file(peer.state_dict(), folder / "peer.safetensors")
    decoder, encoder = decoder_config.setup(), encoder_config.setup()
    for half, ignore in ((decoder, DECODER_IGNORES), (encoder, ENCODER_IGNORES)):
        source = CheckpointConfig(source=str(folder / "peer.safetensors"), ignore=ignore)
        assert load_checkpoint(half, source).key_map == "diffusers"

    config = decoder_config
    z = draw_latents(config.z_dim, 4)
    video = draw_pixels((2 * config.spatial_factor, 3 * config.spatial_factor), 9)
    with torch.no_grad():
        expected = peer.decode(denormalise(z, config.latent_mean, config.latent_std)).sample
        mean = peer.encode(video).latent_dist.mean
    decoded = torch.cat(decode(decoder, z, [1, 3]), dim=1).transpose(1, 2)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=ATOL)
    assert expected.abs().min() < 0.5  # not all clamped
    encoded = denormalise(encoder(video), config.latent_mean, config.latent_std)
    torch.testing.assert_close(encoded, mean, rtol=1e-5, atol=ATOL)
    wrong = decoder(z.flip(1), 0, decoder.initialize_cache()).transpose(1, 2)
    assert (wrong - expected).abs().max() > 20 * ATOL  # negative control: channels reversed


def check_published_tensors(
    name: str, decoder_config: Any, encoder_config: Any, folder: Path
) -> CheckpointConfig:
    """Both halves in full size take every tensor of a published file, and no other.

    Returns:
        The file, as a decoder reads it.
    """
    manifest = load_manifest(name)
    write_sparse_safetensors(folder / "vae.safetensors", manifest)
    taken = 0
    for config, ignore in ((encoder_config, ENCODER_IGNORES), (decoder_config, DECODER_IGNORES)):
        source = CheckpointConfig(source=str(folder / "vae.safetensors"), ignore=ignore)
        with torch.device("meta"):
            half = config.setup()
        taken += load_checkpoint(half, source, device="meta").tensors
    assert taken == len(manifest)
    return source


def check_streamed_encode(encoder: Any, video: Tensor) -> None:
    """A video of 13 frames in chunks has the bits of the whole, thanks to the carried frames."""
    whole = encoder(video)
    rows, columns = (size // encoder.config.spatial_factor for size in video.shape[3:])
    assert whole.shape == (1, encoder.config.z_dim, 4, rows, columns)
    for split in ([1, 4, 8], [5, 8], [9, 4]):
        cache = encoder.initialize_cache()
        parts = [encoder.encode_chunk(part, cache) for part in video.split(split, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), whole)
    fresh = encoder.encode_chunk(video[:, :, 4:5], encoder.initialize_cache())
    assert not torch.equal(fresh, whole[:, :, 1:2])  # negative control: no carried frames
