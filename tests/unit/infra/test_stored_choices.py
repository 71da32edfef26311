"""Choices of an earlier run: used again where they can be, and named where they cannot."""

import json

import pytest
import torch

from flashdreams.attention import backends
from flashdreams.attention.choose import AttentionShape, kv_splits_of
from flashdreams.infra import warm_up
from flashdreams.infra.config import derive_config
from flashdreams.infra.session import Session
from flashdreams.infra.stored_choices import StoredAttention, read_choices
from flashdreams.models.wan import fused
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from tests.tiny import tiny_pipeline, tiny_transformer
from tests.unit.infra.test_attention_choice import cores
from tests.unit.infra.test_state import prompt

SDPA_MATH = {"attention_backend": "sdpa_math"}


def unloaded(**transformer):
    return tiny_pipeline(**transformer).setup(device="cpu", load=False)


def backend_after(pipeline, stored):
    lines = pipeline.apply_choices(stored)
    pipeline.load()
    pipeline.warm_up()
    return pipeline.fingerprint()["attention_backend"], lines


def test_the_attention_backend_is_used_again():
    pipeline = unloaded()
    assert backend_after(pipeline, SDPA_MATH) == ("sdpa_math", [])
    assert all(core.backend is backends.sdpa_math for core in cores(pipeline.diffusion_model))
    assert backend_after(unloaded(), {}) == ("sdpa", [])  # negative control: the choice of a CPU


def test_nothing_is_measured_where_a_choice_is_stored(monkeypatch):
    def measure(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(warm_up, "choose_backend", measure)
    transformer, device = tiny_transformer().setup(), torch.device("cuda")
    stored = StoredAttention("sdpa_math")
    assert warm_up.choose_attention(transformer, Mesh(), device, stored).name == "sdpa_math"
    with pytest.raises(AssertionError, match="measured"):
        warm_up.choose_attention(transformer, Mesh(), device)


@pytest.mark.parametrize(
    ("name", "transformer", "reason"),
    [
        ("sdpa_math", {"attention_backend": "sdpa"}, "the config sets sdpa"),
        ("sdpa_cudnn", {}, "needs a CUDA device, not cpu"),
        ("from_the_future", {}, "no backend of this release"),
    ],
)
def test_a_backend_that_cannot_be_used_is_named_with_the_reason(name, transformer, reason):
    found, lines = backend_after(unloaded(**transformer), {"attention_backend": name})
    assert found == "sdpa" and len(lines) == 1
    assert lines[0].startswith(f"attention_backend {name} is not used: ") and reason in lines[0]


@pytest.mark.parametrize("stored", [None, 7, ["sdpa"], {"a": 1}])
def test_a_name_that_is_no_text_is_passed_over(stored):
    assert backend_after(unloaded(), {"attention_backend": stored}) == ("sdpa", [])


def test_strict_ranks_choose_by_their_own_rule():
    pipeline = unloaded()
    pipeline.parallelize(Mesh(config=ParallelConfig(strict=True)))
    assert "strict ranks" in pipeline.apply_choices(SDPA_MATH)[0]


def test_after_warm_up_it_is_too_late():
    pipeline = tiny_pipeline().setup(device="cpu")
    pipeline.warm_up()
    lines = pipeline.apply_choices({**SDPA_MATH, "fused_kernels": True})
    assert lines == [
        "fused_kernels True is not used: the pipeline has been loaded already with False",
        "attention_backend sdpa_math is not used: the pipeline has been warmed up already "
        "with sdpa",
    ]
    assert pipeline.apply_choices(pipeline.fingerprint()) == []


def test_kv_splits_are_those_of_the_processors_they_were_chosen_for():
    shape = AttentionShape(batch_size=1, queries=4680, keys=32760, num_heads=12, head_dim=128)
    cpu = torch.device("cpu")
    splits = [kv_splits_of("flash_attn_3", shape, cpu, processors=n) for n in (None, 108, 132)]
    assert splits == [1, 2, 2]  # a CPU has one processor
    pipeline = unloaded()
    pipeline.apply_choices({**SDPA_MATH, "attention_processors": 132})
    assert pipeline._stored_attention == StoredAttention("sdpa_math", 132)


def test_fused_kernels_are_used_again_only_where_they_run(monkeypatch):
    pipeline = unloaded()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "is not used: " in pipeline.apply_choices({"fused_kernels": True})[0]
    assert pipeline.fingerprint()["fused_kernels"] is False
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pipeline.apply_choices({"fused_kernels": True}) == []
    pipeline.load()
    block = pipeline.diffusion_model.transformer.blocks[0]
    assert block.gated_sum is fused.gated_sum
    assert pipeline.fingerprint()["fused_kernels"] is True
    asked = unloaded(fused_kernels=False)
    assert "the config sets False" in asked.apply_choices({"fused_kernels": True})[0]


def test_a_loaded_rollout_says_which_choices_are_not_used(tmp_path, caplog):
    config = tiny_pipeline(attention_backend="sdpa_math")
    session = Session(pipeline := config.setup(device="cpu"), {"text": prompt(0)}, seed=3)
    pipeline.warm_up()
    pipeline.save(session.cache, tmp_path / "saved")
    other = tiny_pipeline().setup(device="cpu")
    with caplog.at_level("INFO"):
        other.resume(tmp_path / "saved")
    assert "attention_backend" in caplog.text  # it is used at the warm-up that follows
    other.warm_up()
    assert other.fingerprint()["attention_backend"] == "sdpa_math"
    late = derive_config(config, diffusion_model={"transformer": {"attention_backend": "sdpa"}})
    caplog.clear()
    with caplog.at_level("INFO"):
        late.setup(device="cpu").resume(tmp_path / "saved")
    assert caplog.text.count("attention_backend") == 1
    assert "the config sets sdpa" in caplog.text


def test_choices_are_read_from_logs_and_snapshots(tmp_path):
    session = Session(tiny_pipeline().setup(device="cpu"), {"text": prompt(0)}, seed=3)
    session.pipeline.save(session.cache, tmp_path / "saved")
    assert read_choices(tmp_path / "saved") == session.pipeline.fingerprint()
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"fingerprint": SDPA_MATH}) + '\n{"step"')
    assert read_choices(log) == SDPA_MATH


@pytest.mark.parametrize("text", ["", "{}\n", '{"fingerprint": 3}\n', "[" * 5000, "\x00\n"])
def test_a_file_without_choices_is_refused(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"--numerics-from .*neither a log"):
        read_choices(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_choices(tmp_path / "absent")
