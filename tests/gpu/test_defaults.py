"""What a GPU gets without a flag: fused kernels, packed projections, graphs, measured attention."""

import pytest
import torch

from flashdreams.attention.backends import BACKENDS, bind_kv_splits, why_unusable
from flashdreams.attention.choose import AttentionShape, draw_inputs, reference_attention
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, tiny_pipeline, tiny_transformer
from tests.unit.models.test_wan_graph import rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = dict(dim=256, ffn_dim=512, num_heads=4, control_dim=CONTROL_DIM)


def flows(weights: dict, **changes) -> tuple[list[torch.Tensor], WanTransformer]:
    model = WanTransformer(tiny_transformer(**SIZES, **changes)).eval().requires_grad_(False)
    model.load_state_dict(weights)
    model.cast().to("cuda")
    model.after_load()
    return [flow.float() for flow in rollout(model)], model


def worst(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@torch.no_grad()
def test_the_defaults_are_as_near_to_float32_as_the_plain_network():
    """bfloat16, against float32: at most 1.5 times the error without any kernel of our own."""
    torch.manual_seed(0)
    weights = WanTransformer(tiny_transformer(**SIZES)).state_dict()
    exact, _ = flows(weights, fused_kernels=False)
    plain, without = flows(weights, fused_kernels=False, dtype="bfloat16")
    near, model = flows(weights, dtype="bfloat16")
    assert all(block.self_attn.packed is not None for block in model.blocks)
    assert all(block.fuses_gelu for block in model.blocks)
    assert not any(block.fuses_gelu or block.self_attn.packed for block in without.blocks)
    assert 0 < worst(near, exact) < 1.5 * worst(plain, exact) < 0.2


def test_a_pipeline_captures_its_graphs_and_says_what_it_runs():
    pipeline = tiny_pipeline(dim=256, num_heads=4, dtype="bfloat16").setup(device="cuda")
    done = pipeline.warm_up()
    stats = pipeline.stats()
    assert done.captures == 2 and "off" not in stats["cuda_graphs"]
    assert stats["fingerprint"]["fused_kernels"] is True
    assert stats["attention_backend"] == done.attention.name


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_flash_attention_3_with_bound_splits_is_right(splits):
    """bfloat16, 3e-2 of the largest value; a lost share of the keys shows."""
    cuda = torch.device("cuda")
    reason = why_unusable("flash_attn_3", cuda, torch.bfloat16, 128)
    if reason is not None:
        pytest.skip(reason)
    shape = AttentionShape(batch_size=1, queries=300, keys=3000, num_heads=2, head_dim=128)
    q, k, v = draw_inputs(shape, cuda, torch.bfloat16)
    expected = reference_attention(q, k, v, 128**-0.5)
    attend = bind_kv_splits("flash_attn_3", splits)
    out, lse = attend(q, k, v, scale=128**-0.5, return_lse=True)
    bound = 3e-2 * expected.abs().max()
    assert (out.float() - expected).abs().max() < bound
    assert lse.shape == (1, 2, 300)
    assert (attend(q, k[:, :-1], v[:, :-1], scale=128**-0.5).float() - expected).abs().max() > bound
    assert torch.equal(attend(q, k, v, scale=128**-0.5), out)
    assert BACKENDS["flash_attn_3"](q, k, v, scale=128**-0.5).shape == q.shape
