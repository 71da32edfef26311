"""Fine-tunes the decoder on the transformer's own rollouts."""

import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world.codec import PatchDecoder
from flashdreams.runtime.checkpoint import CheckpointConfig

from .evaluate import HeldOut, draw_held_out, self_rollout
from .worlds import World

log = logging.getLogger(__name__)

FRAMES, BATCH = 24, 24


def polish_decoder(
    world: World, decoder: PatchDecoder, weights: Path, seed: int, seconds: float, walks: int = 16
) -> None:
    """Train on pairs of consecutive latents of self-rollouts, against the rendered truth.

    Args:
        world: world of the frames.
        decoder: trained in place, on its device.
        weights: weights of the transformer.
        seed: seed of walks and noise; must differ from the evaluation's seed.
        seconds: training time.
        walks: walks per round.
    """
    device = next(decoder.parameters()).device
    transformer = dict(checkpoint=CheckpointConfig(source=str(weights)))
    config = derive_config(
        world.pipeline,
        image_encoder=None,
        decoder=None,
        diffusion_model=dict(transformer=transformer),
    )
    pipeline: StreamInferencePipeline = config.setup(device=str(device))
    decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    started, round_ = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - elapsed / seconds)
        held = draw_held_out(walks, FRAMES, seed * 1_000_000 + round_, world, device)
        pairs, truth = _pairs(self_rollout(pipeline, held, held.scene, seed=round_), held)
        errors = []
        for order in torch.randperm(len(pairs), generator=generator).split(BATCH):
            picked = order.to(device)
            output = decoder.decode_pictures(pairs[picked])
            error = (output - truth[picked]).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (error + 1e-5).sqrt().mean().backward()
            optimizer.step()
            errors.append(error.detach())
        round_ += 1
        decibel = float((-10 * (torch.cat(errors) / 4).log10()).mean())
        log.info("polish round %d: %.2f dB, %.0f s", round_, decibel, elapsed)


def _pairs(latent: Tensor, walks: HeldOut) -> tuple[Tensor, Tensor]:
    """Latents ``[B, C, F, h, w]`` paired with the previous ones, and the true frames."""
    before = torch.cat([latent[:, :, :1], latent[:, :, :-1]], dim=2)
    pairs = torch.cat([latent, before], dim=1).transpose(1, 2).flatten(0, 1)
    return pairs, walks.truth.flatten(0, 1)
