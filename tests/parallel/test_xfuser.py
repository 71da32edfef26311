"""xDiT's attention library against the native strategies; float32, bidirectional."""

import sys

import pytest
import torch

from flashdreams.infra.assembly import degrees_of
from flashdreams.parallel import xfuser
from flashdreams.parallel.mesh import ParallelConfig, resolve_degrees
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.xfuser import XfuserAttention
from tests.harness import run_ranks
from tests.parallel.rollout import build_model, make_mesh, relative_error, roll_out

pytest.importorskip("yunchang", reason="the test extra installs yunchang")

BIDIRECTIONAL = {"streaming": False, "latent_width": 8}


def run(world_size, **wishes):
    model = build_model(**BIDIRECTIONAL)
    parallelize(model, model.parallel_plan(), make_mesh(ParallelConfig(**wishes), world_size))
    return model, roll_out(model, 1)


def both_backends(world_size):
    found = {}
    for ulysses in (1, 2):
        model, latents = run(world_size, ulysses_degree=ulysses, context_backend="xfuser")
        assert isinstance(model.blocks[0].self_attn.core, XfuserAttention)
        found[ulysses] = latents
    native = run(world_size)[1]
    streaming = build_model()
    mesh = make_mesh(ParallelConfig(context_backend="xfuser"), world_size)
    parallelize(streaming, streaming.parallel_plan(), mesh)
    with pytest.raises(ValueError, match="cannot serve a streaming model"):
        roll_out(streaming, 1)
    return found, native


@pytest.mark.parametrize("world_size", [2, 4])
def test_yunchang_equals_the_native_strategy(world_size):
    expected = roll_out(build_model(**BIDIRECTIONAL), 1)
    for found, native in run_ranks(both_backends, world_size, world_size):
        assert relative_error(native, expected) <= 1e-5
        for latents in found.values():
            assert relative_error(latents, expected) <= 1e-5


def without_lse():
    """The mistake behind yunchang's silent error with TORCH_MATH: blocks merged unweighted."""
    attend = xfuser.attend_with_lse

    def unweighted(q, k, v, *, scale):
        out, lse = attend(q, k, v, scale=scale)
        return out, torch.zeros_like(lse)

    xfuser.attend_with_lse = unweighted
    return run(2, ulysses_degree=1, context_backend="xfuser")[1]


def test_blocks_merged_without_weights_are_seen():
    expected = roll_out(build_model(**BIDIRECTIONAL), 1)
    assert relative_error(run_ranks(without_lse, 2)[0], expected) > 1e-3


def uneven_tokens():
    model = build_model(streaming=False, latent_width=6, len_t=1)
    mesh = make_mesh(ParallelConfig(context_backend="xfuser"), 2)
    parallelize(model, model.parallel_plan(), mesh)
    with pytest.raises(ValueError, match="9 tokens are not divisible by 2 ranks"):
        roll_out(model, 1)


def test_uneven_tokens_are_refused():
    run_ranks(uneven_tokens, 2)


def test_refusals_say_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "yunchang", None)
    with pytest.raises(ImportError, match=r"pip install 'flashdreams\[gpu\]'"):
        xfuser._import_yunchang()
    config = ParallelConfig(context_backend="xfuser", tensor_parallel_degree=2)
    with pytest.raises(ValueError, match="context-backend native"):
        resolve_degrees(config, 4, 12)
    model = build_model(streaming=False, latent_width=6, len_t=1)
    with pytest.raises(ValueError, match="9 tokens are not divisible by 2 ranks"):
        degrees_of(model, ParallelConfig(context_backend="xfuser"), 2, guided=False)
