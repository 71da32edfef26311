"""The canonical form of a rollout on one rank, through JSON and safetensors (same bits)."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.state import StateCodec, known_classes
from flashdreams.parallel import watchdog as watchdog_module
from flashdreams.parallel.environment import LOAD_TIMEOUT_S, Environment
from flashdreams.parallel.watchdog import Watchdog
from flashdreams.runtime.noise import NoiseSource
from tests.clock import Clock
from tests.tiny import TEXT_DIM, tiny_pipeline

CPU = torch.device("cpu")
ALONE = Environment(0, 0, 1, CPU)


def prompt(number):
    return torch.randn(1, 3, TEXT_DIM, generator=torch.Generator().manual_seed(number))


def advance(pipeline, cache, first, last):
    chunks = []
    for index in range(first, last):
        chunks.append(pipeline.generate(index, cache, 0.1 * index))
        pipeline.finalize(index, cache)
    return chunks


def through_files(state):
    values = json.loads(json.dumps({"format": state["format"], "values": state["values"]}))
    return {**values, "tensors": load(save(state["tensors"]))}


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_a_rollout_goes_on_from_files(steps, guidance_scale):
    config = tiny_pipeline(relative_rope=True, sink_size_t=2, window_size_t=3)
    config = derive_config(config, diffusion_model=dict(guidance_scale=guidance_scale))
    pipeline = config.setup(device="cpu")
    negative = None if guidance_scale is None else prompt(1)
    cache = pipeline.initialize_cache(text=prompt(0), negative_text=negative, seed=5, offset=0.5)
    advance(pipeline, cache, 0, steps)
    state = through_files(cache.state_dict())
    again = config.setup(device="cpu").load_cache(state)
    for a, b in zip(
        advance(pipeline, cache, steps, steps + 3),
        advance(again.pipeline, again, steps, steps + 3),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_form_is_a_copy_and_forks():
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    advance(pipeline, cache, 0, 2)
    state = cache.state_dict()
    kept = {name: x.clone() for name, x in state["tensors"].items()}
    fork = pipeline.load_cache(state)
    pipeline.update_prompt(fork, prompt(7), reencode_window=True)
    other, same = advance(pipeline, fork, 2, 4), advance(pipeline, cache, 2, 4)
    assert all(torch.equal(x, state["tensors"][name]) for name, x in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(
        advance(pipeline, pipeline.load_cache(state), 2, 4), same, strict=True
    ))  # fmt: skip
    assert not torch.equal(other[1], same[1])


def test_the_form_holds_what_was_promised():
    pipeline = tiny_pipeline(sink_size_t=1, relative_rope=True, window_size_t=4)
    cache = (pipeline := pipeline.setup(device="cpu")).initialize_cache(text=prompt(0), seed=8)
    advance(pipeline, cache, 0, 4)
    state = cache.state_dict()
    assert state["values"]["seed"] == 8 and state["values"]["next_index"] == 4
    tensors = state["tensors"]
    assert torch.equal(tensors["context/text"], prompt(0))
    assert tensors["conditional/self_attention/0/frames"].tolist() == [0, 4, 5, 6, 7]
    assert tensors["conditional/self_attention/0/k"].shape == (1, 5 * 4, 2, 12)
    assert tensors["conditional/self_attention/1/sink_k"].shape == (1, 4, 2, 12)
    assert {"conditional/cross_attention/0/0/0", "history/0/latent", "decoder/last"} <= set(tensors)
    assert not any("rope" in name for name in tensors)


def test_a_rollout_has_no_form_between_generate_and_finalize():
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    pipeline.generate(0, cache, 0.0)
    with pytest.raises(ValueError, match=r"finalize\(autoregressive_index=0, cache=cache\) first"):
        cache.state_dict()


def test_a_noise_callable_must_be_given_again():
    pipeline = tiny_pipeline().setup(device="cpu")

    def noise(index, step, shape):
        return NoiseSource(4)(index, step, shape)

    cache = pipeline.initialize_cache(text=prompt(0), noise=noise)
    advance(pipeline, cache, 0, 1)
    state = cache.state_dict()
    with pytest.raises(ValueError, match=r"noise=\.\.\."):
        pipeline.load_cache(state)
    again = pipeline.load_cache(state, noise=noise)
    assert torch.equal(advance(pipeline, again, 1, 2)[0], advance(pipeline, cache, 1, 2)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"values": None}, "state of a rollout"),
        ({"name": "other"}, "'other'; this pipeline is 'tiny'"),
        ({"window": 4}, "sink_size_t=1 and window_size_t=4 hold"),
    ],
)
def test_another_rollout_is_refused(change, message):
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    advance(pipeline, cache, 0, 4)
    state = cache.state_dict()
    if "window" in change:
        pipeline = tiny_pipeline(window_size_t=change["window"]).setup(device="cpu")
    elif "name" in change:
        state["values"]["name"] = change["name"]
    elif "values" in change:
        del state["values"]
    else:
        state |= change
    with pytest.raises(ValueError, match=message):
        pipeline.load_cache(state)


@dataclass(frozen=True)
class Pose:
    angle: float
    device: torch.device
    matrix: Tensor | None = None


@dataclass
class Walk:
    poses: list[Pose] = field(default_factory=list)
    keys: tuple[str, ...] = ()


def initialize_cache(offset: float = 0.0) -> dict[str, Walk | Tensor]:
    return {}


def test_containers_and_dataclasses_come_back():
    tensors = {}
    frames = torch.randn(1, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    value = {"walk": Walk([Pose(0.5, CPU, torch.eye(2)), Pose(1.5, CPU)], ("w", "a")), "x": frames}

    def emit(path, x):
        tensors[path] = x.contiguous()
        return x

    encoded = json.loads(json.dumps(StateCodec(CPU).encode(value, "encoder", emit)))
    codec = StateCodec(CPU, known_classes(initialize_cache))
    back = codec.restore(encoded, "encoder", lambda path, shape, dtype: tensors[path])
    assert back["walk"].keys == ("w", "a") and back["walk"].poses[1] == Pose(1.5, CPU)
    assert torch.equal(back["walk"].poses[0].matrix, torch.eye(2))
    assert torch.equal(back["x"], frames) and back["x"].stride() == frames.stride()
    with pytest.raises(ValueError, match="no known class 'Pose'"):
        StateCodec(CPU).restore(encoded, "encoder", lambda path, shape, dtype: tensors[path])


def test_what_has_no_plain_form_is_named():
    with pytest.raises(TypeError, match=r"encoder/0: a set has no plain form"):
        StateCodec(CPU).encode([{1}], "encoder", lambda path, x: x)


@pytest.mark.parametrize("limit_s", [0.3, LOAD_TIMEOUT_S])
@pytest.mark.parametrize(
    ("module", "work", "name"),
    [
        ("rollout", "export_rollout", "export of AR step 2"),
        ("pipeline", "import_rollout", "import"),
        ("pipeline", "encode_context", "initialize"),
        ("pipeline", "encode_text", "update_prompt of AR step 2"),
    ],
)
def test_moving_or_conditioning_a_rollout_has_a_long_deadline(
    module, work, name, limit_s, monkeypatch
):
    """Longer than a step's, and it counts."""
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    advance(pipeline, cache, 0, 2)

    clock = Clock(monkeypatch, watchdog_module)

    def slow(*_: object) -> None:
        clock.move(0.7)
        raise InterruptedError

    monkeypatch.setattr(f"flashdreams.infra.{module}.{work}", slow)
    monkeypatch.setattr(f"flashdreams.infra.{module}.LOAD_TIMEOUT_S", limit_s)
    reports = []
    calls = {
        "export_rollout": cache.state_dict,
        "import_rollout": lambda: pipeline.load_cache({}),
        "encode_context": lambda: pipeline.initialize_cache(text=prompt(0)),
        "encode_text": lambda: pipeline.update_prompt(cache, prompt(1)),
    }
    with (
        clock.led(Watchdog(ALONE, deadline_s=0.1, end=reports.append)) as watchdog,
        pytest.raises(InterruptedError),
    ):
        pipeline.guard = watchdog.stage
        calls[work]()
    assert len(reports) == (limit_s < 1)
    assert all(f"rank 0: {name}, for 0.7 s" in report for report in reports)
