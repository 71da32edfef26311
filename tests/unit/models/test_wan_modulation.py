"""What timesteps make of the Wan transformer's modulations: computed once, and the same bits."""

import pytest
import torch
from torch import Tensor, nn

from flashdreams.models.wan.blocks import RMSNorm
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import TEXT_DIM, tiny_transformer


def build(**overrides) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(**overrides)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.cast()


def embeddings(model: WanTransformer) -> list[None]:
    """Grows by one at each pass through the time embedding."""
    calls: list[None] = []
    model.time_projection.register_forward_hook(lambda *_: calls.append(None))
    return calls


@torch.no_grad()
def roll_out(model: WanTransformer, batch_size: int = 1, late: float = 0.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    cache = model.initialize_cache(text=torch.randn(batch_size, 4, TEXT_DIM, generator=draw))
    found = []
    for step in range(3):
        model.begin_step(step, cache)
        x = torch.randn(model.latent_shape(batch_size), generator=draw)
        for timestep in (torch.tensor(900), torch.tensor(437.5 + late)):
            x = x - 0.5 * model.predict_flow(x, timestep, cache)
        model.update_cache(x, torch.tensor(0.0), cache)
        found.append(x)
    return found


def without_tables(model: WanTransformer) -> WanTransformer:
    """Embed the timestep as it was given, in every call."""
    model.modulation_of = lambda timestep, cache: model.modulations(
        timestep.expand(cache.batch_size)
    )
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_kept_modulations_give_the_same_bits(dtype, batch_size):
    kept = roll_out(build(dtype=dtype), batch_size)
    again = roll_out(without_tables(build(dtype=dtype)), batch_size)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_another_timestep_is_seen():
    """Negative control: a sixty-fourth more is not the timestep that was kept."""
    kept, moved = roll_out(build()), roll_out(build(), late=1 / 64)
    assert not any(torch.equal(a, b) for a, b in zip(kept, moved, strict=True))


def test_each_timestep_is_embedded_once_per_rollout():
    model = build()
    calls = embeddings(model)
    roll_out(model)
    assert len(calls) == 3
    roll_out(model)
    assert len(calls) == 2 * 3


def test_without_tables_each_call_embeds_its_timestep():
    """Negative control of the count."""
    model = without_tables(build())
    calls = embeddings(model)
    roll_out(model)
    assert len(calls) == 3 * 3


def test_weights_that_are_trained_get_their_gradients():
    model = build()
    cache = model.initialize_cache(text=torch.zeros(1, 4, TEXT_DIM))
    model.begin_step(0, cache)
    latent, timestep = torch.ones(model.latent_shape(1)), torch.tensor(500.0)
    with torch.no_grad():
        model.predict_flow(latent, timestep, cache)
    flow = model.predict_flow(latent, timestep, cache)
    flow.sum().backward()
    assert model.time_projection[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gain_of_a_norm_comes_after_rounding(dtype):
    """Bit for bit; negative control: the gain before the rounding, which float32 does not have."""
    draw = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight, generator=draw)
    x = torch.randn(2, 9, 48, generator=draw).to(dtype)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    found = norm(x)
    assert torch.equal(found, wide.to(dtype) * norm.weight)
    late = (wide * norm.weight.float()).to(dtype)
    assert torch.equal(found, late) == (dtype == torch.float32)
