"""Packed projections and GELU in a matmul: the same layers, fewer kernels.

Tolerance: float32, 1e-6 of the largest value; a matmul of more columns may sum in another order.
"""

import copy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from flashdreams.models.wan import matmuls
from flashdreams.models.wan.blocks import RMSNorm, SelfAttention
from flashdreams.models.wan.matmuls import fuses_gelu, is_plain_linear, linear_gelu, pack_linears
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.strict import make_strict
from flashdreams.parallel.tensor import ColwiseLinear, GatheredColwiseLinear, RowwiseLinear
from tests.tiny import tiny_transformer

DIM, HEAD = 24, 12
QKV = ("q", "k", "v")


@pytest.fixture
def attention() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(DIM, HEAD, 1e-6).requires_grad_(False)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 5, DIM, generator=torch.Generator().manual_seed(seed))


def separate(attention: SelfAttention, x: torch.Tensor) -> list[torch.Tensor]:
    return [getattr(attention, name)(x).unflatten(-1, (-1, HEAD)) for name in QKV]


def close(found, wanted) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in pairs)


def test_one_matmul_computes_what_three_layers_compute(attention):
    wanted = separate(attention, tokens())
    attention.pack()
    with patch.object(F, "linear", wraps=F.linear) as linear:
        found = attention._project(tokens())
    assert linear.call_count == 1
    assert close(found, wanted) and not close(found[::-1], wanted)
    assert [x.shape for x in found] == [(1, 5, 2, HEAD)] * 3
    assert all(x.stride()[-3:] == (3 * DIM, HEAD, 1) for x in found)  # views, not copies


def test_names_and_memory_stay(attention, tmp_path):
    before = {name: x.clone() for name, x in attention.state_dict().items()}
    attention.pack()
    after = attention.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    storages = {after[f"{name}.weight"].untyped_storage().data_ptr() for name in QKV}
    assert len(storages) == 1
    assert after["q.weight"].untyped_storage().nbytes() == 3 * before["q.weight"].nbytes
    save_file(after, tmp_path / "attention.safetensors")
    loaded = load_file(tmp_path / "attention.safetensors")
    assert all(torch.equal(loaded[name], x) for name, x in before.items())
    torch.save(after, tmp_path / "attention.pt")
    loaded = torch.load(tmp_path / "attention.pt", weights_only=True)
    assert all(torch.equal(loaded[name], x) for name, x in before.items())


def changed(attention: SelfAttention) -> dict[str, torch.Tensor]:
    return {name: x + 0.5 for name, x in attention.state_dict().items()}


def load(attention: SelfAttention) -> SelfAttention:
    attention.load_state_dict(changed(attention))
    return attention


def assign(attention: SelfAttention) -> SelfAttention:
    attention.load_state_dict(changed(attention), assign=True)
    return attention


def edit_a_copy(attention: SelfAttention) -> SelfAttention:
    attention = copy.deepcopy(attention)
    for parameter in attention.parameters():
        parameter.data += 0.5
    return attention


@pytest.mark.parametrize("change", [load, assign, edit_a_copy, SelfAttention.double])
def test_it_follows_its_layers_through_every_change(attention, change):
    attention.pack()
    before = attention._project(tokens())
    attention = change(attention)
    x = tokens().to(attention.q.weight.dtype)
    found = attention._project(x)
    assert attention.packed is not None and close(found, separate(attention, x))
    assert change is SelfAttention.double or not close(found, before)


def test_a_copy_does_not_write_into_the_original(attention):
    attention.pack()
    before = attention._project(tokens())
    load(copy.deepcopy(attention))
    assert close(attention._project(tokens()), before)


def test_the_clean_pass_computes_keys_and_values_alone(attention):
    attention.pack()
    written = []
    attention.core.write = lambda k, v, cache: written.extend([k, v])
    table = torch.tensor([1.0, 0.0]).expand(1, HEAD // 2, 2).contiguous()
    with patch.object(F, "linear", wraps=F.linear) as linear:
        attention.write(tokens(), table, SimpleNamespace(quantizes_early=False, calibrates=False))
    assert [call.args[1].shape for call in linear.call_args_list] == [(2 * DIM, DIM)]
    _, k, v = separate(attention, tokens())
    assert close(written, [attention.norm_k(k.flatten(2)).view_as(k), v])


def channel(size: int) -> Channel:
    return SimpleNamespace(size=size, rank=0, name="tp")  # type: ignore[return-value]


def test_slices_of_output_features_are_packed_and_what_computes_otherwise_is_not():
    colwise = [ColwiseLinear(nn.Linear(8, 8), channel(2), name) for name in QKV]
    x = torch.randn(3, 8)
    wanted = [layer(x) for layer in colwise]
    packed = pack_linears(colwise)
    assert packed.weight.shape == (12, 8) and close(packed(x), wanted)
    for other in (
        GatheredColwiseLinear(nn.Linear(8, 8), channel(2), "q"),
        RowwiseLinear(nn.Linear(8, 8), channel(2), "q"),
        nn.Sequential(nn.Linear(8, 8)),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 8, dtype=torch.bfloat16),
    ):
        assert pack_linears([nn.Linear(8, 8), other]) is None
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(hooked)


def test_strict_layers_are_left_alone():
    config = tiny_transformer(dim=32, num_heads=2)
    model = WanTransformer(config).requires_grad_(False)
    threads = torch.get_num_threads()
    make_strict(model, "cpu")
    torch.set_num_threads(threads)
    for block in model.blocks:
        block.select_implementations(True)
        assert block.self_attn.packed is None and not block.fuses_gelu


def test_on_a_cpu_nothing_is_packed_by_default():
    model = WanTransformer(tiny_transformer())
    model.after_load()
    assert not model.uses_fused_kernels
    assert all(block.self_attn.packed is None for block in model.blocks)
    asked = WanTransformer(tiny_transformer(fused_kernels=True))
    asked.after_load()
    assert all(block.self_attn.packed is not None for block in asked.blocks)


def test_gelu_in_the_matmul_is_used_where_it_is_the_right_one(monkeypatch):
    """The op is PyTorch's own on a GPU; here a stand-in, once with the other form of GELU."""

    def stand_in(form):
        def addmm_activation(bias, x, weight, *, use_gelu):
            assert use_gelu
            return F.gelu(torch.addmm(bias, x, weight), approximate=form)

        return addmm_activation

    layer, x = nn.Linear(8, 6).requires_grad_(False), torch.randn(2, 3, 8)
    monkeypatch.setattr(torch, "_addmm_activation", stand_in("tanh"))
    wanted = F.gelu(layer(x), approximate="tanh")
    assert (linear_gelu(layer, x) - wanted).abs().max() < 1e-6
    ask, place = matmuls._gives_tanh_gelu.__wrapped__, (torch.device("cpu"), torch.bfloat16)
    assert ask(*place)
    monkeypatch.setattr(torch, "_addmm_activation", stand_in("none"))
    assert not ask(*place)
    assert not fuses_gelu(layer, nn.GELU(approximate="tanh"))  # a CPU


def test_the_block_runs_it_when_chosen(monkeypatch):
    model = WanTransformer(tiny_transformer()).requires_grad_(False)
    block, y = model.blocks[0], torch.randn(1, 5, DIM)
    wanted = block.feed_forward(y)
    monkeypatch.setattr(
        torch,
        "_addmm_activation",
        lambda bias, x, w, use_gelu: F.gelu(torch.addmm(bias, x, w), approximate="tanh"),
    )
    block.fuses_gelu = True
    found = block.feed_forward(y)
    assert close([found], [wanted])


def test_a_norm_that_rounds_once_is_nearer_to_float32():
    """One rounding to bfloat16, 2**-9 of the value at most; the official order rounds twice."""
    torch.manual_seed(3)
    norm = RMSNorm(64, 1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    norm, x = norm.bfloat16(), torch.randn(2, 50, 64).bfloat16()
    exact = F.rms_norm(x.float(), (64,), norm.weight.float(), 1e-6)
    twice = norm(x)
    norm.rounds_once = True
    once = norm(x)
    assert once.dtype == torch.bfloat16
    assert ((once - exact).abs() <= exact.abs() * 2**-8).all()
    assert (once - exact).square().mean() < (twice - exact).square().mean()
