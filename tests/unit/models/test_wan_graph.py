"""The Wan transformer, replayed: the logic with a recorder in the place of CUDA's."""

import torch

from flashdreams.models.wan.transformer import WanTransformer, graph_key
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


@torch.no_grad()
def test_replayed_rollout_equals_the_eager_one():
    """Bit for bit; two captures per fill phase of the ring, and controls stay in their place."""
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=True)).eval()
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


@torch.no_grad()
def test_without_the_flag_nothing_is_captured():
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).eval()
    rollout(model, steps=1)
    assert not isinstance(model.network, GraphedCallable)
