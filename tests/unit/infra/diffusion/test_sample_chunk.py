"""A schedule that carries a tensor from one AR step to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchScheduler, FlowMatchSchedulerConfig
from flashdreams.integrations.self_forcing.config import TINY_PIPELINE


@dataclass(kw_only=True)
class EchoConfig(FlowMatchSchedulerConfig):
    """Config of `Echo`."""

    _target: type["Echo"] = field(default_factory=lambda: Echo)


class Echo(FlowMatchScheduler):
    """Adds half of the last chunk's own latent."""

    def sample_chunk(
        self,
        predict_flow: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[int], Tensor],
        carried: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the contract."""
        x0 = self.sample(predict_flow, noise)
        return (x0 if carried is None else x0 + carried / 2), x0


@pytest.fixture(scope="module")
def pipeline():
    scheduler = EchoConfig(denoising_timesteps=(1000.0, 500.0))
    config = derive_config(TINY_PIPELINE, diffusion_model={"scheduler": scheduler}, decoder=None)
    return config.setup(device="cpu")


def roll(pipeline, cache, steps: int) -> list[Tensor]:
    chunks = []
    for index in range(cache.next_index, cache.next_index + steps):
        chunks.append(pipeline.generate(autoregressive_index=index, cache=cache))
        pipeline.finalize(autoregressive_index=index, cache=cache)
    return chunks


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_a_schedule_carries_is_saved_and_forked(pipeline, tmp_path):
    cache = pipeline.initialize_cache(text=["a street"], seed=1)
    roll(pipeline, cache, 2)
    pipeline.save(cache, tmp_path / "here")
    state = cache.state_dict()
    resumed, loaded = pipeline.resume(tmp_path / "here"), pipeline.load_cache(state)
    (fork,), batch, bare = cache.fork(1), cache.fork_batch(2), cache.clone()
    bare.diffusion.carried = None
    chunks = roll(pipeline, cache, 2)
    for other in (resumed, loaded, fork):
        assert same(roll(pipeline, other, 2), chunks)
    pair = torch.cat(roll(pipeline, batch, 2), dim=1)
    torch.testing.assert_close(pair[:1], torch.cat(chunks, dim=1), rtol=0, atol=1e-5)
    assert not same(roll(pipeline, bare, 2), chunks)  # negative control
    del state["values"]["carried"]  # as older versions wrote it
    state["tensors"] = {k: v for k, v in state["tensors"].items() if k != "carried"}
    assert pipeline.load_cache(state).diffusion.carried is None


def test_an_ar_step_that_failed_starts_from_what_was_carried(pipeline, monkeypatch):
    whole = roll(pipeline, pipeline.initialize_cache(text=["a street"], seed=1), 3)
    cache = pipeline.initialize_cache(text=["a street"], seed=1)
    chunks = roll(pipeline, cache, 2)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="once"):
        patch.setattr(pipeline.diffusion_model.transformer, "predict_flow", fail)
        roll(pipeline, cache, 1)
    assert same(chunks + roll(pipeline, cache, 1), whole)


def fail(*arguments: object) -> Tensor:
    """A network that fails."""
    raise RuntimeError("once")
