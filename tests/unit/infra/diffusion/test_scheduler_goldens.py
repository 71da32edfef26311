"""Every schedule against the numbers of the models' official code."""

from functools import partial

import pytest
import torch
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import (
    Scheduler,
    flow_to_x0,
    mix_noise,
    x0_to_flow,
)
from flashdreams.infra.diffusion.scheduler.euler import EulerSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from tests.goldens import golden_config, load_golden

FOLDER = "b5_schedulers"
TABLE_RTOL = 1e-6
"""float32 tables; on the machine where this was written they are bit-equal."""
LOOP_ATOL = 3e-6
"""float32 latents of magnitude up to 4 after up to 50 steps."""


def assert_table(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TABLE_RTOL, atol=0)


def cases(golden: dict[str, Tensor], last: str) -> list[tuple[int, int, str]]:
    """(shift, N, prefix) of every table in a file whose keys read shift{s}/N{n}/{name}."""
    prefixes = [key.removesuffix(f"/{last}") for key in golden if key.endswith(f"/{last}")]
    parts = [prefix.split("/") for prefix in prefixes]
    return [(int(s[5:]), int(n[1:]), f"{s}/{n}") for s, n in parts]


@pytest.mark.parametrize("shift", [1, 3, 5, 8, 10])
def test_few_step_tables_equal_the_reference(shift: int) -> None:
    golden = load_golden(FOLDER, "fewstep_tables.safetensors")
    for steps in (1, 2, 4):
        prefix = f"shift{shift}/{steps}step"
        requested = tuple(float(t) for t in golden[f"{prefix}/requested"])
        warped = FlowMatchSchedulerConfig(denoising_timesteps=requested, shift=shift).setup()
        assert_table(warped.timesteps, golden[f"{prefix}/warped_timesteps"])
        assert_table(warped.sigmas, golden[f"{prefix}/sigmas"])
        assert_table(warped.renoise_sigmas, golden[f"{prefix}/sigmas"])
        snapped = FlowMatchSchedulerConfig(
            denoising_timesteps=requested, shift=shift, warp_denoising_step=False
        ).setup()
        assert snapped.timesteps.tolist() == list(requested)
        assert_table(snapped.sigmas, golden[f"{prefix}/unwarped_snap_sigmas"])
    assert_table(warped.table_sigmas, golden[f"shift{shift}/sigmas_1000"])
    assert_table(warped.table_timesteps, golden[f"shift{shift}/timesteps_1000"])
    assert_table(torch.tensor([warped.sigma_of(0.0)]), golden[f"shift{shift}/sigma_of_timestep_0"])


def test_few_step_tables_tell_shift_8_from_shift_5() -> None:
    golden = load_golden(FOLDER, "fewstep_tables.safetensors")
    mistaken = FlowMatchSchedulerConfig(shift=8.0).setup()
    with pytest.raises(AssertionError):
        assert_table(mistaken.timesteps, golden["shift5/4step/warped_timesteps"])


def test_euler_tables_equal_the_reference() -> None:
    golden = load_golden(FOLDER, "flowmatch_tables.safetensors")
    found = cases(golden, "sigmas")
    assert len(found) == 141
    for shift, steps, prefix in found:
        scheduler = EulerSchedulerConfig(num_inference_steps=steps, shift=shift).setup()
        assert_table(scheduler.sigmas, golden[f"{prefix}/sigmas"])
        assert_table(scheduler.timesteps, golden[f"{prefix}/timesteps"])


def test_unipc_tables_equal_the_reference() -> None:
    golden = load_golden(FOLDER, "unipc_tables.safetensors")
    found = cases(golden, "sigmas")
    assert len(found) == 192
    for shift, steps, prefix in found:
        scheduler = FlowUniPCSchedulerConfig(num_inference_steps=steps, shift=shift).setup()
        assert_table(scheduler.sigmas, golden[f"{prefix}/sigmas"][:-1])
        assert torch.equal(scheduler.timesteps, golden[f"{prefix}/timesteps"])
        assert golden[f"{prefix}/sigmas"][-1] == 0


def lingbot_config(shift: float, **changes: object) -> FlowMatchSchedulerConfig:
    fields: dict = {
        "denoising_timesteps": (1000, 821, 642, 321),
        "shift": shift,
        "sigma_max": 0.999,
        "timestep_dtype": "int64",
    }
    return FlowMatchSchedulerConfig(**(fields | changes))


@pytest.mark.parametrize("shift", [3, 5, 10])
def test_lingbot_schedule_reads_its_table_twice(shift: int) -> None:
    golden = load_golden(FOLDER, "lingbot_fast.safetensors")
    scheduler = lingbot_config(shift).setup()
    assert scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.timesteps, golden[f"shift{shift}/timesteps_int64"])
    assert torch.equal(scheduler.table_timesteps, golden[f"shift{shift}/timesteps_1000"])
    assert_table(scheduler.table_sigmas, golden[f"shift{shift}/sigmas_1001"][:-1])
    assert_table(scheduler.sigmas, golden[f"shift{shift}/x0_sigma"])
    assert_table(scheduler.renoise_sigmas, golden[f"shift{shift}/add_noise_sigma"])
    places = [1000 - t for t in (1000, 821, 642, 321)]
    assert_table(scheduler.table_sigmas[places], golden[f"shift{shift}/sigma_at_index"])
    for name, column in (("x0_sigma_index", 0), ("add_noise_sigma_index", 1)):
        found = [scheduler._rows_of(t)[column] for t in scheduler.timesteps.tolist()]
        assert found == golden[f"shift{shift}/{name}"].tolist()


def test_lingbot_schedule_tells_truncated_from_fractional_timesteps() -> None:
    golden = load_golden(FOLDER, "lingbot_fast.safetensors")
    mistaken = lingbot_config(10, timestep_dtype="float32").setup()
    with pytest.raises(AssertionError):
        assert_table(mistaken.sigmas, golden["shift10/x0_sigma"])


def test_step_operations_equal_the_reference() -> None:
    golden = load_golden(FOLDER, "flowmatch_ops.safetensors")
    few_step = FlowMatchSchedulerConfig(shift=5.0).setup()
    for row, timestep in enumerate(golden["timestep"].tolist()):
        sigma = few_step.sigma_of(timestep)
        clean, noise, flow = (golden[name][row] for name in ("clean", "noise", "flow"))
        noised = few_step.add_noise(clean, noise, timestep)
        torch.testing.assert_close(noised, golden["add_noise"][row], rtol=1e-6, atol=1e-6)
        assert torch.equal(noised, mix_noise(clean, noise, sigma))
        x0 = flow_to_x0(noise, flow, sigma)
        torch.testing.assert_close(x0, golden["flow_to_x0"][row], rtol=1e-6, atol=1e-6)
        back = x0_to_flow(noise, clean, sigma)
        torch.testing.assert_close(back, golden["x0_to_flow"][row], rtol=2e-6, atol=1e-6)
        # The reference's step goes to sigma 0 when any sample of its batch is at the last level;
        # the last Euler step does the same.
        for name in ("step", "step_to_final"):
            torch.testing.assert_close(x0, golden[name][row], rtol=1e-6, atol=1e-6)


class ToyModel:
    """The golden loops' flow, open (recorded outputs) or closed (a function of the latent)."""

    def __init__(self, golden: dict[str, Tensor], closed: bool) -> None:
        self.golden, self.closed, self.latents = golden, closed, list[Tensor]()

    def __call__(self, latent: Tensor, timestep: Tensor) -> Tensor:
        self.latents.append(latent)
        if not self.closed:
            return self.golden["fixed_outputs"][len(self.latents) - 1]
        drift = 0.2 * torch.sin(3 * latent) * timestep / 1000
        return 0.7 * latent - 0.4 * self.golden["c"] + drift

    def run(self, scheduler: Scheduler) -> Tensor:
        """All latents after each step, ``[S, ...]``."""
        last = scheduler.sample(self, lambda step: self.golden["x_T"])
        return torch.stack([*self.latents[1:], last])


CONFIGS = {
    "euler": EulerSchedulerConfig,
    "unipc": FlowUniPCSchedulerConfig,
    "dpmpp": partial(FlowUniPCSchedulerConfig, solver="dpm++"),
}


@pytest.mark.parametrize("kind", ["closed", "fixed"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_loops_follow_the_reference_at_every_step(name: str, kind: str) -> None:
    golden = load_golden(FOLDER, "toy_loops.safetensors")
    keys = [key for key in golden if key.startswith(f"{name}/") and key.endswith(kind)]
    assert len(keys) == 10
    for key in keys:
        shift, steps = (int(part.lstrip("shiftN")) for part in key.split("/")[1:3])
        scheduler = CONFIGS[name](num_inference_steps=steps, shift=shift).setup()
        latents = ToyModel(golden, kind == "closed").run(scheduler)
        torch.testing.assert_close(latents, golden[key], rtol=0, atol=LOOP_ATOL)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_loops_of_the_other_method_differ(name: str) -> None:
    golden = load_golden(FOLDER, "toy_loops.safetensors")
    other = next(config for key, config in CONFIGS.items() if key != name)
    latents = ToyModel(golden, closed=True).run(other(num_inference_steps=4, shift=5).setup())
    assert (latents - golden[f"{name}/shift5/N4/closed"]).abs().max() > 10 * LOOP_ATOL


def test_few_step_loop_follows_the_self_forcing_rollout() -> None:
    calls = load_golden("b2_self_forcing_tiny", "rollout_full.safetensors")
    inputs = load_golden("b2_self_forcing_tiny", "inputs.safetensors")
    steps = golden_config("b2_self_forcing_tiny")["pipeline_args"]["denoising_step_list"]
    scheduler = FlowMatchSchedulerConfig(denoising_timesteps=tuple(map(float, steps))).setup()
    for chunk in range(4):
        noise = [inputs["noise"][:, 3 * chunk : 3 * chunk + 3]]
        noise += [inputs[f"renoise/chunk{chunk}/after_step{step}"][None] for step in range(3)]
        numbers = iter(range(5 * chunk, 5 * chunk + 4))

        def recorded_flow(latent: Tensor, timestep: Tensor, numbers=numbers) -> Tensor:
            number = next(numbers)
            assert timestep.item() == pytest.approx(calls["call_timestep"][number].item(), rel=1e-6)
            expected = calls[f"call{number:02d}/noisy"]
            torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)
            return calls[f"call{number:02d}/flow"]

        x0 = scheduler.sample(recorded_flow, noise.__getitem__)
        expected = calls["output"][:, 3 * chunk : 3 * chunk + 3]
        torch.testing.assert_close(x0, expected, rtol=0, atol=1e-6)
        assert list(numbers) == []
