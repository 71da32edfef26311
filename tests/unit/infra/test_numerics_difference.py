"""A rollout that goes on under other numerics: how far its last chunk is from the saved one."""

import re

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.recompute import numerics_difference
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_snapshot import begin
from tests.unit.infra.test_state import advance, prompt

CASES = {
    "plain": {},
    "relative": dict(relative_rope=True),
    "int8": dict(kv_cache_dtype="int8", relative_rope=True),
    "fp8": dict(precision="fp8", dim=128, num_heads=2, relative_rope=True),
    "guided": {},
}


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("case", CASES)
def test_equal_numerics_compute_the_bits_that_are_cached_and_change_none(case, steps):
    config = tiny_pipeline(**CASES[case])
    if case == "guided":
        config = derive_config(config, diffusion_model=dict(guidance_scale=2.0))
    pipeline, cache = begin(config, steps)
    untouched = cache.clone()
    assert numerics_difference(pipeline.diffusion_model, cache.diffusion) == 0.0
    for a, b in zip(
        advance(pipeline, cache, steps, steps + 3),
        advance(pipeline, untouched, steps, steps + 3),
        strict=True,
    ):
        assert torch.equal(a, b)
    layer = cache.diffusion.conditional.caches["blocks.*.self_attn.core"][1]
    layer.k[:] = 1.25 * layer.k[:, :]  # negative control
    assert numerics_difference(pipeline.diffusion_model, cache.diffusion) > 1e-4


def said(caplog, pipeline, folder):
    caplog.clear()
    with caplog.at_level("INFO"):
        cache = pipeline.resume(folder)
    found = re.findall(r"keys and values is (\S+) of the largest", caplog.text)
    return cache, [float(x) for x in found]


BF16 = dict(dtype="bfloat16")
WIDE = dict(dtype="bfloat16", residual_dtype="float32")


def test_a_resume_under_other_numerics_says_the_largest_difference(tmp_path, caplog):
    pipeline, cache = begin(tiny_pipeline(**BF16), 4)
    pipeline.save(cache, tmp_path / "s")
    assert said(caplog, tiny_pipeline(**BF16).setup(device="cpu"), tmp_path / "s")[1] == []
    other = tiny_pipeline(**WIDE).setup(device="cpu")
    again, (found,) = said(caplog, other, tmp_path / "s")
    assert 1e-4 < found < 0.05
    assert "residual_dtype: None there, float32 here" in caplog.text
    kept = other.resume(tmp_path / "s")
    assert torch.equal(advance(other, again, 4, 5)[0], advance(other, kept, 4, 5)[0])


def test_what_a_change_of_the_prompt_does_is_not_called_numerics(tmp_path, caplog):
    pipeline, cache = begin(tiny_pipeline(**BF16), 4)
    pipeline.update_prompt(cache, prompt(9))
    pipeline.save(cache, tmp_path / "s")
    expected = advance(pipeline, cache, 4, 5)[0]
    pipeline.save(cache, tmp_path / "later")
    same = tiny_pipeline(**BF16).setup(device="cpu")
    assert torch.equal(advance(same, same.resume(tmp_path / "s"), 4, 5)[0], expected)
    other = tiny_pipeline(**WIDE).setup(device="cpu")
    assert said(caplog, other, tmp_path / "s")[1] == []
    assert len(said(caplog, other, tmp_path / "later")[1]) == 1
