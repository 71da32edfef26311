"""Second-order flow matching: UniPC, and DPM-Solver++, which is its predictor alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import (
    NUM_TRAIN_TIMESTEPS,
    Scheduler,
    SolverSchedulerConfig,
    flow_to_x0,
    shifted_sigmas,
)

SIGMA_MAX = torch.tensor(1 - 1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float32, device="cpu").item()
"""First noise level before the warp: the reference reads it from a float32 training table."""


@dataclass(kw_only=True)
class FlowUniPCSchedulerConfig(SolverSchedulerConfig):
    """The schedules of Wan's bidirectional models, of order 2, predicting x0."""

    _target: type["FlowUniPCScheduler"] = field(default_factory=lambda: FlowUniPCScheduler)

    solver: Literal["unipc", "dpm++"] = "unipc"
    """"unipc" (bh2), or "dpm++", DPM-Solver++ in its midpoint form, with its own timesteps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in ("unipc", "dpm++"):
            raise ValueError(f"solver={self.solver!r} is unknown; allowed are 'unipc' and 'dpm++'.")


class FlowUniPCScheduler(Scheduler):
    """A linear multistep method whose every weight is known beforehand.

    For given noise levels both the predictor (to the next level) and the corrector (back at the
    level just evaluated) are fixed linear combinations of tensors. They are computed here, in
    float64, so the loop holds no solver. Orders are 1, 2, ..., 2, 1: the first step has no history
    and the last one, to sigma 0, needs none; a corrector has the order of the predictor before it.
    Timesteps are int64, truncated.

    DPM-Solver++ is the predictor without the corrector. It begins at pure noise (sigma 1), where
    the first step carries no history and the second finds it infinitely far away, so both are of
    order 1.

    Source: Zhao et al., arXiv:2302.04867 (UniPC), section 3, B(h) = exp(h) - 1; Lu et al.,
    arXiv:2211.01095 (DPM-Solver++), algorithm 2; Wan 2.1.
    """

    config: FlowUniPCSchedulerConfig

    def __init__(self, config: FlowUniPCSchedulerConfig) -> None:
        count, shift, corrects = config.num_inference_steps, config.shift, config.solver == "unipc"
        if corrects:
            precise = shifted_sigmas(SIGMA_MAX, 0.0, count, shift, torch.float64)
        else:  # numpy's spacing, as the reference: truncated timesteps show the last bit of a level
            even = torch.from_numpy(np.linspace(1, 0, count + 1)[:-1])
            precise = shift * even / (1 + (shift - 1) * even)
        timesteps = (precise * NUM_TRAIN_TIMESTEPS).long()
        super().__init__(config, timesteps=timesteps, sigmas=precise.float())
        levels = [*self.sigmas.tolist(), 0.0]
        steps = [
            (levels[max(step - 1, 0) : step + 2], 1 if step in (0, count - 1) else 2)
            for step in range(count)
        ]
        self._predictors = [predictor_weights(*step) for step in steps]
        self._correctors = [corrector_weights(*step) for step in steps[:-1]] if corrects else []

    def sample(
        self, predict_flow: Callable[[Tensor, Tensor], Tensor], noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Predict, evaluate, correct, repeat from ``noise(0)``; see :meth:`Scheduler.sample`."""
        latent = noise(0).float()
        timesteps, sigmas = self.timesteps, self.sigmas.tolist()
        start = newest = older = latent
        for step in range(self.num_inference_steps):
            x0 = flow_to_x0(latent, predict_flow(latent, timesteps[step]), sigmas[step])
            if step > 0 and self._correctors:
                latent = combine(self._correctors[step - 1], (start, newest, older, x0))
            start, newest, older = latent, x0, newest
            latent = combine(self._predictors[step], (start, newest, older))
        return latent


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of ``weight * tensor`` over the weights that are not 0."""
    terms = [w * tensor for w, tensor in zip(weights, tensors, strict=True) if w != 0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def predictor_weights(levels: Sequence[float], order: int) -> tuple[float, float, float]:
    """Weights that carry a latent to the next noise level.

    Args:
        levels: the previous noise level (if there is one), the present and the next.
        order: 1 or 2; order 1 does not look at the previous level.

    Returns:
        Weights of the present latent, the newest x0 and the x0 before it.
    """
    carry, newest, gain, _ = _step(levels)
    if order == 1:
        return carry, newest, 0.0
    slope = 0.5 * gain / _history_ratio(levels)
    return carry, newest - slope, slope


def corrector_weights(levels: Sequence[float], order: int) -> tuple[float, float, float, float]:
    """Weights that repeat a predictor step with the x0 found at its end.

    Args:
        levels: as for the predictor step that is corrected.
        order: the order of that predictor step.

    Returns:
        Weights of the latent the step started from, the newest x0 then, the x0 before it, and the
        x0 found at the step's end.
    """
    carry, newest, gain, h = _step(levels)
    if order == 1:
        return carry, newest - 0.5 * gain, 0.0, 0.5 * gain
    ratio = _history_ratio(levels)
    # phi_2 and phi_3 of -h over B(h): the right-hand sides of the two order conditions.
    first = (math.expm1(-h) / -h - 1) / math.expm1(-h)
    second = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / math.expm1(-h)
    history = (second - first) / (ratio - 1)
    slope, end = gain * history / ratio, gain * (first - history)
    return carry, newest - slope - end, slope, end


def _step(levels: Sequence[float]) -> tuple[float, float, float, float]:
    """Weights of an order-1 step, the gain of what higher orders add to it, and its length h.

    h is the step in half log signal-to-noise; it is infinite for the step to sigma 0, whose
    order-1 weights are 0 and 1: the step lands on the newest x0.
    """
    present, following = levels[-2:]
    h = _log_snr(following) - _log_snr(present)
    gain = -(1 - following) * math.expm1(-h)
    return following / present, gain, gain, h


def _history_ratio(levels: Sequence[float]) -> float:
    """Position of the previous level, in steps from the present one; negative."""
    previous, present, following = map(_log_snr, levels)
    return (previous - present) / (following - present)


def _log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf
