"""Deterministic flow matching in Euler steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import (
    NUM_TRAIN_TIMESTEPS,
    Scheduler,
    SolverSchedulerConfig,
    require_same_shape,
    shifted_sigmas,
)


@dataclass(kw_only=True)
class EulerSchedulerConfig(SolverSchedulerConfig):
    """Euler steps along the flow from pure noise to the clean latent."""

    _target: type["EulerScheduler"] = field(default_factory=lambda: EulerScheduler)


class EulerScheduler(Scheduler):
    """First-order integration of the flow; nothing is re-noised, so equal noise gives equal output.

    Timesteps are float32 and fractional: 1000 times the noise level.
    """

    config: EulerSchedulerConfig

    def __init__(self, config: EulerSchedulerConfig) -> None:
        sigmas = shifted_sigmas(1.0, 0.0, config.num_inference_steps, config.shift, torch.float32)
        super().__init__(config, timesteps=sigmas * NUM_TRAIN_TIMESTEPS, sigmas=sigmas)
        levels = [*sigmas.tolist(), 0.0]
        self._deltas = [after - before for before, after in pairwise(levels)]

    def sample(
        self, predict_flow: Callable[[Tensor, Tensor], Tensor], noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Follow the flow from ``noise(0)`` to sigma 0; see :meth:`Scheduler.sample`."""
        latent = noise(0).float()
        timesteps = self.timesteps
        for step, delta in enumerate(self._deltas):
            flow = predict_flow(latent, timesteps[step])
            require_same_shape("flow", flow, latent)
            latent = latent + delta * flow.float()
        return latent
