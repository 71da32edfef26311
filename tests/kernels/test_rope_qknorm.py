"""Fused norm, rotation and cache write against their reference and the engine's modules."""

import pytest
import torch
from flashdreams_kernels import reference, rope_qknorm
from torch import Tensor

from flashdreams.attention.rope import RotaryEmbedding3D, apply_rope
from flashdreams.models.wan.blocks import RMSNorm
from tests.kernels.guarded import TOLERANCE, Guarded, error

EPS = 1e-6


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    _, length, heads, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    table = RotaryEmbedding3D(head_dim)(torch.arange(length) + 17, 1, 1, device)
    width = heads * head_dim
    return {
        "q": normal(*shape),
        "k": normal(*shape),
        "q_weight": normal(width),
        "k_weight": normal(width),
        "table": table,
    }


@pytest.mark.parametrize(
    "shape,dtype",
    [
        ((2, 5, 3, 32), torch.float32),
        ((1, 1, 1, 128), torch.float32),
        ((1, 3, 2, 24), torch.float32),
        ((1, 3, 5, 64), torch.bfloat16),
        ((1, 3, 2, 128), torch.float16),
    ],
)
def test_norm_and_rotation_equal_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    tensors = inputs(shape, dtype, device)
    results = rope_qknorm.qk_norm_rope(**tensors, eps=EPS)
    expected = reference.qk_norm_rope(**tensors, eps=EPS)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == dtype and result.is_contiguous()
        assert error(result, wanted) < TOLERANCE[dtype]
    assert error(results[0], expected[1]) > 0.1


def test_reference_equals_the_modules_of_the_engine(device: torch.device) -> None:
    tensors = inputs((2, 5, 3, 32), torch.bfloat16, device)
    norm = RMSNorm(96, EPS).to(device, torch.bfloat16)
    norm.weight.data.copy_(tensors["q_weight"])
    normed = norm(tensors["q"].flatten(2)).unflatten(-1, (3, 32))
    expected = apply_rope(normed, tensors["table"])
    result, _ = reference.qk_norm_rope(**tensors, eps=EPS)
    assert torch.equal(result, expected)
    assert not torch.equal(result, normed)


def test_one_rotation_serves_all_tokens(device: torch.device) -> None:
    tensors = inputs((1, 4, 2, 32), torch.float32, device)
    tensors["table"] = tensors["table"][2:3]
    result, _ = rope_qknorm.qk_norm_rope(**tensors, eps=EPS)
    assert error(result, reference.qk_norm_rope(**tensors, eps=EPS)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_fused_write_equals_norm_rotation_and_write(
    index_type: torch.dtype, device: torch.device
) -> None:
    shape = (2, 4, 3, 32)
    tensors = inputs(shape, torch.float32, device)
    v = tensors["q"].flip(0)
    slots = torch.tensor([5, 0, -1, 2], dtype=index_type, device=device)
    caches = [Guarded((2, 6, 3, 32), torch.float32, device) for _ in range(2)]
    expected = [guarded.tensor.clone() for guarded in caches]
    k_cache, v_cache = (guarded.tensor for guarded in caches)
    result = rope_qknorm.qk_norm_rope_write(
        **tensors, v=v, eps=EPS, k_cache=k_cache, v_cache=v_cache, slots=slots
    )
    q, k, *norm = tensors.values()
    wanted = reference.qk_norm_rope_write(q, k, v, *norm, EPS, *expected, slots.long())
    assert error(result, wanted) < TOLERANCE[torch.float32]
    written = [5, 0, 2]
    assert error(k_cache[:, written], expected[0][:, written]) < TOLERANCE[torch.float32]
    assert torch.equal(v_cache[:, written], expected[1][:, written])
    for guarded in caches:
        assert guarded.tensor[:, [1, 3, 4]].isnan().all() and guarded.intact()
    assert error(k_cache[:, [0, 5, 2]], expected[0][:, written]) > 0.1


def test_norm_and_rotation_write_all_of_their_output_and_nothing_else(
    device: torch.device,
) -> None:
    tensors = inputs((1, 3, 3, 24), torch.float32, device)
    expected = reference.qk_norm_rope(**tensors, eps=EPS)
    reads = {name: Guarded.around(tensor) for name, tensor in tensors.items()}
    q, k, q_weight, k_weight, table = (guarded.tensor for guarded in reads.values())
    writes = [Guarded((1, 3, 3, 24), torch.float32, device) for _ in range(2)]
    q_out, k_out = (guarded.tensor for guarded in writes)
    rope_qknorm.plan((q, k, k), (q_out, k_out, k_out), q_weight, k_weight, table, EPS, None).run()
    for guarded, wanted in zip(writes, expected, strict=True):
        assert error(guarded.tensor, wanted) < TOLERANCE[torch.float32]
    assert all(guarded.intact() for guarded in (*reads.values(), *writes))


def test_norm_and_rotation_take_views_as_they_are(device: torch.device) -> None:
    tensors = inputs((1, 3, 2, 32), torch.float32, device)
    fused = torch.cat([tensors["q"], tensors["k"], tensors["q"]], dim=2)
    views = tensors | {"q": fused[:, :, 0:2], "k": fused[:, :, 2:4]}
    for view, plain in zip(
        rope_qknorm.qk_norm_rope(**views, eps=EPS),
        rope_qknorm.qk_norm_rope(**tensors, eps=EPS),
        strict=True,
    ):
        assert torch.equal(view, plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fused_write_passes_through_compile(backend: str, device: torch.device) -> None:
    tensors = inputs((1, 2, 1, 16), torch.float32, device)
    slots = torch.tensor([3, 1], device=device)

    def write(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        v = tensors["k"] + 1
        return rope_qknorm.qk_norm_rope_write(
            **tensors, v=v, eps=EPS, k_cache=k_cache, v_cache=v_cache, slots=slots
        )

    eager, compiled = torch.zeros(2, 2, 1, 4, 1, 16, device=device)
    expected = write(eager[0], eager[1])
    result = torch.compile(write, fullgraph=True, backend=backend)(compiled[0], compiled[1])
    assert torch.equal(result, expected) and torch.equal(compiled, eager)
    assert compiled.ne(0).any()


def test_norm_and_rotation_keep_their_schema(device: torch.device) -> None:
    tensors = inputs((1, 2, 1, 16), torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.flashdreams.qk_norm_rope, (*tensors.values(), EPS), test_utils=checks
    )
    q, k, q_weight, k_weight, table = tensors.values()
    k_cache, v_cache = torch.zeros(4, 1, 16, device=device), torch.zeros(4, 1, 16, device=device)
    slots = torch.tensor([3, 1], device=device)
    torch.library.opcheck(
        torch.ops.flashdreams.qk_norm_rope_write,
        (q, k, k, q_weight, k_weight, table, EPS, k_cache[None], v_cache[None], slots),
        test_utils=checks,
    )


def test_norm_and_rotation_name_what_does_not_fit(device: torch.device) -> None:
    tensors = inputs((1, 4, 2, 16), torch.float32, device)
    wrong = {
        r"q_weight must be \[32\], got \[31\]": {"q_weight": tensors["q_weight"][1:]},
        r"table must be \[4, 8, 2\], got \[3, 8, 2\]": {"table": tensors["table"][1:]},
        r"k must be \[1, 4, 2, 16\]": {"k": tensors["k"][:, 1:]},
        "head_dim=15 must be even": {"q": tensors["q"][..., 1:]},
    }
    for text, change in wrong.items():
        with pytest.raises(ValueError, match=text):
            rope_qknorm.qk_norm_rope(**(tensors | change), eps=EPS)
    with pytest.raises(TypeError, match=r"q_weight is torch\.float16; allowed here"):
        half = {"q_weight": tensors["q_weight"].half()}
        rope_qknorm.qk_norm_rope(**(tensors | half), eps=EPS)
