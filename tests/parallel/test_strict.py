"""Strict mode: the same bits on 1, 2, 3 and 4 ranks."""

import hashlib
import importlib

import pytest
import torch
from torch import nn

from flashdreams.attention.backends import sdpa
from flashdreams.attention.core import AttentionCore
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.strict import (
    TILE_ROWS,
    InvariantLinear,
    TiledAttention,
    TiledLinear,
    make_strict,
)
from tests.harness import run_ranks
from tests.kernels.conftest import switch_to_interpreter
from tests.parallel.rollout import build_model, make_mesh, roll_out

module = importlib.import_module("flashdreams.parallel.parallelize")

# Wide enough that the library's choice of kernels shows in the bits.
WIDE = {"dim": 192, "ffn_dim": 512, "num_layers": 1, "sink_size_t": 1}
FEWEST_TOKENS = {**WIDE, "latent_height": 2, "latent_width": 6}
FEW_TOKENS = {**WIDE, "latent_height": 4, "latent_width": 6}
MANY_TOKENS = {**WIDE, "latent_height": 12, "latent_width": 14}


def digest(config, world_size, dtype, overrides, steps=3):
    """One hash per AR step over the raw latents."""
    model = build_model(dtype, **overrides)
    parallelize(model, model.parallel_plan(), make_mesh(config, world_size))
    latents = roll_out(model, steps)
    return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in latents]


def digests(world_size):
    ulysses = ParallelConfig(strict=True)
    gather = ParallelConfig(strict=True, ulysses_degree=1)
    default = ParallelConfig(ulysses_degree=1)
    return {
        "fewest": digest(ulysses, world_size, "float32", FEWEST_TOKENS),
        "fewest gathered": digest(gather, world_size, "float32", FEWEST_TOKENS),
        "few": digest(ulysses, world_size, "float32", FEW_TOKENS),
        "few gathered": digest(gather, world_size, "float32", FEW_TOKENS),
        "many": digest(ulysses, world_size, "float32", MANY_TOKENS),
        "many gathered": digest(gather, world_size, "float32", MANY_TOKENS),
        "many bf16": digest(ulysses, world_size, "bfloat16", MANY_TOKENS),
        # Which kernels a library has depends on the machine: for 1 to 3 rows most have their own.
        "not strict": [
            digest(default, world_size, "float32", shape) for shape in (FEWEST_TOKENS, FEW_TOKENS)
        ],
    }


def digests_as_on_a_gpu(world_size):
    """Linear layers through the kernel, in Triton's interpreter; no padding, attention in tiles.

    Widths are whole vectors of a CPU, so that its element-wise loops have no ends either.
    """
    with pytest.MonkeyPatch.context() as patch:
        switch_to_interpreter(patch)
        patch.setattr(module, "make_strict", lambda model, _: make_strict(model, "cuda"))
        ulysses = ParallelConfig(strict=True)
        gather = ParallelConfig(strict=True, ulysses_degree=1)
        few = {**FEWEST_TOKENS, "dim": 64, "ffn_dim": 128, "num_heads": 4}
        return [digest(way, world_size, "float32", few, 1) for way in (ulysses, gather)]


def test_strict_rollouts_through_the_kernel_have_the_same_bits():
    """Six tokens on four ranks, two of them padded or empty."""
    pytest.importorskip("triton")
    (expected,) = run_ranks(digests_as_on_a_gpu, 1, 1)
    assert expected[0] == expected[1]
    assert all(found == expected for found in run_ranks(digests_as_on_a_gpu, 4, 4))


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(digests, 1, 1)[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_strict_rollouts_have_the_same_bits(world_size, one_rank):
    for found in run_ranks(digests, world_size, world_size):
        for case, expected in one_rank.items():
            assert (found[case] == expected) == (case != "not strict"), case


def test_tiled_layers_compute_the_same():
    linear = nn.Linear(6, 5)
    x = torch.randn(2, 3, 37, 6)
    torch.testing.assert_close(TiledLinear(linear, 16)(x), linear(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(TiledLinear(linear, 16)(x[0, 0, 0]), linear(x[0, 0, 0]))
    q, k, v = (torch.randn(2, length, 3, 8) for length in (37, 50, 50))
    tiled = TiledAttention(sdpa, 16)(q, k, v, scale=0.3)
    torch.testing.assert_close(tiled, sdpa(q, k, v, scale=0.3), rtol=0, atol=1e-6)


def test_strict_keeps_the_parameters():
    model = build_model()
    before = dict(model.named_parameters())
    report = parallelize(model, model.parallel_plan(), Mesh(config=ParallelConfig(strict=True)))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert "tiles of fixed size" in str(report)


def test_strict_on_a_gpu_has_one_call_per_linear_layer_and_pads_nothing(monkeypatch):
    """Built for a GPU, run on meta: which layers there are, and what may still be fused."""
    model = build_model()
    before = dict(model.named_parameters())
    mesh = Mesh(config=ParallelConfig(strict=True), device_type="cuda")
    report = parallelize(model, model.parallel_plan(), mesh)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(type(m) is InvariantLinear for m in linears)
    assert all(dict(model.named_parameters())[name] is before[name] for name in before)
    assert "the same bits for any number of rows" in str(report)
    assert "split" not in report.installed  # one rank computes its tokens as they are
    meta = InvariantLinear(nn.Linear(3, 2, device="meta"))
    assert meta(torch.empty(5, 3, device="meta")).shape == (5, 2)
    cores = [m for m in model.modules() if isinstance(m, AttentionCore)]
    assert cores and all(core.strict and core.backend.rows == TILE_ROWS["cuda"] for core in cores)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, unit = make_strict(nn.Sequential(nn.Linear(2, 2)), "cuda")
    assert unit == TILE_ROWS["cuda"]
