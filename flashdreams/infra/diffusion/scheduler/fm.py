"""Few-step flow matching: predict the clean latent, re-noise it, repeat."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import (
    NUM_TRAIN_TIMESTEPS,
    Scheduler,
    SchedulerConfig,
    check_shift,
    flow_to_x0,
    mix_noise,
    shifted_sigmas,
)


@dataclass(kw_only=True)
class FlowMatchSchedulerConfig(SchedulerConfig):
    """The schedule of distilled models: a few steps, each followed by fresh noise.

    The defaults are Self-Forcing's. LingBot-World (fast) is ``denoising_timesteps=(1000, 821, 642,
    321)``, ``shift=10.0``, ``sigma_max=0.999``, ``timestep_dtype="int64"``.
    """

    _target: type["FlowMatchScheduler"] = field(default_factory=lambda: FlowMatchScheduler)

    denoising_timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """One entry per denoising step, strictly descending, in (0, 1000]."""

    shift: float = 5.0
    """Warp of the 1000-entry table; 1 spaces it evenly, more spends more steps on high noise."""

    warp_denoising_step: bool = True
    """Whether an entry t means index ``1000 - t`` of the warped table, so that the network
    gets the warped timestep (t must then be a whole number). If not, the network gets t
    itself, with the noise level of the nearest table entry."""

    sigma_max: float = 1.0
    """Noise level at the top of the table, before the warp."""

    sigma_min: float = 0.0
    """Noise level that the table would reach one entry after its last, before the warp."""

    timestep_dtype: Literal["float32", "int64"] = "float32"
    """Dtype of the network's timesteps. With int64 they are truncated, and because the truncated
    timesteps repeat in the table, the first of equal entries turns a flow into a clean latent and
    the second re-noises, as LingBot-World's reference reads its table."""

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "they must satisfy 0 <= sigma_min < sigma_max <= 1."
            )
        if self.timestep_dtype not in ("float32", "int64"):
            raise ValueError(
                f"timestep_dtype={self.timestep_dtype!r} is unknown; "
                "it must be 'float32' or 'int64'."
            )
        check_denoising_timesteps(self.denoising_timesteps, self.warp_denoising_step)


def check_denoising_timesteps(timesteps: tuple[float, ...], warped: bool) -> None:
    """Refuse an invalid list of timesteps.

    Raises:
        ValueError: the list is empty, leaves (0, 1000], does not descend strictly, or has a
            fractional entry although entries name places in a table.
    """
    if not timesteps:
        raise ValueError(
            "denoising_timesteps is empty; give at least one timestep, e.g. 1000 750 500 250."
        )
    outside = [t for t in timesteps if not 0 < t <= NUM_TRAIN_TIMESTEPS]
    if outside:
        raise ValueError(
            f"denoising_timesteps holds {outside[0]:g}, which is out of range: "
            f"every entry must be above 0 and at most {NUM_TRAIN_TIMESTEPS}."
        )
    for before, after in pairwise(timesteps):
        if after >= before:
            raise ValueError(
                f"denoising_timesteps must descend strictly, but {before:g} is followed by "
                f"{after:g}; got {', '.join(f'{t:g}' for t in timesteps)}."
            )
    fractional = [t for t in timesteps if t != int(t)]
    if warped and fractional:
        raise ValueError(
            f"denoising_timesteps holds {fractional[0]:g}, but with warp_denoising_step=True "
            "entries are places in a table and must be whole numbers. For timesteps that are "
            "already warped set warp_denoising_step=False."
        )


class FlowMatchScheduler(Scheduler):
    """Few-step sampling with fresh noise between the steps.

    Attributes:
        table_timesteps: ``[1000]``, float32 or int64; the network's timestep for each level.
        table_sigmas: ``[1000]`` float32; the warped noise levels, descending.
        renoise_sigmas: ``[S]`` float32; the level to which a clean latent is noised before step s
            (the entry of step 0 is not used). Equal to ``sigmas`` unless timesteps are int64.

    Source: Yin et al., arXiv:2405.14867, section 4.5 (multi-step generation by re-noising);
    Self-Forcing, arXiv:2506.08009, algorithm 2.
    """

    config: FlowMatchSchedulerConfig

    def __init__(self, config: FlowMatchSchedulerConfig) -> None:
        # Each reference computes its table in its own precision, which truncation would show.
        truncate = config.timestep_dtype == "int64"
        precise = shifted_sigmas(
            config.sigma_max,
            config.sigma_min,
            NUM_TRAIN_TIMESTEPS,
            config.shift,
            torch.float64 if truncate else torch.float32,
        )
        dtype = torch.int64 if truncate else torch.float32
        self.table_timesteps = (precise * NUM_TRAIN_TIMESTEPS).to(dtype)
        self.table_sigmas = precise.float()
        requested = torch.tensor(config.denoising_timesteps, dtype=torch.float64, device="cpu")
        if config.warp_denoising_step:
            timesteps = self.table_timesteps[NUM_TRAIN_TIMESTEPS - requested.long()]
        else:
            timesteps = requested.to(dtype)
        rows = [self._rows_of(t) for t in timesteps.tolist()]
        first, second = (list(column) for column in zip(*rows, strict=True))
        self.renoise_sigmas = self.table_sigmas[second]
        super().__init__(config, timesteps=timesteps, sigmas=self.table_sigmas[first])

    def _rows_of(self, timestep: float) -> tuple[int, int]:
        """Indices of the first and, if that one is repeated, the second nearest table entry."""
        distance = (self.table_timesteps.double() - timestep).abs()
        first = int((distance == distance.min()).nonzero()[0])
        second = min(first + 1, NUM_TRAIN_TIMESTEPS - 1)
        if self.table_timesteps[second] != self.table_timesteps[first]:
            second = first
        return first, second

    def sigma_of(self, timestep: float) -> float:
        """The level to which noise is added for a timestep: that of the nearest table entry.

        The table ends above zero, so timestep 0 is not quite clean; for a clean context add none.
        """
        return self.table_sigmas[self._rows_of(timestep)[1]].item()

    def sample(
        self, predict_flow: Callable[[Tensor, Tensor], Tensor], noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Denoise, re-noise with fresh noise, repeat; see :meth:`Scheduler.sample`."""
        latent = noise(0).float()
        timesteps = self.timesteps
        sigmas, renoise_sigmas = self.sigmas.tolist(), self.renoise_sigmas.tolist()
        x0 = flow_to_x0(latent, predict_flow(latent, timesteps[0]), sigmas[0])
        for step in range(1, self.num_inference_steps):
            latent = mix_noise(x0, noise(step), renoise_sigmas[step])
            x0 = flow_to_x0(latent, predict_flow(latent, timesteps[step]), sigmas[step])
        return x0
