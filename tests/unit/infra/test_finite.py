"""Values that are not finite: refused at every entrance, found wherever they arise."""

from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdreams.infra.checks import refuse_other_pixels
from flashdreams.infra.config import derive_config
from flashdreams.infra.finite import FiniteCheck, NotFiniteError, _Sums, name_bad_weights
from flashdreams.runtime.noise import NoiseSource
from tests.tiny import TEXT_DIM, tiny_pipeline

NAN, INF = float("nan"), float("inf")


@dataclass
class Control:
    poses: Tensor
    keys: Tensor | None = None


def text(value: float = 0.5) -> Tensor:
    return torch.full((1, 4, TEXT_DIM), value)


@pytest.fixture
def pipeline():
    return tiny_pipeline().setup(device="cpu")


def step(pipeline: Any, cache: Any, index: int) -> Tensor:
    chunk = pipeline.generate(autoregressive_index=index, cache=cache, input=0.0)
    pipeline.finalize(autoregressive_index=index, cache=cache)
    return chunk


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_is_enough(value: float, dtype: torch.dtype) -> None:
    check = FiniteCheck()
    large = torch.full((4, 1000), 60000.0).to(dtype)  # the sum is beyond float16
    check.submit(3, {"encode": None, "diffuse": large, "decode": torch.ones(2, dtype=torch.int64)})
    assert check.read() is None and check.is_settled
    large[2, 7] = value
    check.submit(4, {"encode": Control(torch.ones(2)), "diffuse": [{"x": large}]})
    assert check.read() == "AR step 4: stage 'diffuse' made values that are not finite."
    assert not check.is_settled
    check = FiniteCheck()
    check.submit(5, {"encode": Control(torch.tensor([value])), "diffuse": large})
    assert "stage 'encode'" in (check.read() or ""), "the first stage of the data is named"


def test_a_step_with_nan_ends_its_rollout_and_no_other(pipeline) -> None:
    def noise(index: int, denoising_step: int, shape: Any) -> Tensor:
        drawn = NoiseSource(0)(index, denoising_step, shape)
        return drawn * NAN if index == 1 else drawn

    good = pipeline.initialize_cache(text=text())
    bad = pipeline.initialize_cache(text=text(), noise=noise)
    for index in range(2):
        step(pipeline, good, index)
        step(pipeline, bad, index)  # read one step late: the chunk of step 1 is handed out
    for _ in range(2):  # and it does not go on, however often it is asked
        with pytest.raises(NotFiniteError, match=r"AR step 1: stage 'diffuse'.*All weights are"):
            step(pipeline, bad, 2)
    with pytest.raises(NotFiniteError):
        bad.state_dict()
    assert torch.isfinite(step(pipeline, good, 2)).all()
    pipeline.check_values()


def test_the_last_step_is_asked_about_by_itself(pipeline) -> None:
    cache = pipeline.initialize_cache(text=text())
    step(pipeline, cache, 0)
    pipeline.check_values(cache)
    parameters = dict(pipeline.diffusion_model.transformer.blocks.named_parameters())
    next(p for name, p in parameters.items() if "ffn" in name).data.view(-1)[0] = NAN
    step(pipeline, cache, 1)
    with pytest.raises(NotFiniteError, match=r"AR step 1: .*The weights diffusion_model.*blocks.0"):
        pipeline.check_values()
    pipeline.check_values()  # each is reported once


def test_checks_that_nobody_reads_do_not_pile_up(pipeline) -> None:
    for _ in range(5):
        step(pipeline, pipeline.initialize_cache(text=text()), 0)
    assert len(pipeline._unread) == 1


def test_bad_weights_are_named_and_counted() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(8)))
    assert "All weights are finite" in name_bad_weights(module)
    for layer in module:
        layer.weight.data[0, 0] = INF
    assert "0.weight, 1.weight, 2.weight, 3.weight, 4.weight and 3 more" in name_bad_weights(module)


@pytest.mark.parametrize("entrance", ["text", "negative_text", "update"])
def test_embeddings_that_are_not_finite_are_refused(entrance: str) -> None:
    guided = derive_config(tiny_pipeline(), diffusion_model={"guidance_scale": 2.0})
    pipeline = guided.setup(device="cpu")
    good, bad = text(), text()
    bad[0, 1, 2] = NAN
    given = {"text": good, "negative_text": good}
    with pytest.raises(ValueError, match=f"1 of {bad.numel()} values in .* are NaN or infinite"):
        if entrance == "update":
            pipeline.update_prompt(pipeline.initialize_cache(**given), bad)
        pipeline.initialize_cache(**{**given, entrance: bad})


def test_pixels_of_0_to_255_are_refused_and_the_advice_works() -> None:
    pixels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"from 0 to 255; they must be in \[-1, 1\]") as caught:
        refuse_other_pixels("image", pixels)
    assert "Give pixels.float() / 127.5 - 1 " in str(caught.value)
    refuse_other_pixels("image", pixels.float() / 127.5 - 1)
    refuse_other_pixels("image", pixels.byte())  # for the encoder, which refuses integers
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, -1])
    worst = (signs[:, None] * signs)[None, None]
    scaled = torch.nn.functional.interpolate(worst, (4, 4), mode="bicubic")
    assert 1.8 < scaled.abs().max() < 1.9
    refuse_other_pixels("image", scaled)
    with pytest.raises(ValueError, match="NaN or infinite"):
        refuse_other_pixels("image", torch.full((1, 3, 2, 2), NAN))


class Event:
    """A copy of sums that is on its way."""

    def __init__(self) -> None:
        self.passed, self.waited = False, 0

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waited += not self.passed
        self.passed = True


def submit_on_gpu(check: FiniteCheck, index: int, *values: float) -> Event:
    """An AR step whose sums are copied from a GPU; beside them one from the host."""
    event = Event()
    sums = (torch.tensor(values), event)
    check._waiting.append(_Sums(index, ["encode", "diffuse"], [None, 1.0], sums))  # type: ignore
    return event


def test_on_a_gpu_the_next_step_does_not_wait_for_the_last_one() -> None:
    check = FiniteCheck()
    first = submit_on_gpu(check, 0, 1.0)
    assert check.read(wait=False) is None and not check.is_settled and not first.waited
    second = submit_on_gpu(check, 1, 1.0)
    assert check.read(wait=False) is None
    assert (first.waited, second.waited) == (1, 0), "two steps are outstanding at most"
    second.passed = True
    assert check.is_settled and not second.waited


def test_a_late_sum_is_read_in_the_end_and_stays_wrong() -> None:
    check = FiniteCheck()
    bad = submit_on_gpu(check, 3, NAN)
    assert check.read(wait=False) is None
    submit_on_gpu(check, 4, 1.0)
    for _ in range(2):
        assert check.read(wait=False) == (
            "AR step 3: stage 'encode' made values that are not finite."
        )
    assert bad.waited == 1 and not check.is_settled
    check = FiniteCheck()
    submit_on_gpu(check, 5, INF)
    assert "AR step 5" in (check.read() or ""), "who asks after the last step waits for it"


def test_two_threads_read_one_after_the_other() -> None:
    """While one looks whether a step has arrived, another one takes it out."""
    check = FiniteCheck()
    event = submit_on_gpu(check, 0, 1.0)
    found: list[str | None] = []
    other = Thread(target=lambda: found.append(check.read()))

    def query() -> bool:
        other.start()
        other.join(0.2)  # it has to wait: nothing is taken out behind the first one's back
        return True

    event.query = query  # type: ignore[method-assign]
    assert check.read(wait=False) is None
    other.join()
    assert found == [None] and check.is_settled
