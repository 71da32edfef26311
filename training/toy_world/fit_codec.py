"""Fits the codec: principal components for the encoder, gradient descent for the decoder."""

import logging
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.integrations.toy_world.codec import (
    PATCH,
    PatchDecoder,
    PatchEncoder,
)
from flashdreams.integrations.toy_world.scene import random_scene
from training.toy_world.walks import random_rollout
from training.toy_world.worlds import World

log = logging.getLogger(__name__)


def fit_encoder(
    world: World, seed: int, frames: int = 4096, device: str | torch.device = "cpu"
) -> PatchEncoder:
    """Principal components of the patches of random frames."""
    generator = torch.Generator(device).manual_seed(seed)
    clip = 4
    scene = random_scene(frames // clip, generator).repeat_interleave(clip, 0)
    pose = random_rollout(frames // clip, clip, generator).flatten(0, 1)
    pictures = world.draw(scene, pose, world.size)
    patches = F.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1).flatten(0, 2).double()
    encoder = PatchEncoder(world.new_encoder_config()).to(device)
    channels = encoder.config.channels
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    encoder.mean.copy_(mean)
    encoder.basis.copy_(vectors.flip(1)[:, :channels].T)
    encoder.std.copy_(values.flip(0)[:channels].sqrt())
    kept = values.flip(0)[:channels].sum() / values.sum()
    log.info("linear codec: %.2f %% of the variance, %.2f dB", 100 * kept, _psnr(patches, encoder))
    return encoder


def _psnr(patches: Tensor, encoder: PatchEncoder) -> float:
    basis = encoder.basis.double()
    centred = patches - encoder.mean
    error = (centred - centred @ basis.T @ basis).square().mean() / 4
    return float(-10 * error.log10())


@torch.no_grad()
def start_from_linear(decoder: PatchDecoder, encoder: PatchEncoder) -> None:
    """Make the decoder's shortcut the exact inverse of the linear encoder."""
    weight = (encoder.basis * encoder.std[:, None]).T[:, :, None, None]
    decoder.linear.load_state_dict({"weight": weight, "bias": encoder.mean})
    last = list(decoder.stages[-1].children())[-1]
    for parameter in last.parameters():
        parameter.zero_()


def fit_decoder(
    world: World,
    decoder: PatchDecoder,
    encoder: PatchEncoder,
    seed: int,
    steps: int,
    batch: int = 24,
) -> None:
    """Train the decoder on pairs of consecutive frames with slightly noisy latents."""
    device = encoder.mean.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(steps):
        scene = random_scene(batch, generator).repeat_interleave(2, 0)
        pose = random_rollout(batch, 2, generator).flatten(0, 1)
        pictures = world.draw(scene, pose, world.size)
        latent = encoder(pictures)[:, :, 0]
        level = 0.15 * torch.rand(len(latent), 1, 1, 1, generator=generator, device=device)
        latent = latent + level * torch.randn(latent.shape, generator=generator, device=device)
        before, now = latent.unflatten(0, (batch, 2)).unbind(1)
        output = decoder.decode_pictures(torch.cat([now, before], dim=1))
        error = (output - pictures.unflatten(0, (batch, 2))[:, 1]).square().mean((1, 2, 3))
        optimizer.zero_grad()
        (error + 1e-5).sqrt().mean().backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            decibel = float((-10 * (error.detach() / 4).log10()).mean())
            log.info("decoder %d: %.2f dB, %.0f s", step, decibel, time.monotonic() - started)
