"""The Wan transformer, replayed: the logic with a recorder in the place of CUDA's."""

import pytest
import torch
from flashdreams.models.wan.state import graph_key

from flashdreams.infra.diffusion.transformer import ContextChunk
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.runtime.cuda_graph import GraphedCallable
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_transformer
from tests.unit.runtime.test_cuda_graph import TraceCapture


def rollout(model: WanTransformer, steps: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = model.device
    cache = model.initialize_cache(text=torch.randn(1, 4, TEXT_DIM, generator=generator))
    flows = []
    for i in range(steps):
        control = torch.randn(1, 8, CONTROL_DIM, generator=generator)
        model.begin_step(i, cache, control)
        latent = torch.randn(model.latent_shape(1), generator=generator).to(device)
        for t in (1000.0, 500.0):
            flows.append(model.predict_flow(latent, torch.tensor(t), cache))
        model.update_cache(latent, torch.tensor(0.0), cache)
    return flows


def graphed(model: WanTransformer, key=graph_key) -> WanTransformer:
    model.network = GraphedCallable(
        model.__call__, torch.device("cpu"), key=key, backend=TraceCapture()
    )
    return model


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "residual_dtype": "float32"}])
@torch.no_grad()
def test_replayed_rollout_equals_the_eager_one(changes):
    """Bit for bit; two captures per fill phase of the ring, and controls stay in their place."""
    torch.manual_seed(0)
    config = tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True, **changes)
    model = WanTransformer(config).cast().eval()
    eager = rollout(model)
    flows = rollout(graphed(model))
    assert all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))
    assert model.network.captures == 2 * 3
    assert model.network.replays == 6 * 3 - 2 * 3


@torch.no_grad()
def test_a_key_without_the_visible_length_is_wrong():
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True)).eval()
    eager = rollout(model)
    flows = rollout(graphed(model, key=lambda cache, write_only=False: write_only))
    assert not all(torch.equal(a, b) for a, b in zip(eager, flows, strict=True))


@pytest.mark.parametrize("storage", ["native", "int8"])
@torch.no_grad()
def test_after_a_window_is_written_anew_the_graphs_of_warm_up_still_fit(storage):
    """Rewriting must not look like a moved state."""
    torch.manual_seed(0)
    config = tiny_transformer(use_cuda_graph=True, kv_cache_dtype=storage)
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
    assert model.network.eager_calls == 0


@torch.no_grad()
def test_without_the_flag_nothing_is_captured():
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).eval()
    rollout(model, steps=1)
    assert not isinstance(model.network, GraphedCallable)
