"""Schedules without goldens: what they refuse, what they keep, what they converge to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.base import Scheduler, SchedulerConfig, x0_to_flow
from flashdreams.infra.diffusion.scheduler.euler import EulerScheduler, EulerSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchScheduler, FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import (
    FlowUniPCScheduler,
    FlowUniPCSchedulerConfig,
)

CONFIGS: list[SchedulerConfig] = [
    FlowMatchSchedulerConfig(),
    FlowMatchSchedulerConfig(timestep_dtype="int64", sigma_max=0.999, shift=10.0),
    EulerSchedulerConfig(num_inference_steps=7),
    FlowUniPCSchedulerConfig(num_inference_steps=7),
]
IDS = ["few-step", "few-step-int64", "euler", "unipc"]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=IDS)


def noise_of(step: int) -> Tensor:
    return torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(step))


@each_config
def test_sample_recovers_a_latent_that_the_flow_points_to(config: SchedulerConfig) -> None:
    """A flow that knows x0 leads there whatever the noise (float32, within 1e-5)."""
    target = torch.linspace(-2, 2, 72).reshape(2, 4, 1, 3, 3)
    scheduler = config.setup()
    sigma_by_timestep = dict(
        zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=True)
    )
    seen = []

    def predict_flow(latent: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        assert latent.dtype == torch.float32
        return x0_to_flow(latent, target, sigma_by_timestep[timestep.item()])

    x0 = scheduler.sample(predict_flow, noise_of)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, target, rtol=0, atol=1e-5)
    assert all(t.ndim == 0 and t.dtype == scheduler.timesteps.dtype for t in seen)
    assert torch.equal(torch.stack(seen), scheduler.timesteps)
    assert len(seen) == scheduler.num_inference_steps
    assert bool((scheduler.timesteps.diff() < 0).all())


@each_config
def test_sample_takes_bfloat16_flows_and_returns_float32(config: SchedulerConfig) -> None:
    exact = config.setup().sample(lambda x, t: 0.5 * x, noise_of)
    rounded = config.setup().sample(lambda x, t: (0.5 * x).bfloat16(), noise_of)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


@each_config
def test_sample_refuses_a_flow_that_would_broadcast(config: SchedulerConfig) -> None:
    with pytest.raises(ValueError, match=r"\[1, 4, 1, 3, 3\].*\[2, 4, 1, 3, 3\]"):
        config.setup().sample(lambda x, t: x[:1], noise_of)


@each_config
def test_tables_keep_their_precision_when_the_model_is_cast(config: SchedulerConfig) -> None:
    model = nn.Linear(2, 2)
    model.scheduler = scheduler = config.setup()
    before = scheduler.timesteps.clone(), scheduler.sigmas.clone()
    model.to(torch.bfloat16).half()
    assert model.weight.dtype == torch.float16
    assert torch.equal(scheduler.timesteps, before[0])
    assert torch.equal(scheduler.sigmas, before[1])
    assert scheduler.sigmas.dtype == torch.float32


def test_few_step_asks_for_fresh_noise_before_every_step_but_the_first() -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return noise_of(step)

    FlowMatchSchedulerConfig().setup().sample(lambda x, t: x, noise)
    assert asked == [0, 1, 2, 3]
    asked.clear()
    FlowUniPCSchedulerConfig(num_inference_steps=5).setup().sample(lambda x, t: x, noise)
    assert asked == [0]


def test_few_step_timesteps_of_self_forcing() -> None:
    scheduler = FlowMatchSchedulerConfig().setup()
    expected = torch.tensor([1000, 937.5, 2500 / 3, 625])
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.sigmas, expected / 1000, rtol=1e-6, atol=0)


def test_unipc_converges_faster_than_euler() -> None:
    """On dx/dsigma = x the end is noise / e; the error of order 2 falls with the square."""

    def error(scheduler: Scheduler) -> float:
        start = scheduler.sigmas[0].item()
        exact = noise_of(0) * torch.exp(torch.tensor(-start))
        return (scheduler.sample(lambda x, t: x, noise_of) - exact).abs().max().item()

    euler = error(EulerSchedulerConfig(num_inference_steps=40, shift=1.0).setup())
    unipc = error(FlowUniPCSchedulerConfig(num_inference_steps=40, shift=1.0).setup())
    assert unipc < euler / 20


@each_config
def test_add_noise_mixes_by_the_level_of_the_timestep(config: SchedulerConfig) -> None:
    scheduler = config.setup()
    x0, noise = noise_of(1), noise_of(2)
    sigma = scheduler.sigma_of(500.0)
    assert sigma == pytest.approx(0.5, abs=0.01)
    expected = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(scheduler.add_noise(x0, noise, 500.0), expected)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, torch.tensor(500)), expected)
    assert not torch.allclose(scheduler.add_noise(x0, noise, 400.0), expected)
    for timestep in (-1.0, 1000.5, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1000\]"):
            scheduler.add_noise(x0, noise, timestep)
    with pytest.raises(ValueError, match="must be equal"):
        scheduler.add_noise(x0, noise[:1], 500.0)


def test_x0_to_flow_refuses_sigma_zero() -> None:
    with pytest.raises(ValueError, match="sigma=0"):
        x0_to_flow(noise_of(0), noise_of(1), 0.0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"denoising_timesteps": ()}, "empty"),
        ({"denoising_timesteps": (750.0, 1000.0)}, "750 is followed by 1000"),
        ({"denoising_timesteps": (500.0, 500.0)}, "500 is followed by 500"),
        ({"denoising_timesteps": (1001.0, 500.0)}, "holds 1001"),
        ({"denoising_timesteps": (500.0, 0.0)}, "holds 0"),
        ({"denoising_timesteps": (500.0, float("nan"))}, "holds nan"),
        ({"denoising_timesteps": (937.5,)}, "937.5.*warp_denoising_step=False"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"shift": float("inf")}, "shift=inf"),
        ({"sigma_max": 1.5}, "sigma_max=1.5"),
        ({"sigma_min": 1.0}, "sigma_min=1.0"),
        ({"timestep_dtype": "int32"}, "'int32'"),
    ],
)
def test_few_step_config_refuses_what_is_no_schedule(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FlowMatchSchedulerConfig(**fields)


@pytest.mark.parametrize("config_type", [EulerSchedulerConfig, FlowUniPCSchedulerConfig])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0.*1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"shift": -1.0}, "shift=-1.0"),
    ],
)
def test_step_count_and_shift_are_checked(config_type: type, fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config_type(**fields)


def test_no_shift_takes_unipc_to_sigma_one_where_it_is_not_defined() -> None:
    assert FlowUniPCSchedulerConfig(shift=1000).setup().sigmas[0] < 1
    with pytest.raises(ValueError, match=r"shift=1000000000.0 must be .* at most 1000"):
        FlowUniPCSchedulerConfig(shift=1e9)


def test_configs_set_up_their_schedulers_and_derive() -> None:
    variant = derive_config(FlowMatchSchedulerConfig, denoising_timesteps=(1000.0, 500.0))
    assert isinstance(variant.setup(), FlowMatchScheduler)
    assert variant.setup().num_inference_steps == 2
    with pytest.raises(ValueError, match="empty"):
        derive_config(variant, denoising_timesteps=())
    assert isinstance(EulerSchedulerConfig().setup(), EulerScheduler)
    assert isinstance(FlowUniPCSchedulerConfig().setup(), FlowUniPCScheduler)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 25])
def test_unipc_equals_diffusers(steps: int) -> None:
    """Same levels given, the same latent; float32 within 1e-5. Order 1 throughout is told apart."""
    from diffusers import UniPCMultistepScheduler

    ours = FlowUniPCSchedulerConfig(num_inference_steps=steps, shift=5.0).setup()

    def flow(latent: Tensor, timestep: Tensor) -> Tensor:
        return 0.7 * latent + 0.2 * torch.sin(3 * latent) * timestep / 1000

    def peer_sample(solver_order: int) -> Tensor:
        peer: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=solver_order
        )
        peer.set_timesteps(steps)
        # diffusers spaces the levels from 1 to 1/1000, Wan from 0.999 to 0.
        peer.sigmas = torch.cat([ours.sigmas, torch.zeros(1)])
        peer.timesteps = ours.timesteps
        latent = noise_of(0)
        for timestep in peer.timesteps:
            latent = peer.step(flow(latent, timestep), timestep, latent).prev_sample
        return latent

    expected = peer_sample(solver_order=2)
    torch.testing.assert_close(ours.sample(flow, noise_of), expected, rtol=0, atol=1e-5)
    if steps > 2:
        assert (peer_sample(solver_order=1) - expected).abs().max() > 1e-4
