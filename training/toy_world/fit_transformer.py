"""Trains the toy world's transformer: single frames first, then frames in context.

Neither stage changes the network's code: it runs without a cache over whole clips, with its
self-attention cores replaced by masked ones during training.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdreams.attention.cache import KVCache
from flashdreams.attention.core import AttentionCore
from flashdreams.integrations.toy_world.camera import CameraEncoderConfig
from flashdreams.integrations.toy_world.prompt import embed_scene
from flashdreams.integrations.toy_world.scene import FLOOR_SLOT, HIDDEN, SKY_SLOT
from flashdreams.models.wan.transformer import WanTransformer

from .muon import BatchedMuon
from .pool import Clips
from .worlds import World

log = logging.getLogger(__name__)

CONTEXT_FRAMES = 10
"""Frames of a training clip in the second stage."""
SHOWN_EVERY_S = 15
"""Seconds between progress messages."""


class MaskedCore(AttentionCore):
    """Attention with a boolean mask ``[L, S]``; replaces an attention core."""

    def __init__(self, head_dim: int, mask: Tensor) -> None:
        super().__init__(head_dim)
        self.bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; tensors are ``[B, L, N, D]``. On a CPU plain matmuls train faster than SDPA."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if q.is_cuda:
            bias = self.bias.to(q)
            return F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale).transpose(1, 2)
        scores = (q * self.scale) @ k.transpose(-2, -1) + self.bias.to(q.dtype)
        return (scores.softmax(-1) @ v).transpose(1, 2)


@contextmanager
def masked(model: WanTransformer, mask: Tensor) -> Iterator[None]:
    """Give every self-attention core the same mask inside the ``with`` block."""
    cores = [block.self_attn.core for block in model.blocks]
    for block in model.blocks:
        block.self_attn.core = MaskedCore(model.config.head_dim, mask)
    try:
        yield
    finally:
        for block, core in zip(model.blocks, cores, strict=True):
            block.self_attn.core = core


def context_mask(frames: int, sink: int, window: int, tokens_per_frame: int) -> Tensor:
    """Mask of ``[clean frames | noisy frames]``, ``[2L, 2L]``.

    Frame i attends to the clean frames j < i that are in the sink or among the last ``window``
    frames (including i), and to itself in its own half, as with the streaming cache.
    """
    query, key = torch.arange(frames)[:, None], torch.arange(frames)[None]
    past = (key < query) & ((key < sink) | (key > query - window))
    own = query == key
    nothing = torch.zeros_like(own)
    mask = torch.cat([torch.cat([past | own, nothing], 1), torch.cat([past, own], 1)])
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def predict(
    model: WanTransformer,
    camera: CameraEncoderConfig,
    latent: Tensor,
    timestep: Tensor,
    scene: Tensor,
    pose: Tensor,
    frames: Tensor,
) -> Tensor:
    """Run the bare network over ``[B, C, T, h, w]``; one timestep, pose and position per frame."""
    cache = model.initialize_cache(text=embed_scene(scene))
    control = camera.features(pose).flatten(1, 2)
    inputs = model.inputs_at(cache, frames, control)
    return model(latent, model.modulations(timestep), inputs, cache)


class Trainer:
    """One optimizer, one schedule and a running average for both stages."""

    def __init__(
        self, model: WanTransformer, world: World, clips: Clips, std: Tensor, seed: int
    ) -> None:
        self.model = model
        self.camera = world.camera
        self.clips = clips
        self.device = std.device
        self.weight = (std.square() / std.square().sum())[:, None, None, None]
        self.variance = float(std.square().sum()) / (3 * 64)
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        blocks = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
        matrices = [p for p in blocks if p.ndim == 2]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self.optimizers = [
            self._muon(matrices),
            torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base = [group["lr"] for o in self.optimizers for group in o.param_groups]

    def run(self, stage: str, seconds: float, batch: int, peak: float) -> None:
        """Train a stage for some seconds; its rate warms up for 3 % of them, then decays."""
        loss_of = {"frames": self.frame_loss, "video": self.video_loss}[stage]
        started, step, shown = time.monotonic(), 0, 0.0
        recent: list[Tensor] = []
        while (elapsed := time.monotonic() - started) < seconds:
            self._set_rate(peak, elapsed / seconds)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16), self._kernels():
                error = loss_of(batch)
                (error + 1e-5).sqrt().mean().backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            step += 1
            self._update_average(min(0.999, step / (step + 10)))
            recent.append((-10 * (error.detach() / 4).log10()).mean())
            if elapsed - shown > SHOWN_EVERY_S:
                decibel = float(torch.stack(recent).mean())
                log.info("%s step %d, %.0f s: %.2f dB", stage, step, elapsed, decibel)
                shown, recent = elapsed, []

    def _muon(self, matrices: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self.device.type == "cuda":
            return BatchedMuon(matrices, lr=0.02)
        return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95)

    def _kernels(self) -> AbstractContextManager[None]:
        """Select PyTorch's attention kernel: on a CPU plain matmuls are faster to train."""
        return nullcontext() if self.device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _set_rate(self, peak: float, progress: float) -> None:
        warm = min(1.0, progress / 0.03)
        rate = peak * warm * (0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - 0.03) / 0.97))
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, base in zip(groups, self.base, strict=True):
            group["lr"] = base * max(rate, 1e-3)

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        parameters = dict(self.model.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()), [parameters[name] for name in self.average], 1 - decay
        )

    def _noisy(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to ``[B, C, T, h, w]``, with one level per frame; mostly pure noise.

        Returns:
            The noisy latents and the timesteps ``[B, T]``.
        """
        b, _, t = clean.shape[:3]
        sigma = self._random(b, t)
        pure = self._random(b, t) < 0.85
        sigma = torch.where(pure, 1.0, 0.3 + 0.7 * sigma)
        noise = torch.randn(clean.shape, generator=self.generator, device=self.device)
        level = sigma[:, None, :, None, None]
        return (1 - level) * clean + level * noise, sigma * 1000

    def _error(self, output: Tensor, clean: Tensor) -> Tensor:
        """Mean squared error of the pictures per frame, according to the linear codec."""
        squared = (output - clean).square() * self.weight
        return squared.sum(1).mean((-2, -1)).flatten() * self.variance

    def frame_loss(self, batch: int) -> Tensor:
        """Single frames without context."""
        clips = max(1, batch // 4)
        latent, scene, pose = self.clips.sample(clips, self.random)
        shape = (clips, 4)
        picked = torch.randint(
            0, latent.shape[2], shape, generator=self.generator, device=self.device
        )
        rows = torch.arange(clips, device=self.device)[:, None]
        clean = latent.transpose(1, 2)[rows, picked].flatten(0, 1)[:, :, None]
        pose = pose[rows, picked].flatten(0, 1)[:, None]
        noisy, timestep = self._noisy(clean)
        scene = scene.repeat_interleave(4, 0)
        output = predict(
            self.model, self.camera, noisy, timestep[:, 0], scene, pose, torch.zeros(1)
        )
        return self._error(output, clean)

    def video_loss(self, batch: int) -> Tensor:
        """Clips in context, with partly hidden prompts.

        Every clip is used twice: first with its true context, then mostly with the model's own
        predictions from the first pass, because those are its context when it streams.
        """
        c = self.model.config
        if self._seen is None:
            latent, scene, pose = self.clips.sample(batch, self.random)
            clean, pose = latent[:, :, :CONTEXT_FRAMES], pose[:, :CONTEXT_FRAMES]
            scene = self._hide(scene)
            past = clean
        else:
            clean, scene, pose, own = self._seen
            kept = self._random(batch, 1, CONTEXT_FRAMES, 1, 1) < 0.2
            kept[:, :, 0] |= self._random(batch, 1, 1, 1) < 0.6
            past = torch.where(kept, clean, own)
        mask = context_mask(CONTEXT_FRAMES, c.sink_size_t, c.window_size_t, c.tokens_per_frame)
        mask = mask.to(self.device)
        with masked(self.model, mask):
            output = self._in_context(past, clean, scene, pose)
        self._seen = (clean, scene, pose, output.detach()) if self._seen is None else None
        return self._error(output, clean)

    def _in_context(self, past: Tensor, clean: Tensor, scene: Tensor, pose: Tensor) -> Tensor:
        """Predict all frames of ``clean`` at once, each with the frames of ``past`` before it."""
        frames = torch.arange(CONTEXT_FRAMES)
        noisy, timestep = self._noisy(clean)
        both = torch.cat([past, noisy], dim=2)
        levels = torch.cat([torch.zeros_like(timestep), timestep], dim=1)
        poses, places = torch.cat([pose, pose], dim=1), torch.cat([frames, frames])
        output = predict(self.model, self.camera, both, levels, scene, poses, places)
        return output[:, :, CONTEXT_FRAMES:]

    def _hide(self, scene: Tensor) -> Tensor:
        """Hide random prompt slots in half of the clips, floor and sky more often than others."""
        chance = torch.full(scene.shape, 0.3, device=self.device)
        chance[:, [FLOOR_SLOT, SKY_SLOT]] = 0.6
        hidden = self._random(*scene.shape) < chance
        hidden &= self._random(len(scene), 1) < 0.5
        return scene.masked_fill(hidden, HIDDEN)
