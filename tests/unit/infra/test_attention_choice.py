"""Which attention backend a pipeline runs, and who decides."""

import pytest
import torch

from flashdreams.attention import backends
from flashdreams.attention.choose import AttentionShape, BackendChoice, MeasuredBackend
from flashdreams.attention.core import AttentionCore
from flashdreams.infra import warm_up
from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.transformer import Transformer, TransformerConfig
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.strict import TiledAttention
from tests.tiny import tiny_pipeline, tiny_transformer

CUDA = torch.device("cuda")
STRICT = Mesh(config=ParallelConfig(strict=True))


def cores(module) -> list[AttentionCore]:
    found = [m for m in module.modules() if isinstance(m, AttentionCore)]
    assert len(found) == 4
    return found


@pytest.fixture
def asked(monkeypatch) -> list[AttentionShape]:
    """The measurement, answered without one: sdpa_math."""
    shapes = []

    def choose(shape, device, dtype):
        assert (device, dtype) == (CUDA, torch.float32)
        shapes.append(shape)
        rows = (MeasuredBackend("sdpa_math", 0.5, 1e-7, "chosen"),)
        return BackendChoice("sdpa_math", rows)

    monkeypatch.setattr(warm_up, "choose_backend", choose)
    return shapes


def test_an_unknown_name_is_refused_by_the_config():
    with pytest.raises(ValueError, match=r"'sdpa_mat'.*sdpa_math.*also auto.*Did you mean"):
        tiny_transformer(attention_backend="sdpa_mat")


def test_a_backend_that_cannot_run_here_is_refused_at_set_up():
    config = tiny_pipeline(attention_backend="sdpa_efficient")
    with pytest.raises(ValueError, match=r"needs a CUDA device.*Usable on cpu.*sdpa_math"):
        config.setup(device="cpu")


def test_a_transformer_without_cores_refuses_a_name():
    plain = DiffusionModelConfig(
        transformer=TransformerConfig(attention_backend="sdpa_math"),
        scheduler=tiny_pipeline().diffusion_model.scheduler,
    )
    config = derive_config(tiny_pipeline(), diffusion_model=plain)
    with pytest.raises(ValueError, match="names no attention cores"):
        config.setup(device="cpu")
    assert Transformer(TransformerConfig()).attention_shape(1) is None


def test_a_fixed_name_holds_for_every_core_and_stands_in_the_stats():
    pipeline = tiny_pipeline(attention_backend="sdpa_math").setup(device="cpu")
    assert all(core.backend is backends.sdpa_math for core in cores(pipeline.diffusion_model))
    pipeline.warm_up()
    assert pipeline.stats()["attention_backend"] == "sdpa_math"


def test_strict_tiles_go_around_a_fixed_name():
    pipeline = tiny_pipeline(attention_backend="sdpa_math").setup(device="cpu", load=False)
    pipeline.parallelize(STRICT)
    for core in cores(pipeline.diffusion_model):
        assert isinstance(core.backend, TiledAttention)
        assert core.backend.backend is backends.sdpa_math


@pytest.mark.parametrize("mesh", [Mesh(), STRICT])
def test_auto_measures_nothing_on_a_cpu(asked, mesh):
    transformer = tiny_transformer().setup()
    choice = warm_up.choose_attention(transformer, mesh, torch.device("cpu"))
    assert choice.name == "sdpa" and not asked
    assert all(core.backend is backends.sdpa for core in cores(transformer))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", ["auto", "sdpa_math"])
def test_strict_on_a_gpu_asks_for_equal_bits_and_measures_nothing(asked, monkeypatch, name, tiled):
    def choose(shape, device, dtype, names):
        assert shape.num_heads == 2 and (device, dtype) == (CUDA, torch.float32)
        assert names == (backends.PREFERENCE if name == "auto" else (name,))
        return BackendChoice(names[-1], (), tiled=tiled)

    monkeypatch.setattr(warm_up, "choose_invariant_backend", choose)
    transformer = tiny_transformer(attention_backend=name).setup()
    choice = warm_up.choose_attention(transformer, STRICT, CUDA)
    assert choice.tiled == tiled and not asked
    chosen = backends.BACKENDS[choice.name]
    for core in cores(transformer):
        assert isinstance(core.backend, TiledAttention) == tiled
        assert (core.backend.backend if tiled else core.backend) is chosen


def test_strict_fixes_the_splits_of_all_cores(asked, monkeypatch):
    """Two of the four cores have a cache; those of cross-attention are not split."""
    monkeypatch.setattr(warm_up, "kv_splits_of", lambda name, shape, device, *, strict: 3)
    choice = BackendChoice("triton", (), 3)
    monkeypatch.setattr(warm_up, "choose_invariant_backend", lambda *args: choice)
    transformer = tiny_transformer().setup()
    assert warm_up.choose_attention(transformer, STRICT, CUDA) is choice
    splits = [core.backend.keywords["num_splits"] for core in cores(transformer)]
    assert sorted(splits) == [1, 1, 3, 3]
    assert sorted(core.kv_splits for core in cores(transformer)) == [1, 1, 3, 3]


def test_auto_measures_the_real_call_on_a_gpu(asked):
    transformer = tiny_transformer().setup()
    choice = warm_up.choose_attention(transformer, Mesh(), CUDA)
    assert asked == [AttentionShape(batch_size=1, queries=8, keys=24, num_heads=2, head_dim=12)]
    assert choice.stats()["attention_backends"][0]["ms"] == 0.5
    assert all(core.backend is backends.sdpa_math for core in cores(transformer))


def test_a_wish_is_not_measured(asked):
    transformer = tiny_transformer(attention_backend="sdpa_flash").setup()
    assert warm_up.choose_attention(transformer, Mesh(), CUDA).name == "sdpa_flash"
    assert not asked


def test_a_bidirectional_model_attends_to_its_own_tokens():
    shape = tiny_transformer(streaming=False, sink_size_t=0).setup().attention_shape(2)
    assert (shape.batch_size, shape.queries, shape.keys) == (2, 8, 8)
