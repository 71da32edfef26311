"""Weights that stay where they are while their module runs elsewhere.

The other device is ``meta``: operators refuse a tensor of the CPU beside one of it, so a module
that runs through has had all of its weights there.
"""

import pytest
import torch
from torch import Tensor, nn

from flashdreams.runtime.offload import offload

META = torch.device("meta")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 8)
        self.places = nn.Embedding(3, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
        self.fails = False

    def forward(self, ids: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("in the middle")
        x = self.table(ids)
        places = torch.arange(len(ids), device=x.device)
        return self.layers(x * self.scale + self.places(places))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_a_module_runs_where_its_weights_are_not() -> None:
    network = Network().eval()
    with pytest.raises(RuntimeError, match="meta"):  # negative control: not offloaded yet
        network.layers(torch.zeros(3, 8, device=META))
    before = {name: tensor.clone() for name, tensor in tensors(network).items()}
    ids = torch.zeros(3, dtype=torch.int64)
    offload(network, META)
    there: list[set[str]] = []
    for layer in (network.places, *network.layers):
        layer.register_forward_pre_hook(
            lambda *_: there.append({n for n, x in tensors(network).items() if x.is_meta})
        )
    assert network(ids).device == META
    for name, tensor in tensors(network).items():
        assert torch.equal(tensor, before[name]), name
    # One layer, and the scale around it; meta itself would look up in a table of the CPU.
    assert [len(names) for names in there] == [2, 3, 6, 3]
    assert all("table.weight" not in names for names in there)
    network.fails = True
    with pytest.raises(RuntimeError, match="in the middle"):
        network(ids)
    assert not any(tensor.is_meta for tensor in tensors(network).values())
