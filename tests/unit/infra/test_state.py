"""The canonical form of a rollout on one rank, through JSON and safetensors (same bits)."""

import json
from dataclasses import dataclass, make_dataclass, replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from flashdreams.infra.state import StateDecoder, StateEncoder, StateError, check_styles
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.parallel import watchdog as watchdog_module
from flashdreams.parallel.environment import LOAD_TIMEOUT_S, Environment
from flashdreams.parallel.mesh import Mesh
from flashdreams.parallel.plan import state
from flashdreams.parallel.state_layout import StateLayout
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


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("cloned", [False, True])
def test_the_form_is_a_copy_and_forks(cloned, steps):
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    advance(pipeline, cache, 0, steps)
    state = cache.state_dict()
    kept = {name: x.clone() for name, x in state["tensors"].items()}
    fork = cache.clone() if cloned else pipeline.load_cache(state)
    pipeline.update_prompt(fork, prompt(7), reencode_window=True)
    other, same = (advance(pipeline, c, steps, steps + 2) for c in (fork, cache))
    assert all(torch.equal(x, state["tensors"][name]) for name, x in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(
        advance(pipeline, pipeline.load_cache(state), steps, steps + 2), same, strict=True
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
    layers = "conditional/caches/blocks.*.self_attn.core"
    first = state["values"]["conditional"]["parts"]["caches"]["parts"]["blocks.*.self_attn.core"]
    assert first["items"][0]["frames"] == [0, 4, 5, 6, 7]
    assert tensors[f"{layers}/0/k"].shape == (1, 5 * 4, 2, 12)
    assert tensors[f"{layers}/1/sink_k"].shape == (1, 4, 2, 12)
    pairs = "conditional/context/pairs/0/0/0"
    assert {pairs, "history/0/latent", "decoder/last"} <= set(tensors)
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
        ({"format": 1}, "format 1"),
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
    angle: float = state("host")
    device: torch.device = state("host")
    matrix: Tensor | None = state("whole", default=None)


@dataclass
class Walk:
    poses: list[Pose] = state("whole", default_factory=list)
    keys: tuple[str, ...] = state("host", default=())


@dataclass
class Undeclared:
    walk: Walk
    last: Tensor


def codec(tensors):
    layout = StateLayout(Mesh(), CPU)

    def emit(path, part):
        tensors[path] = part.read().contiguous()

    return StateEncoder(layout, emit), StateDecoder(layout, lambda path, *_: tensors[path])


def test_containers_and_dataclasses_come_back():
    tensors = {}
    frames = torch.randn(1, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    value = {"walk": Walk([Pose(0.5, CPU, torch.eye(2)), Pose(1.5, CPU)], ("w", "a")), "x": frames}
    encoder, decoder = codec(tensors)
    encoded = json.loads(json.dumps(encoder.encode(value, "encoder", "whole")))
    back = decoder.restore(encoded, "encoder", None, dict[str, Walk])
    assert back["walk"].keys == ("w", "a") and back["walk"].poses[1] == Pose(1.5, CPU)
    assert torch.equal(back["walk"].poses[0].matrix, torch.eye(2))
    assert torch.equal(back["x"], frames) and back["x"].stride() == frames.stride()
    with pytest.raises(ValueError, match="encoder/walk: no object here to load these fields into"):
        decoder.restore(encoded, "encoder")


@pytest.mark.parametrize("config", [TAEHVDecoderConfig(), WanVAEDecoderConfig(dim=4)])
def test_the_frames_that_a_decoder_carries_come_back(config):
    torch.manual_seed(0)
    decoder, tensors = config.setup(), {}
    first, second = torch.randn(2, 1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    carried, fresh = decoder.initialize_cache(), decoder.initialize_cache()
    decoder(first, 0, carried)
    encoder, restorer = codec(tensors)
    encoded = json.loads(json.dumps(encoder.encode(carried, "decoder", "whole")))
    tensors |= load(save(tensors))
    resumed = restorer.restore(encoded, "decoder", fresh)
    expected = decoder(second, 1, carried)
    assert torch.equal(decoder(second, 1, resumed), expected)
    tensors[max(tensors)] = torch.zeros_like(tensors[max(tensors)])  # negative control
    forgetful = restorer.restore(encoded, "decoder", decoder.initialize_cache())
    assert not torch.equal(decoder(second, 1, forgetful), expected)


def test_no_class_name_is_stored():
    encoder, _ = codec({})
    assert "Walk" not in json.dumps(encoder.encode(Walk([Pose(0.5, CPU)]), "encoder", "whole"))


def test_what_has_no_plain_form_is_named():
    encoder, _ = codec({})
    with pytest.raises(StateError, match=r"encoder/0: a set has no plain form"):
        encoder.encode([{1}], "encoder", "whole")


def test_a_field_without_a_style_is_named_with_what_to_write():
    encoder, _ = codec({})
    with pytest.raises(
        StateError, match=r'Undeclared\.last \(a Tensor\).*last: \.\.\. = state\("whole"\)'
    ):
        encoder.encode(Undeclared(Walk(), torch.zeros(1)), "transformer", None)
    with pytest.raises(StateError, match=r"last: a Tensor as state does not say"):
        encoder.encode({"last": torch.zeros(1)}, "transformer", None)


@pytest.mark.parametrize(
    ("style", "value", "message"),
    [
        ("host", torch.zeros(1), 'declares the style "host" and holds a tensor'),
        ("heads", torch.zeros(2, 3), r"\[2, 3\]; heads are dim 2"),
        ("cache", torch.zeros(1), "KV caches, and only they, have the style"),
    ],
)
def test_a_style_that_does_not_fit_its_field_is_refused(style, value, message):
    made = make_dataclass("Made", [("part", object, state(style))])
    with pytest.raises(StateError, match=message):
        check_styles(made([{"x": value}]), "transformer")
    check_styles(made(None), "transformer")


def test_an_unknown_style_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match=r"style 'head' is unknown; allowed: 'whole', 'heads'"):
        state("head")


def legacy(pipeline, **rollout):
    """The pipeline with a plan of the deprecated kind beside state without styles."""
    transformer = pipeline.diffusion_model.transformer
    plan = replace(transformer.parallel_plan(), rollout=rollout)
    transformer.parallel_plan = lambda: plan
    return pipeline


def test_a_deprecated_plan_is_read_and_warned_about():
    pipeline = legacy(tiny_pipeline().setup(device="cpu"), modulations="rebuilt")
    with pytest.warns(DeprecationWarning, match=r"ParallelPlan\.rollout will be removed in 0\.3"):
        pipeline.initialize_cache(text=prompt(0))


def test_a_misspelt_key_of_a_deprecated_plan_is_an_error():
    pipeline = legacy(tiny_pipeline().setup(device="cpu"), contxt="heads")
    with pytest.raises(ValueError, match=r"names 'contxt'.*CausalState.*Did you mean 'context'"):
        pipeline.initialize_cache(text=prompt(0))


def test_a_clone_under_another_noise_leaves_its_source():
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0), seed=5)
    advance(pipeline, cache, 0, 2)
    fork = cache.clone(noise=NoiseSource(6))
    assert not torch.equal(advance(pipeline, fork, 2, 3)[0], advance(pipeline, cache, 2, 3)[0])


def test_there_is_no_clone_between_generate_and_finalize():
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    pipeline.generate(0, cache, 0.0)
    with pytest.raises(ValueError, match=r"no clone between generate and finalize"):
        cache.clone()


def test_differences_of_the_numerics_are_logged(caplog):
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0))
    saved = cache.state_dict()
    with caplog.at_level("INFO"):
        pipeline.load_cache(saved)
    assert not caplog.records
    saved["values"]["fingerprint"]["torch"] = "2.0"
    with caplog.at_level("INFO"):
        pipeline.load_cache(saved)
    assert [r.message for r in caplog.records] == [
        "The loaded rollout may continue with other bits: "
        f"torch: 2.0 there, {torch.__version__} here."
    ]


@pytest.mark.parametrize("limit_s", [0.3, LOAD_TIMEOUT_S])
@pytest.mark.parametrize(
    ("module", "work", "name"),
    [
        ("saved_rollouts", "collect_parts", "export of AR step 2"),
        ("saved_rollouts", "values_of", "import"),
        ("conditioning.ContextEncoder", "encode", "initialize"),
        ("conditioning.ContextEncoder", "encode_text", "update_prompt of AR step 2"),
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

    def slow(*_: object, **__: object) -> None:
        clock.move(0.7)
        raise InterruptedError

    monkeypatch.setattr(f"flashdreams.infra.{module}.{work}", slow)
    for owner in ("pipeline", "saved_rollouts"):
        monkeypatch.setattr(f"flashdreams.infra.{owner}.LOAD_TIMEOUT_S", limit_s)
    reports = []
    calls = {
        "collect_parts": cache.state_dict,
        "values_of": lambda: pipeline.load_cache({}),
        "encode": lambda: pipeline.initialize_cache(text=prompt(0)),
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
