"""Second-order flow matching with DPM-Solver++."""

from dataclasses import dataclass, field

import numpy as np
import torch

from flashdreams.infra.diffusion.scheduler.base import SolverSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCScheduler


@dataclass(kw_only=True)
class FlowDPMSolverSchedulerConfig(SolverSchedulerConfig):
    """The other schedule of Wan's bidirectional models: DPM-Solver++ of order 2 (midpoint)."""

    _target: type["FlowDPMSolverScheduler"] = field(default_factory=lambda: FlowDPMSolverScheduler)


class FlowDPMSolverScheduler(FlowUniPCScheduler):
    """The predictor of UniPC alone, which is DPM-Solver++ in its two-step form.

    It begins at pure noise (sigma 1), where the first step carries no history and the second finds
    it infinitely far away, so both are of order 1; so is the last, to sigma 0. Timesteps are int64,
    truncated.

    Source: Lu et al., arXiv:2211.01095 (DPM-Solver++), algorithm 2; Wan 2.1.
    """

    config: FlowDPMSolverSchedulerConfig  # type: ignore[assignment]

    def __init__(self, config: FlowDPMSolverSchedulerConfig) -> None:
        self.config = config
        # numpy's spacing, as the reference: truncated timesteps show the last bit of a level.
        even = torch.from_numpy(np.linspace(1, 0, config.num_inference_steps + 1)[:-1])
        self._tabulate(config.shift * even / (1 + (config.shift - 1) * even), correct=False)
