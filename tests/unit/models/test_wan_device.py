"""One rollout on the meta device in the place of a GPU: what a recording could not hold."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashdreams.models.wan.blocks import WanBlock
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, tiny_transformer

DEVICE = torch.device("meta")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
"""Operations whose result the host waits for."""


class Watch(TorchDispatchMode):
    """Refuses operations that wait for the device, and within recordings all that meet the host."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.recorded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        read = devices((args, kwargs))
        if "meta" in read and name in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        made = devices(out)
        if "meta" in read and "cpu" in made:
            raise RuntimeError(f"{func} waits for the device")
        if "meta" in read and "cpu" in read and name != "copy_":
            raise RuntimeError(f"{func} takes tensors of two devices")
        self.recorded += self.recording
        if self.recording and "cpu" in read | made:
            raise RuntimeError(f"{func} meets the host within a recording")
        return out

    def record(self, function):
        """``function``, watched as if it were being recorded."""

        def recorded(*args):
            self.recording = True
            try:
                return function(*args)
            finally:
                self.recording = False

        return recorded


def devices(values) -> set[str]:
    return {x.device.type for x in tree_leaves(values) if isinstance(x, Tensor)}


def rollout(watch: Watch, **overrides) -> None:
    config = tiny_transformer(**{"control_dim": CONTROL_DIM, **overrides})
    model = WanTransformer(config).eval().cast().to(DEVICE)
    model.after_load()
    model.network = watch.record(model.__call__)
    latent = torch.zeros(model.latent_shape(1), device=DEVICE)
    control = model.example_control(1)
    cache = model.initialize_cache(**model.example_context(1))
    noisy, clean = torch.tensor(1000.0), torch.tensor(0.0)
    with watch:
        for i in range(model.warm_up_steps):
            model.begin_step(i, cache, control)
            flow = model.predict_flow(latent, noisy, cache)
            model.update_cache(latent, clean, cache)
            assert (flow.device, flow.shape) == (DEVICE, latent.shape)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dtype": "bfloat16", "prediction": "x0"},
        {"control_dim": None, "streaming": False},
        {"condition_channels": 3, "image_dim": 6, "image_len": 4},
        {"relative_rope": True},
        {"condition_channels": 3, "kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "int8", "dtype": "bfloat16"},
        {"precision": "fp8", "relative_rope": True},
        {"fused_kernels": True, "dtype": "bfloat16"},
        {"residual_dtype": "float32", "dtype": "bfloat16"},
        {"residual_dtype": "float32", "dtype": "bfloat16", "fused_kernels": True},
        {"attention_backend": "triton"},
        {"attention_backend": "sdpa_math"},
    ],
    ids=lambda overrides: ", ".join(overrides) or "plain",
)
@torch.no_grad()
def test_no_network_call_meets_the_host(overrides):
    watch = Watch()
    rollout(watch, **overrides)
    assert watch.recorded > 100


def item(x: Tensor, control) -> Tensor:
    return x * x.sum().item()


def host_table(x: Tensor, control) -> Tensor:
    return x + torch.ones(x.shape[-1]).to(x.device)


def host_index(x: Tensor, control) -> Tensor:
    return x[:, torch.arange(x.shape[1])]


@pytest.mark.parametrize(
    ("inject", "complaint"),
    [
        (item, "_local_scalar_dense.default waits for the device"),
        (host_table, "meets the host within a recording"),
        (host_index, "arange.default meets the host within a recording"),
    ],
)
@torch.no_grad()
def test_what_meets_the_host_is_noticed(inject, complaint, monkeypatch):
    """Negative control: each of these breaks a recording on a GPU, or makes it wrong."""
    monkeypatch.setattr(WanBlock, "inject", lambda block, x, control: inject(x, control))
    with pytest.raises(RuntimeError, match=complaint):
        rollout(Watch())
