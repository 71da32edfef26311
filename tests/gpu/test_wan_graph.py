"""The Wan transformer replayed as CUDA graphs on a real GPU."""

import pytest
import torch

from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, tiny_transformer
from tests.unit.models.test_wan_graph import rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
def test_graphs_on_and_off_give_the_same_bits():
    torch.manual_seed(0)
    weights = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).state_dict()
    flows = []
    for use_cuda_graph in (False, True):
        config = tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=use_cuda_graph)
        model = WanTransformer(config).eval().to("cuda")
        model.load_state_dict(weights)
        flows.append(rollout(model))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("use_cuda_graph", [False, True])
@pytest.mark.parametrize("option", ["fused_kernels", "compile_blocks"])
def test_kernels_and_compiled_blocks_change_no_result(option, use_cuda_graph):
    """float32, 1e-4 of the largest value; also captured."""
    torch.manual_seed(0)
    plain = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).eval().to("cuda")
    changes = {option: True, "use_cuda_graph": use_cuda_graph}
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, **changes)).eval().to("cuda")
    expected = rollout(plain)
    assert any((a - b).abs().max() > 0.1 for a, b in zip(rollout(model), expected, strict=True))
    model.load_state_dict(plain.state_dict())
    for found, wanted in zip(rollout(model), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
