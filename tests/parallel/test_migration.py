"""A rollout that continues on another number of ranks: 1, 2, 4, 1 (float32 1e-5; strict: bits)."""

from pathlib import Path

import pytest
import torch

from flashdreams.infra.state import StateError
from flashdreams.integrations.toy_world import config
from flashdreams.parallel.environment import (
    OtherRankError,
    RankZeroError,
    broadcast_from_rank_zero,
)
from tests.harness import RankError, run_ranks
from tests.parallel.pipelines import begin, build_pipeline, moved, moved_by_files, roll, stayed
from tests.parallel.rollout import relative_error

HAS_WEIGHTS = (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists()


def slowly(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("by_files", [False, True])
@pytest.mark.parametrize(
    "case", ["plain", *slowly("relative_rope", "guided", "split_decode", "rotate", "tensor")]
)
def test_a_rollout_goes_on_with_the_frames_of_the_run_that_never_moved(case, by_files, tmp_path):
    found = moved_by_files(case, tmp_path) if by_files else moved(case)
    for a, b in zip(found, stayed(case), strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("by_files", [False, True])
@pytest.mark.parametrize("case", ["relative_rope", *slowly("guided")])
def test_a_strict_rollout_goes_on_with_the_same_bits(case, by_files, tmp_path):
    found = moved_by_files(case, tmp_path, True) if by_files else moved(case, True)
    for a, b in zip(found, stayed(case, strict=True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WEIGHTS, reason="needs the toy world's weights")
def test_the_toy_world_goes_on_with_the_same_bits():
    for a, b in zip(moved("toy_world", True), stayed("toy_world", True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("switch_at", [3, 4])
def test_a_prompt_switch_moves_with_the_rollout(switch_at):
    """At step 4 the move itself comes first, so the window is encoded again from its latents."""
    expected = stayed("plain", False, switch_at)
    for a, b in zip(moved("plain", False, switch_at), expected, strict=True):
        assert relative_error(a, b) <= 1e-5
    assert relative_error(expected[0], stayed("plain")[0]) > 1e-3


@pytest.mark.parametrize(
    "lost",
    [
        "conditional/caches/blocks.*.self_attn.core/1/k",
        *slowly("conditional/context/pairs/0/0/1", "decoder/last"),
    ],
)
def test_what_gets_lost_is_seen(lost):
    """Negative control: each part of the state counts."""
    latents, frames = moved("plain", lose=lost)
    seen = frames if lost.startswith("decoder") else latents
    expected = stayed("plain")[1 if lost.startswith("decoder") else 0]
    assert relative_error(seen, expected) > 1e-3


def reports_of(case, world_size):
    _, reports = build_pipeline(case, world_size)
    return {name: report.installed for name, report in reports.items()}


@pytest.mark.slow
def test_the_cases_are_cut_as_their_names_say():
    assert "halo convolution" in run_ranks(reports_of, 2, "split_decode", 2)[0]["decoder"]
    assert "RingAttention" in run_ranks(reports_of, 2, "rotate", 2)[0]["transformer"]
    assert "sliced layer" in run_ranks(reports_of, 2, "tensor", 2)[0]["transformer"]


def load_nothing():
    pipeline, _ = build_pipeline("plain", 2)
    pipeline.load_cache({"values": {}})


def test_every_rank_stops_if_rank_zero_has_no_state():
    with pytest.raises(RankError, match=r"state of a rollout|Rank zero failed"):
        run_ranks(load_nothing, 2)


def load_misfit(state, window_size_t):
    transformer = {"window_size_t": window_size_t}
    pipeline, _ = build_pipeline("guided", 2, diffusion_model={"transformer": transformer})
    with pytest.raises((ValueError, RankZeroError)) as error:
        pipeline.load_cache(state if torch.distributed.get_rank() == 0 else None)
    return str(error.value)


def test_a_state_that_does_not_fit_is_refused_by_all_ranks():
    """Each has one branch of guidance, so they find out at different tensors; or rank zero does."""
    state = run_ranks(roll, 1, "guided", 1, 0, 3, None)[0][2]
    for said in run_ranks(load_misfit, 2, state, 4, timeout_s=60):
        assert said.endswith("Load it with the sink and window that it was exported with.")
    del state["tensors"]["unconditional/caches/blocks.*.self_attn.core/1/k"]
    first, other = run_ranks(load_misfit, 2, state, 5, timeout_s=60)
    assert first.startswith("The state is damaged: it has no tensor unconditional/caches/")
    assert other.startswith("Rank zero failed")


def save_what_rank_zero_alone_decodes():
    """What each rank says where the decoder's state has no plain form, and is on rank zero."""
    pipeline, _ = build_pipeline("rank0_decode", 2)
    cache = begin(pipeline, "rank0_decode")
    cache.decoder = object() if pipeline.decodes_here else None
    said = []
    for work in (cache.state_dict, lambda: cache.fork(1), lambda: pipeline.park(cache)):
        with pytest.raises((StateError, OtherRankError)) as error:
            work()
        said.append(str(error.value))
    pipeline.diffusion_model.generate(0, cache.diffusion, torch.zeros(1, 8, 5))
    return said


def test_state_that_one_rank_cannot_copy_is_copied_by_none():
    first, other = run_ranks(save_what_rank_zero_alone_decodes, 2, timeout_s=60)
    assert all("decoder: a object has no plain form" in text for text in first)
    assert other == ["Another rank cannot copy its state; see its own message."] * 3


def hand_out():
    own = torch.arange(6).reshape(2, 3).T if torch.distributed.get_rank() == 0 else None
    return broadcast_from_rank_zero(own, (3, 2), torch.int64)


def test_a_tensor_reaches_every_rank():
    for received in run_ranks(hand_out, 3):
        assert received.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_rolling_needs_no_state():
    latents, _, state = run_ranks(roll, 1, "plain", 1, 0, 1, None)[0]
    assert len(latents) == 1 and state["values"]["next_index"] == 1
