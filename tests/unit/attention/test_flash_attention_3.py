"""FlashAttention-3 through stand-ins for its packages: what is passed on, and what is refused."""

import importlib.machinery
import sys
import types
from functools import partial

import pytest
import torch

from flashdreams.attention import backends, choose, flash_attention_3
from flashdreams.attention.backends import BACKENDS, bind_kv_splits, sdpa_math, why_unusable
from flashdreams.attention.choose import AttentionShape, choose_backend, preferred
from flashdreams.attention.core import AttentionCore
from flashdreams.infra import warm_up
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from tests.tiny import tiny_transformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
SCALE = 0.25


class Calls(list):
    """What the stand-in was called with."""


def install(monkeypatch, name: str, function) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def fa3(monkeypatch) -> Calls:
    """The package fa3-fwd."""
    calls = Calls()

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        num_splits=0,
        return_attn_probs=False,
    ):
        calls.append((softmax_scale, num_splits, return_attn_probs))
        out, lse = sdpa_math(q, k, v, scale=softmax_scale, return_lse=True)
        return (out, lse) if return_attn_probs else out

    install(monkeypatch, "fa3_fwd_interface", flash_attn_func)
    return calls


@pytest.fixture
def hopper(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def tensors() -> list[torch.Tensor]:
    return list(torch.randn(3, 1, 6, 2, 8, generator=torch.Generator().manual_seed(0)))


def test_its_own_choice_of_splits_is_never_left_to_it(fa3):
    q, k, v = tensors()
    out = BACKENDS["flash_attn_3"](q, k, v, scale=SCALE)
    assert torch.equal(out, sdpa_math(q, k, v, scale=SCALE, return_lse=True)[0])
    bind_kv_splits("flash_attn_3", 2)(q, k, v, scale=SCALE)
    out, lse = bind_kv_splits("flash_attn_3", 3)(q, k, v, scale=SCALE, return_lse=True)
    assert lse.shape == (1, 2, 6)
    assert fa3 == [(SCALE, 1, False), (SCALE, 2, False), (SCALE, 3, True)]
    with pytest.raises(ValueError, match="num_splits=0 must be at least 1"):
        flash_attention_3.flash_attn_3(q, k, v, scale=SCALE, num_splits=0)


def test_backends_without_splits_are_returned_as_they_are(fa3):
    assert bind_kv_splits("sdpa", 2) is BACKENDS["sdpa"]
    assert bind_kv_splits("flash_attn_3", 1) is BACKENDS["flash_attn_3"]


def test_the_compiled_package_serves_too_and_early_ones_know_no_options(monkeypatch):
    seen = []

    def early(q, k, v, softmax_scale=None, causal=False):
        seen.append(softmax_scale)
        return sdpa_math(q, k, v, scale=softmax_scale, return_lse=True)

    install(monkeypatch, "flash_attn_interface", early)
    q, k, v = tensors()
    assert bind_kv_splits("flash_attn_3", 2)(q, k, v, scale=SCALE).shape == q.shape
    assert BACKENDS["flash_attn_3"](q, k, v, scale=SCALE, return_lse=True)[1].shape == (1, 2, 6)
    assert seen == [SCALE, SCALE]


@pytest.mark.usefixtures("fa3", "hopper")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (BF16, 128, None),
        (BF16, 64, None),
        (BF16, 256, None),
        (torch.float16, 128, "takes bfloat16, not float16"),
        (torch.float32, 128, "takes bfloat16, not float32"),
        (BF16, 32, "multiples of 8 from 64 to 256, not 32"),
        (BF16, 264, "multiples of 8 from 64 to 256, not 264"),
        (BF16, 100, "multiples of 8 from 64 to 256, not 100"),
    ],
)
def test_what_the_ready_made_package_takes(dtype, head_dim, reason):
    found = why_unusable("flash_attn_3", CUDA, dtype, head_dim)
    assert found is None if reason is None else reason in found


@pytest.mark.usefixtures("hopper")
def test_the_compiled_package_takes_float16_and_small_heads(monkeypatch):
    install(monkeypatch, "flash_attn_interface", lambda q, k, v: q)
    assert why_unusable("flash_attn_3", CUDA, torch.float16, 32) is None


def test_reasons_come_in_the_order_in_which_they_can_be_mended(fa3, monkeypatch):
    assert "needs a CUDA device, not cpu" in why_unusable("flash_attn_3", CPU, BF16, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.x, found 8.0" in why_unusable("flash_attn_3", CUDA, BF16, 128)
    monkeypatch.setattr(flash_attention_3, "installed_modules", lambda: [])
    assert "pip install 'flashdreams[gpu]'" in why_unusable("flash_attn_3", CUDA, BF16, 128)
    with pytest.raises(ImportError, match=r"not installed; pip install 'flashdreams\[gpu\]'"):
        BACKENDS["flash_attn_3"](*tensors(), scale=SCALE)


@pytest.mark.usefixtures("hopper")
def test_a_package_for_another_cuda_is_unusable_and_the_other_one_is_tried(monkeypatch, tmp_path):
    """It is found, and fails as it is loaded."""
    missing = "libcudart.so.14: cannot open shared object file"
    (tmp_path / "fa3_fwd_interface.py").write_text(f"raise OSError({missing!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = why_unusable("flash_attn_3", CUDA, BF16, 128)
    assert f"fa3_fwd_interface cannot be loaded: {missing}" in found and "another CUDA" in found
    assert "flash_attn_3" not in backends.usable_backends(CPU, BF16, 128)
    install(monkeypatch, "flash_attn_interface", lambda q, k, v: q)
    assert why_unusable("flash_attn_3", CUDA, BF16, 128) is None


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"sdpa": 1.0, "flash_attn_3": 1.02}, "flash_attn_3"),
        ({"sdpa": 1.0, "flash_attn_3": 1.04}, "sdpa"),
        ({"triton": 1.0, "flash_attn": 1.01, "sdpa_cudnn": 1.02, "sdpa": 0.995}, "sdpa_cudnn"),
        ({"triton": 1.0, "flash_attn_3": 1.05, "sdpa_cudnn": 1.02}, "sdpa_cudnn"),
        ({"mine": 1.0, "sdpa": 1.01, "yours": 0.99}, "sdpa"),
        ({"mine": 1.0, "yours": 0.99}, "yours"),
    ],
)
def test_a_later_name_is_taken_only_when_clearly_faster(times, expected):
    assert preferred(times) == expected


def test_a_measurement_runs_the_splits_that_the_model_will_run(fa3, monkeypatch):
    shape = AttentionShape(batch_size=1, queries=600, keys=9000, num_heads=1, head_dim=8)
    monkeypatch.setattr(choose, "why_unusable", lambda *_: None)
    monkeypatch.setattr(choose, "count_processors", lambda device: 8)
    monkeypatch.setattr(choose, "_time_in_turns", lambda calls, *_: dict.fromkeys(calls, 1.0))
    candidates = {name: BACKENDS[name] for name in ("sdpa", "flash_attn_3")}
    choice = choose_backend(shape, CPU, torch.float32, candidates, repeats=1)
    assert (choice.name, choice.kv_splits) == ("flash_attn_3", 3)  # 5 tiles, 15 of 16 places
    assert {splits for _, splits, _ in fa3} == {3}
    assert choice.stats()["attention_kv_splits"] == 3
    assert str(choice) == "flash_attn_3, KV splits 3"


def splits_of(core: AttentionCore) -> int:
    return core.backend.keywords["num_splits"] if isinstance(core.backend, partial) else 1


@pytest.mark.parametrize(
    ("mesh", "given"), [(Mesh(), 1), (Mesh(config=ParallelConfig(strict=True)), 1)]
)
def test_splits_are_bound_to_cores_with_a_cache_alone(fa3, monkeypatch, mesh, given):
    shapes = []

    def splits(name, shape, device, **options):
        shapes.append(shape)
        return 2

    monkeypatch.setattr(warm_up, "kv_splits_of", splits)
    transformer = tiny_transformer(attention_backend="flash_attn_3").setup()
    choice = warm_up.choose_attention(transformer, mesh, CPU)
    assert choice.kv_splits == 2
    assert {shape.num_heads for shape in shapes} == {2}
    for block in transformer.blocks:
        assert splits_of(block.self_attn.core) == 2
        assert splits_of(block.cross_attn.core) == given
    own = tiny_transformer(attention_backend="flash_attn_3").setup()
    own.blocks[0].self_attn.core.backend = sdpa_math
    warm_up.choose_attention(own, mesh, CPU)
    assert own.blocks[0].self_attn.core.backend is sdpa_math
