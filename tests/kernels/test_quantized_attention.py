"""Attention over a past in eight bits against its reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from flashdreams_kernels import attention, quantized_attention, reference
from flashdreams_kernels.launch import Target, target_of
from torch import Tensor

from flashdreams.attention.quantized import DTYPES, quantize
from tests.kernels.guarded import TOLERANCE, Guarded, error

FORMS = ["int8", "fp8"]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``past`` of the ``stored`` slots are read, in random order."""

    queries: int
    own: int
    past: int
    stored: int
    batch: int = 1
    heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    splits: int | None = 1
    visible: int | None = None


CASES = {
    "odd": Case(5, 7, 71, 90, heads=2, head_dim=64),
    "odd, split": Case(35, 33, 75, 75, splits=3),
    "one token": Case(1, 1, 1, 1, head_dim=128),
    "batch, whole blocks": Case(3, 32, 64, 70, batch=2, heads=2, splits=2),
    "more splits than blocks": Case(2, 5, 40, 44, splits=7, visible=33),
    "head dim padded": Case(4, 6, 37, 40, heads=2, head_dim=24, splits=2),
    "no past": Case(3, 40, 0, 0, heads=2, splits=2),
    "nothing visible of the past": Case(3, 5, 9, 9, visible=0),
    "nothing of its own": Case(3, 0, 45, 60, splits=2, visible=41),
    "bf16": Case(4, 9, 66, 70, head_dim=128, dtype=torch.bfloat16, splits=2),
    "fp16": Case(4, 9, 66, 70, head_dim=64, dtype=torch.float16),
    "splits chosen": Case(4, 9, 66, 70, splits=None),
}


def inputs(case: Case, form: str, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.queries + case.stored)

    def normal(tokens: int) -> Tensor:
        size = (case.batch, tokens, case.heads, case.head_dim)
        return torch.randn(size, generator=generator).to(device, case.dtype)

    q, k, v = normal(case.queries), normal(case.own), normal(case.own)
    (past_k, k_exponents), (past_v, v_exponents) = (
        quantize(normal(case.stored), DTYPES[form]) for _ in range(2)
    )
    return {
        "q": q,
        "k": k,
        "v": v,
        "past_k": past_k,
        "past_v": past_v,
        "k_exponents": k_exponents.squeeze(-1),
        "v_exponents": v_exponents.squeeze(-1),
        "slots": torch.randperm(case.stored, generator=generator)[: case.past].to(device),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_reference(name: str, form: str, device: torch.device) -> None:
    case = CASES[name]
    tensors = inputs(case, form, device)
    visible = None if case.visible is None else torch.tensor([case.visible], device=device)
    out, lse = quantized_attention.quantized_attention(
        **tensors, visible=visible, return_lse=True, num_splits=case.splits
    )
    expected, expected_lse = reference.quantized_attention(**tensors, visible=visible)
    assert out.dtype == case.dtype and out.is_contiguous()
    assert error(out, expected) < TOLERANCE[case.dtype]
    assert error(lse, expected_lse) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mistake", ["a slot", "an own key", "a scale", "the order"])
def test_a_mistake_shows(mistake: str, device: torch.device) -> None:
    tensors = inputs(CASES["odd"], "int8", device)
    out = quantized_attention.quantized_attention(**tensors, num_splits=1)
    if mistake == "a slot":
        tensors["slots"] = tensors["slots"][:-1]
    elif mistake == "an own key":
        tensors["k"], tensors["v"] = tensors["k"][:, :-1], tensors["v"][:, :-1]
    elif mistake == "a scale":
        tensors["v_exponents"][:, tensors["slots"][3]] += 1
    else:
        tensors["past_k"] = tensors["past_k"].roll(1, dims=1)
    expected, _ = reference.quantized_attention(**tensors)
    assert error(out, expected) > 100 * TOLERANCE[torch.float32]


def read_one_slot(
    values: Tensor, exponent: int, form: str | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the program makes of one row of values: attention to a single key is its value."""
    head_dim, device = len(values), values.device
    row = values.view(1, 1, 1, head_dim)
    exponents = torch.full((1, 1, 1), exponent, dtype=torch.int8, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    past = quantized_attention.Past(
        torch.zeros_like(row), row, torch.zeros_like(exponents), exponents, slots
    )
    q = torch.ones(1, 1, 1, head_dim, dtype=dtype, device=device)
    own, out = q[:, :0], torch.full_like(q, torch.nan)
    launches = quantized_attention.plan(
        *(q, own, own, past, None, 1.0, out, out.new_empty(0, dtype=torch.float32), 1),
        target_of(device),
    )
    for launch in launches:
        if form is not None and launch.program == "attend":
            launch = replace(launch, constants=launch.constants | {"FORM": form})
        launch.run()
    return out.flatten()


@pytest.mark.parametrize("exponent", [-100, 0, 9])
@pytest.mark.parametrize("form", ["int8", "fp8", "fp8 by bits"])
def test_every_eight_bits_are_widened_exactly(
    form: str, exponent: int, device: torch.device
) -> None:
    bits = torch.arange(-128, 128, device=device).to(torch.int8)
    values = bits if form == "int8" else bits.view(torch.float8_e4m3fn)
    expected = values.float() * 2.0**exponent
    read = read_one_slot(values, exponent, form)
    if form != "fp8" or device.type == "cuda":  # the interpreter itself reads 480 for NaN
        assert torch.equal(read.isnan(), expected.isnan())
    read[expected.isnan()] = torch.nan
    assert torch.equal(read.nan_to_num(), expected.nan_to_num())
    other = bits.view(torch.float8_e4m3fn) if form == "int8" else bits
    assert not torch.equal(read.nan_to_num(), (other.float() * 2.0**exponent).nan_to_num())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exponent", [-29, 10])
def test_both_ends_of_float16_are_kept(form: str, exponent: int, device: torch.device) -> None:
    values = torch.tensor([127.0, -64.0, 32.0, 0.0] * 4, device=device).to(DTYPES[form])
    read = read_one_slot(values, exponent, None, torch.float16)
    limit = torch.finfo(torch.float16).max
    assert torch.equal(read, (values.float() * 2.0**exponent).clamp(-limit, limit).half())
    assert (read != 0).sum() == 12 and read.isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_attention_writes_all_of_its_output_and_reads_only_what_slots_name(
    form: str, splits: int, device: torch.device
) -> None:
    case = replace(CASES["odd, split"], past=60, visible=37)
    tensors = inputs(case, form, device)
    visible = torch.tensor(37, dtype=torch.int32, device=device)
    expected, expected_lse = reference.quantized_attention(**tensors, visible=visible)
    unread = torch.ones(case.stored, dtype=torch.bool, device=device)
    unread[tensors["slots"][:37]] = False
    for name in ("k", "v"):
        stored = tensors[f"past_{name}"].view(torch.int8)
        stored[:, unread] = 0x7F  # not a number in fp8; times the scale infinite in int8
        tensors[f"{name}_exponents"][:, unread] = 127
    own = {name: Guarded.around(tensors[name]) for name in ("q", "k", "v")}
    tensors |= {name: guarded.tensor for name, guarded in own.items()}
    out = Guarded((1, 35, 1, 32), torch.float32, device)
    lse = Guarded((1, 1, 35), torch.float32, device)
    run(tensors, visible, out.tensor, lse.tensor, splits)
    assert error(out.tensor, expected) < TOLERANCE[torch.float32]
    assert error(lse.tensor, expected_lse) < TOLERANCE[torch.float32]
    assert all(guarded.intact() for guarded in (*own.values(), out, lse))
    visible.fill_(38)
    run(tensors, visible, out.tensor, lse.tensor, splits)
    assert not out.tensor.isfinite().all()


def run(
    tensors: dict[str, Tensor], visible: Tensor | None, out: Tensor, lse: Tensor, splits: int
) -> None:
    q, k, v, *past = tensors.values()
    scale, target = q.shape[-1] ** -0.5, target_of(q.device)
    launches = quantized_attention.plan(
        *(q, k, v, quantized_attention.Past(*past), visible, scale, out, lse, splits), target
    )
    for launch in launches:
        launch.run()


@pytest.mark.parametrize("splits", [1, 2])
def test_attention_of_nothing_is_zero(splits: int, device: torch.device) -> None:
    tensors = inputs(Case(3, 0, 40, 40, heads=2), "int8", device)
    out, lse = quantized_attention.quantized_attention(
        **tensors,
        visible=torch.tensor(0, device=device),
        return_lse=True,
        num_splits=splits,
    )
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_attention_follows_slots_and_length_that_change_in_place(device: torch.device) -> None:
    tensors = inputs(Case(3, 4, 70, 90), "int8", device)
    visible = torch.tensor([12], device=device)
    results = []
    for length, shift in ((12, 0), (70, 0), (1000, 0), (70, 5)):
        visible.fill_(length)
        tensors["slots"].add_(shift).remainder_(90)
        results.append(quantized_attention.quantized_attention(**tensors, visible=visible))
        expected, _ = reference.quantized_attention(**tensors, visible=visible)
        assert error(results[-1], expected) < TOLERANCE[torch.float32]
    assert torch.equal(results[1], results[2])
    assert min(error(results[i], results[1]) for i in (0, 3)) > 1e-2


def test_a_slot_outside_of_the_ring_reads_the_nearest_inside(device: torch.device) -> None:
    tensors = inputs(Case(3, 4, 3, 9), "int8", device)
    tensors["slots"] = torch.tensor([-5, 4, 2**40], device=device)
    out = quantized_attention.quantized_attention(**tensors)
    inside = tensors | {"slots": torch.tensor([0, 4, 8], device=device)}
    assert torch.equal(out, quantized_attention.quantized_attention(**inside))


def test_halves_of_the_past_merge_through_their_lse(device: torch.device) -> None:
    tensors = inputs(Case(3, 10, 50, 60, heads=2), "fp8", device)
    slots, none = tensors["slots"], {name: tensors[name][:, :0] for name in ("k", "v")}
    halves = [
        quantized_attention.quantized_attention(**tensors | part, return_lse=True)
        for part in ({"slots": slots[:20]}, {"slots": slots[20:], **none})
    ]
    lse = torch.stack([lse for _, lse in halves])
    weights = torch.softmax(lse, dim=0).transpose(2, 3)[..., None]
    merged = sum(out * weight for (out, _), weight in zip(halves, weights, strict=True))
    expected, expected_lse = reference.quantized_attention(**tensors)
    assert error(merged, expected) < TOLERANCE[torch.float32]
    assert error(torch.logsumexp(lse, 0), expected_lse) < TOLERANCE[torch.float32]
    assert error(halves[0][0], expected) > 1e-2


def test_strict_attention_gives_the_same_bits_for_any_share_of_queries_and_heads(
    device: torch.device,
) -> None:
    tensors = inputs(Case(35, 35, 105, 140, heads=2), "int8", device)
    splits = attention.STRICT_NUM_SPLITS
    whole = quantized_attention.quantized_attention(**tensors, num_splits=splits)
    part = {n: x if n == "slots" else x[:, :, 1:] for n, x in tensors.items()}
    part["q"] = part["q"][:, 20:]
    share = quantized_attention.quantized_attention(**part, num_splits=splits)
    assert torch.equal(whole[:, 20:, 1:], share)
    other = quantized_attention.quantized_attention(**part, num_splits=1)
    assert not torch.equal(share, other)


def test_attention_passes_through_compile(device: torch.device) -> None:
    tensors = inputs(Case(3, 4, 40, 44), "fp8", device)
    q = tensors.pop("q")

    def attend(q: Tensor) -> Tensor:
        return quantized_attention.quantized_attention(2 * q, **tensors, num_splits=1) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(compiled, attend(q))
    assert not torch.equal(compiled, attend(q + 1))


@pytest.mark.parametrize("form", FORMS)
def test_attention_keeps_its_schema(form: str, device: torch.device) -> None:
    tensors = inputs(Case(2, 3, 5, 6), form, device)
    torch.library.opcheck(
        torch.ops.flashdreams.quantized_attention,
        (*tensors.values(), None, 0.5, True, 2),
        # The former multiplies its inputs, which PyTorch cannot do in eight-bit floats.
        test_utils=("test_schema",) * (form == "int8") + ("test_faketensor",),
    )


def test_attention_names_what_does_not_fit(device: torch.device) -> None:
    tensors = inputs(Case(2, 3, 5, 6), "int8", device)
    past, powers = tensors["past_k"], tensors["k_exponents"]
    empty = {n: tensors[n][:, :0] for n in ("past_k", "past_v", "k_exponents", "v_exponents")}
    fits_not: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (ValueError, r"past_k must be \[1, any, 1, 32\], got", {"past_k": past[..., :16]}),
        (TypeError, "past_k is torch.float32; allowed here: torch.int8", {"past_k": past.float()}),
        (TypeError, "past_v is torch.float8", {"past_v": past.view(torch.float8_e4m3fn)}),
        (ValueError, r"past_v must be \[1, 6, 1, 32\]", {"past_v": past[:, 1:]}),
        (ValueError, "strides .* must be equal", {"past_v": past.repeat(1, 1, 2, 1)[:, :, :1]}),
        (ValueError, r"k_exponents must be \[1, 6, 1\]", {"k_exponents": powers[:, 1:]}),
        (TypeError, "v_exponents is torch.int32", {"v_exponents": powers.int()}),
        (TypeError, "slots is torch.float32", {"slots": torch.ones(2, device=device)}),
        (ValueError, r"slots must be \[any\]", {"slots": tensors["slots"][None]}),
        (ValueError, "slots names 5 slots of a ring that has 0", empty),
        (TypeError, "q is torch.int64", {"q": tensors["q"].long()}),
        (ValueError, "q must be", {"q": tensors["q"][0]}),
        (TypeError, "k is torch.float16", {"k": tensors["k"].half()}),
    ]
    for kind, text, changes in fits_not:
        with pytest.raises(kind, match=text):
            quantized_attention.quantized_attention(**tensors | changes)
    with pytest.raises(ValueError, match="num_splits=0"):
        quantized_attention.quantized_attention(**tensors, num_splits=0)


def test_old_gpus_widen_fp8_by_bits(device: torch.device) -> None:
    tensors = inputs(Case(2, 3, 5, 6, dtype=torch.bfloat16), "fp8", device)
    q, k, v, *past = tensors.values()
    rest = (None, 1.0, q, q.new_empty(0, dtype=torch.float32), 1)

    def form(target: Target, cast: torch.dtype) -> str:
        cells = [x.view(cast) if x.dtype == torch.float8_e4m3fn else x for x in past]
        kept = quantized_attention.Past(*cells)
        return quantized_attention.plan(q, k, v, kept, *rest, target)[-1].constants["FORM"]

    fp8 = torch.float8_e4m3fn
    assert [form(Target(c, 100), fp8) for c in (0, 80, 86)] == ["fp8 by bits"] * 3
    assert [form(Target(c, 100), fp8) for c in (89, 90, 100)] == ["fp8"] * 3
    assert form(Target(80, 100), torch.int8) == "int8"
