"""The blocks' products in eight bits: bounds from the format, refusals, what stays as it was."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.infra import low_precision
from flashdreams.infra.low_precision import (
    Fp8Linear,
    check_low_precision,
    emulated_product,
    lower_precision,
    quantize,
    scaled_product,
)
from flashdreams.infra.weights import memory_estimate
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.parallel.strict import make_strict
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError
from tests.tiny import TEXT_DIM, tiny_pipeline, tiny_transformer

PRECISIONS = ["fp8", "fp8_rowwise"]
CPU = torch.device("cpu")
STEPS = 4
BOUND = 0.02
"""Largest error of a tiny rollout's latents over their largest entry: 2.5 times what was measured.
"""


def linear(seed: int = 0, features: int = 64, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(features, 48).to(dtype).requires_grad_(False)


def tokens(seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).float().abs().max() / b.float().abs().max())


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_stays_within_the_rounding_of_its_factors(rowwise, dtype, monkeypatch):
    """Each factor is off by at most 1/16 of itself; sums of 64 such errors come out smaller."""
    layer, x = linear(dtype=dtype), tokens(dtype=dtype)
    out = Fp8Linear(layer, rowwise=rowwise)(x)
    assert out.shape == (2, 10, 48) and out.dtype == dtype
    assert 1e-3 < error(out, layer(x)) < 1 / 16
    monkeypatch.setattr(low_precision, "LARGEST", 2.0**-8)  # negative control: some three bits
    assert error(Fp8Linear(layer, rowwise=rowwise)(x), layer(x)) > 1 / 16


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_emulation_is_the_scaled_product_of_pytorch(rowwise):
    """PyTorch's CPU form of the call that a GPU gets; float32, 1e-6 for sums in another order."""
    x, x_scale = quantize(tokens().flatten(0, 1), rowwise)
    weight, scale = quantize(linear().weight, rowwise)
    bias = torch.randn(48)
    emulated = emulated_product(x, x_scale, weight, scale, bias, torch.float32)
    for given, agrees in ((scale, True), (1.01 * scale, False)):
        product = scaled_product(x, x_scale, weight, given, None, torch.float32) + bias
        assert (error(product, emulated) < 1e-6) is agrees


def test_rows_of_their_own_scale_keep_small_tokens():
    layer, x = linear(), tokens()
    layer.bias = None
    x[0] *= 1e-5
    exact = layer(x)
    layers = [Fp8Linear(layer, rowwise=rowwise) for rowwise in (True, False)]
    rowwise, tensorwise = (error(rounded(x)[0], exact[0]) for rounded in layers)
    assert rowwise < 1 / 16 < tensorwise
    x[1] = 0
    assert (layers[0](x)[1] == 0).all()


def rollout(precision: str, **changes) -> torch.Tensor:
    config = tiny_pipeline(linear_precision=precision, **changes)
    pipeline = config.setup(device="cpu")
    text = torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    cache = pipeline.initialize_cache(text=text, seed=3)
    latents = []
    for index in range(STEPS):
        pipeline.generate(index, cache, 0.1 * index)
        pipeline.finalize(index, cache)
        latents.append(cache.latent)
    return torch.cat(latents, dim=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_error_of_a_rollout_is_bounded(precision, monkeypatch):
    exact = rollout("native")
    assert 1e-4 < error(rollout(precision), exact) < BOUND
    monkeypatch.setattr(low_precision, "LARGEST", 2.0**-8)  # negative control: some three bits
    assert error(rollout(precision), exact) > BOUND


def test_the_layers_of_the_blocks_are_rounded_and_no_others():
    model = WanTransformer(tiny_transformer(image_dim=10, control_dim=4))
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    replaced = lower_precision(model, model.parallel_plan(), "fp8_rowwise", CPU)
    rounded = {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert replaced == len(rounded) == 10 * len(model.blocks)
    assert {name.split(".")[0] for name in rounded} == {"blocks"}
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert left == others - rounded and "head.head" in left
    assert not {f"{name}.weight" for name in rounded} & set(model.state_dict())


def test_a_checkpoint_is_loaded_strictly_and_then_rounded(tmp_path):
    model = WanTransformer(tiny_transformer(control_dim=5))
    path = str(tmp_path / "tiny.safetensors")
    save_file(model.state_dict(), path)
    config = tiny_pipeline(linear_precision="fp8", checkpoint=CheckpointConfig(source=path))
    pipeline = config.setup(device="cpu")
    layer = pipeline.diffusion_model.transformer.blocks[0].ffn[0]
    expected = Fp8Linear(model.blocks[0].ffn[0], rowwise=False)
    assert torch.equal(layer.weight_fp8.float(), expected.weight_fp8.float())
    assert torch.equal(layer.weight_scale, expected.weight_scale)
    with pytest.raises(ValueError, match="Weights are rounded once"):
        pipeline.load()
    with pytest.raises(RuntimeError, match="weight_fp8"):
        pipeline.diffusion_model.transformer.load_state_dict(model.state_dict())

    save_file({k: v for k, v in model.state_dict().items() if "ffn.0" not in k}, path)
    with pytest.raises(CheckpointError, match=r"ffn\.0"):
        config.setup(device="cpu")


def test_the_estimate_knows_the_precision():
    sizes = dict(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30, dtype="bfloat16")
    native = memory_estimate(tiny_pipeline(**sizes))
    rounded = memory_estimate(tiny_pipeline(linear_precision="fp8", **sizes))
    assert "transformer 2.8 GB in bfloat16, KV" in native
    assert "transformer 1.4 GB in bfloat16 and fp8, KV" in rounded


class Gpu:
    """A device that says it is one, and how able it is."""

    def __init__(self, monkeypatch, *capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        self.device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "change", "message"),
    [
        ((8, 6), {}, r"compute capability 8\.9 or later; cuda:0 has 8\.6"),
        ((9, 0), {"dtype": "float32"}, "Set dtype='bfloat16'"),
        ((9, 0), {"ffn_dim": 40}, "32 to 40 features on this rank; .* multiples of 16"),
        ((9, 0), {}, None),
    ],
)
def test_a_gpu_that_cannot_is_refused_before_anything_is_loaded(
    capability, change, message, monkeypatch
):
    device = Gpu(monkeypatch, *capability).device
    sizes = dict(dim=32, ffn_dim=48, dtype="bfloat16", linear_precision="fp8")
    with torch.device("meta"):
        model = WanTransformer(tiny_transformer(**{**sizes, **change}))
    if message is None:
        model.check_device(device)
        return
    with pytest.raises(ValueError, match=message):
        model.check_device(device)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="'native', 'fp8', 'fp8_rowwise'"):
        tiny_transformer(linear_precision="fp4")
    for plan in (None, ParallelPlan()):
        with pytest.raises(ValueError, match="names no layers in low_precision"):
            check_low_precision(linear(), plan, "fp8", CPU)
    model = WanTransformer(tiny_transformer(linear_precision="fp8"))
    threads = torch.get_num_threads()
    make_strict(model, "cpu")
    torch.set_num_threads(threads)
    with pytest.raises(ValueError, match=r"TiledLinear, which cannot .*\.strict True"):
        model.check_device(CPU)
