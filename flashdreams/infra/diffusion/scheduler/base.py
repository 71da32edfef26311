"""The contract of noise schedules, and their common arithmetic."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdreams.infra.config import InstantiateConfig

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps per unit of sigma: a network trained on sigma in (0, 1] gets ``1000 * sigma``."""


@dataclass(kw_only=True)
class SchedulerConfig(InstantiateConfig):
    """What every schedule has in common: nothing but the class it sets up."""

    _target: type["Scheduler"] = field(
        default_factory=lambda: Scheduler  # type: ignore[type-abstract]
    )


@dataclass(kw_only=True)
class SolverSchedulerConfig(SchedulerConfig):
    """What schedules of many steps along the flow have in common."""

    num_inference_steps: int = 50
    """Calls of the network per sample, 1 to 1000."""

    shift: float = 5.0
    """Warp of the noise levels; 1 spaces them evenly, more spends more steps on high noise."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} is out of range: it must be from "
                f"1 to {NUM_TRAIN_TIMESTEPS}. Fewer than 50 are usual."
            )
        check_shift(self.shift)


class Scheduler(ABC):
    """A sampler from noise to a clean latent.

    A plain object, not a module: ``.to(...)`` of a model does not change its tables,
    which keep their precision. It holds no rollout state, so rollouts share one scheduler.

    Attributes:
        timesteps: ``[S]``, on the CPU, in the type the network receives (float32, or int64 where
            the reference truncates); descending, one per denoising step.
        sigmas: ``[S]`` float32, on the CPU; the noise levels that turn a flow into a clean latent.
    """

    config: SchedulerConfig
    """The config."""

    def __init__(self, config: SchedulerConfig, timesteps: Tensor, sigmas: Tensor) -> None:
        self.config = config
        self.timesteps = timesteps
        self.sigmas = sigmas

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps, that is calls of the network per sample (guidance not counted)."""
        return len(self.timesteps)

    @abstractmethod
    def sample(
        self, predict_flow: Callable[[Tensor, Tensor], Tensor], noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Draw one clean latent.

        Args:
            predict_flow: ``(latent, timestep) -> flow``. The latent is float32; the timestep is
                0-dim, on the CPU, where its value can be read without a device synchronization,
                in the type of :attr:`timesteps`; the flow has the latent's shape and any floating
                type.
            noise: ``denoising_step -> tensor``. ``noise(0)`` is the initial latent; ``noise(k)``
                for k >= 1, asked for by schedules that re-noise, is what step k starts from.

        Returns:
            The clean latent, float32, in the shape of ``noise(0)``.

        Raises:
            ValueError: a flow whose shape is not the latent's.
        """

    @property
    def carries(self) -> bool:
        """Whether `sample_chunk` is called instead of `sample`: where it is overridden."""
        return type(self).sample_chunk is not Scheduler.sample_chunk

    def sample_chunk(
        self,
        predict_flow: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[int], Tensor],
        carried: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`sample`, for schedules that have begun later chunks as well.

        The default carries nothing. A schedule that denoises several chunks at once, at rising
        noise levels, calls the network on all of them, with timesteps ``[B, frames]``.

        Args:
            predict_flow: as for `sample`.
            noise: as for `sample`.
            carried: the second result of the last AR step of this rollout; None at its beginning.
                It is saved and forked with the rollout.

        Returns:
            The clean latent of this AR step, and ``[B, ...]`` for the next one, or None.
        """
        return self.sample(predict_flow, noise), None

    def sigma_of(self, timestep: float) -> float:
        """The noise level of a timestep in [0, 1000]."""
        return timestep / NUM_TRAIN_TIMESTEPS

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: float | Tensor) -> Tensor:
        """Noise a clean latent up to a timestep, as in training.

        Args:
            x0: the clean latent, float32.
            noise: standard normal, same shape, float32.
            timestep: in [0, 1000]; one number, also as a 0-dim CPU tensor.

        Returns:
            ``(1 - sigma) * x0 + sigma * noise``, float32.

        Raises:
            ValueError: the timestep is out of range, or the shapes differ.
        """
        timestep = float(timestep)
        if not 0 <= timestep <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"timestep={timestep:g} is out of range: it must be in [0, 1000].")
        return mix_noise(x0, noise, self.sigma_of(timestep))


def mix_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The noisy latent ``(1 - sigma) * x0 + sigma * noise`` of flow matching.

    Source: Lipman et al., arXiv:2210.02747 (the linear path); Wan 2.1.
    """
    require_same_shape("noise", noise, x0)
    return (1.0 - sigma) * x0 + sigma * noise


def flow_to_x0(latent: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """The clean latent ``latent - sigma * flow`` for a predicted flow.

    Computed in float64, as the reference does: near sigma = 1 the two terms almost cancel.

    Returns:
        float32, same shape.

    Source: Self-Forcing, the conversion of the wrapped network's output.
    """
    require_same_shape("flow", flow, latent)
    return (latent.double() - sigma * flow.double()).float()


def x0_to_flow(latent: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The flow ``(latent - x0) / sigma`` for a predicted clean latent.

    The inverse of :func:`flow_to_x0` for networks that predict x0; float64 inside, float32 out.

    Raises:
        ValueError: sigma is 0, where no flow is defined, or the shapes differ.
    """
    if sigma <= 0:
        raise ValueError(f"sigma={sigma:g}: a flow is defined for sigma > 0 only.")
    require_same_shape("x0", x0, latent)
    return ((latent.double() - x0.double()) / sigma).float()


def require_same_shape(name: str, tensor: Tensor, latent: Tensor) -> None:
    """Refuse shapes that would broadcast against a latent and give plausible wrong numbers."""
    if tensor.shape != latent.shape:
        raise ValueError(
            f"the {name} has shape {list(tensor.shape)}, the latent {list(latent.shape)}; "
            "they must be equal."
        )


def shifted_sigmas(
    sigma_max: float, sigma_min: float, count: int, shift: float, dtype: torch.dtype
) -> Tensor:
    """Descending noise levels, evenly spaced and then warped towards sigma_max.

    Args:
        sigma_max: the first level, before the warp.
        sigma_min: the level that one more step would reach.
        count: how many levels.
        shift: 1 leaves the levels as they are, more spends more steps on high noise.
        dtype: what the levels are computed in.

    Returns:
        ``[count]``: ``shift * s / (1 + (shift - 1) * s)`` of the evenly spaced s.

    Source: Esser et al., arXiv:2403.03206, section 5.3.2; Wan 2.1.
    """
    sigmas = torch.linspace(sigma_max, sigma_min, count + 1, dtype=dtype, device="cpu")[:-1]
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def check_shift(shift: float) -> None:
    """Refuse a shift outside (0, 1000] (ValueError)."""
    if not 0 < shift <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"shift={shift} must be a positive number, at most {NUM_TRAIN_TIMESTEPS}; 1 is no "
            "shift, Wan uses 3 to 8."
        )
