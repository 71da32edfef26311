"""The Wan transformer, replayed: the logic with a recorder in the place of CUDA's."""

from dataclasses import replace

import pytest
import torch

from flashdreams.infra.diffusion.causal_state import StepInputs
from flashdreams.infra.diffusion.transformer import ContextChunk
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.runtime.cuda_graph import GraphedCallable
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_transformer
from tests.unit.runtime.test_cuda_graph import trace_graphs


def rollout(model: WanTransformer, steps: int = 6, short: int = -1) -> list[torch.Tensor]:
    """Flows of some AR steps; one of them may have one control for all tokens."""
    generator = torch.Generator().manual_seed(0)
    device = model.device
    cache = model.initialize_cache(text=torch.randn(1, 4, TEXT_DIM, generator=generator))
    flows = []
    for i in range(steps):
        control = torch.randn(1, 1 if i == short else 8, CONTROL_DIM, generator=generator)
        model.begin_step(i, cache, control)
        latent = torch.randn(model.latent_shape(1), generator=generator).to(device)
        for t in (1000.0, 500.0):
            flows.append(model.predict_flow(latent, torch.tensor(t), cache))
        model.update_cache(latent, torch.tensor(0.0), cache)
    return flows


def graphed(model: WanTransformer) -> WanTransformer:
    trace_graphs(model)
    model.network.reset()
    return model


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "residual_dtype": "float32"}])
@torch.no_grad()
def test_replayed_rollout_equals_the_eager_one(changes):
    """Bit for bit; two captures once the ring is full, and controls stay in their place."""
    torch.manual_seed(0)
    config = tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True, **changes)
    model = WanTransformer(config).cast().eval()
    eager = rollout(model)
    flows = rollout(graphed(model))
    assert all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))
    assert model.network.captures == 2
    assert model.network.eager_calls == 2 * 3  # two AR steps fill the window
    assert model.network.replays == 4 * 3 - 2


@torch.no_grad()
def test_a_step_with_inputs_of_another_shape_is_eager_and_the_next_one_replayed():
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True)).eval()
    eager = rollout(model, short=4)
    flows = rollout(graphed(model), short=4)
    assert all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))
    assert model.network.captures == 2
    assert model.network.eager_calls == (2 + 1) * 3


@torch.no_grad()
def test_graphs_of_a_filling_window_would_be_wrong():
    """Negative control: a key that does not wait for the steady state."""
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True)).eval()
    eager = rollout(model)
    graphed(model).network.key = lambda inputs, state, write_only=False: write_only
    flows = rollout(model)
    assert not all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))


@torch.no_grad()
def test_inputs_that_are_not_copied_would_be_wrong(monkeypatch):
    """Negative control: a graph reads the tensors of the step that it was captured in."""
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True)).eval()
    eager = rollout(model)
    monkeypatch.setattr(StepInputs, "fill", lambda self, new: self.__dict__.update(vars(new)))
    flows = rollout(graphed(model))
    assert not all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))


@torch.no_grad()
def test_replays_are_compared_with_eager_passes():
    """Outputs and written keys; a replay that writes something else is noticed."""
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(use_cuda_graph=True)).eval()
    cache = graphed(model).initialize_cache(text=torch.randn(1, 4, TEXT_DIM))
    for index in range(4):
        latent = torch.randn(model.latent_shape(1))
        model.begin_step(index, cache)
        model.predict_flow(latent, torch.tensor(500.0), cache)
        model.update_cache(latent, torch.tensor(0.0), cache)
    assert model.replay_is_exact(cache)
    cache.caches["blocks.*.self_attn.core"][1].k.mul_(1)
    replay = next(iter(model.network._graphs.values())).replay
    broken = next(iter(cache.layers())).k

    def other() -> None:
        replay()
        broken.add_(1)

    for key, graph in list(model.network._graphs.items()):
        model.network._graphs[key] = replace(graph, replay=other)
    assert not model.replay_is_exact(cache)


@pytest.mark.parametrize("change", [{}, {"kv_cache_dtype": "int8"}, {"precision": "fp8"}], ids=str)
@torch.no_grad()
def test_after_a_window_is_written_anew_the_graphs_of_warm_up_still_fit(change):
    """Rewriting must not look like a moved state."""
    torch.manual_seed(0)
    config = tiny_transformer(use_cuda_graph=True, **change)
    model = graphed(WanTransformer(config).eval())
    cache = model.initialize_cache(text=torch.randn(1, 4, TEXT_DIM))
    chunks = []

    def step(index: int) -> torch.Tensor:
        latent = torch.randn(model.latent_shape(1))
        model.begin_step(index, cache)
        flow = model.predict_flow(latent, torch.tensor(500.0), cache)
        model.update_cache(latent, torch.tensor(0.0), cache)
        chunks.append((index, latent))
        return flow

    for index in range(5):
        step(index)
    model.network.seal([cache])
    frames = model.context_frames(cache)
    held = [
        ContextChunk(
            frames=tuple(f for f in (2 * i, 2 * i + 1) if f in frames),
            kept=tuple(t for t in (0, 1) if 2 * i + t in frames),
            latent=latent[:, :, [t for t in (0, 1) if 2 * i + t in frames]],
            control=None,
        )
        for i, latent in chunks
        if {2 * i, 2 * i + 1} & set(frames)
    ]
    model.rewrite_context(cache, held, torch.tensor(0.0))
    captures = model.network.captures
    assert step(5).isfinite().all()
    assert model.network.captures == captures
    assert model.network.eager_calls == 2 * 2  # while the window filled


@torch.no_grad()
def test_without_the_flag_nothing_is_captured():
    model = WanTransformer(tiny_transformer(use_cuda_graph=False, control_dim=CONTROL_DIM)).eval()
    rollout(model, steps=1)
    assert not isinstance(model.network, GraphedCallable)
