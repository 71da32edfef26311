"""Second-order flow matching with DPM-Solver++."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import (
    NUM_TRAIN_TIMESTEPS,
    Scheduler,
    SchedulerConfig,
    check_schedule,
    flow_to_x0,
)
from flashdreams.infra.diffusion.scheduler.fm_unipc import combine, predictor_weights


@dataclass(kw_only=True)
class FlowDPMSolverSchedulerConfig(SchedulerConfig):
    """The other schedule of Wan's bidirectional models: DPM-Solver++ of order 2 (midpoint)."""

    _target: type["FlowDPMSolverScheduler"] = field(default_factory=lambda: FlowDPMSolverScheduler)

    num_inference_steps: int = 50
    """Calls of the network per sample, 1 to 1000."""

    shift: float = 5.0
    """Warp of the noise levels; 1 spaces them evenly, more spends more steps on high noise."""

    def __post_init__(self) -> None:
        check_schedule(self.num_inference_steps, self.shift)


class FlowDPMSolverScheduler(Scheduler):
    """The predictor of UniPC alone, which is DPM-Solver++ in its two-step form.

    It begins at pure noise (sigma 1), where the first step carries no history and the second finds
    it infinitely far away, so both are of order 1; so is the last, to sigma 0. Timesteps are int64,
    truncated.

    Source: Lu et al., arXiv:2211.01095 (DPM-Solver++), algorithm 2; Wan 2.1.
    """

    config: FlowDPMSolverSchedulerConfig

    def __init__(self, config: FlowDPMSolverSchedulerConfig) -> None:
        count = config.num_inference_steps
        # numpy's spacing, as the reference: truncated timesteps show the last bit of a level.
        even = torch.from_numpy(np.linspace(1, 0, count + 1)[:-1])
        precise = config.shift * even / (1 + (config.shift - 1) * even)
        timesteps = (precise * NUM_TRAIN_TIMESTEPS).long()
        super().__init__(config, timesteps=timesteps, sigmas=precise.float())
        levels = [*self.sigmas.tolist(), 0.0]
        self._predictors = [
            predictor_weights(
                levels[max(step - 1, 0) : step + 2], 1 if step in (0, count - 1) else 2
            )
            for step in range(count)
        ]

    def sample(
        self, predict_flow: Callable[[Tensor, Tensor], Tensor], noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Evaluate and step, from ``noise(0)``; see :meth:`Scheduler.sample`."""
        latent = noise(0).float()
        timesteps, sigmas = self.timesteps, self.sigmas.tolist()
        newest = latent
        for step in range(self.num_inference_steps):
            older = newest
            newest = flow_to_x0(latent, predict_flow(latent, timesteps[step]), sigmas[step])
            latent = combine(self._predictors[step], (latent, newest, older))
        return latent
