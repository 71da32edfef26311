"""What a program gives to a pipeline is refused in one line, whichever entrance it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashdreams.infra.snapshot import SnapshotError
from flashdreams.integrations.self_forcing.config import TINY_PIPELINE
from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE
from flashdreams.integrations.toy_world.world import pose_to_camera

ROWS = torch.zeros(1, 4, 32)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return TINY_PIPELINE.setup(device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS.to("meta"), "text is a meta tensor"),
        (ROWS.to_sparse(), "text is a sparse_coo tensor"),
        (ROWS.int(), "floating-point embeddings; got torch.int32"),
        (ROWS[:0], "of no video"),
        (torch.full_like(ROWS, float("nan")).to(torch.float8_e4m3fn), "128 of 128 values"),
    ],
)
def test_embeddings_without_plain_values_are_refused(
    pipeline: Any, text: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.initialize_cache(text=text)


def test_embeddings_in_fp8_are_taken(pipeline: Any) -> None:
    """Negative control of the one before, and what has no ``isfinite`` in PyTorch."""
    assert pipeline.initialize_cache(text=ROWS.to(torch.float8_e4m3fn)).next_index == 0


def test_one_string_is_no_list_of_prompts_for_any_entrance(pipeline: Any) -> None:
    for entrance in (pipeline.encode_prompts, lambda text: pipeline.initialize_cache(text=text)):
        with pytest.raises(ValueError, match=r"Try text=\['fox'\]"):
            entrance("fox")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [(None, "got a NoneType"), (torch.zeros(1, 16, 3, 4, 6, device="meta"), "without values")],
)
def test_noise_that_is_none_is_refused(pipeline: Any, drawn: Any, message: str) -> None:
    cache = pipeline.initialize_cache(text=ROWS, noise=lambda *_: drawn)
    with pytest.raises(ValueError, match=rf"The noise must be a tensor \[.*{message}"):
        pipeline.generate(0, cache)


def test_a_way_to_recompute_the_window_that_does_not_exist_is_refused(pipeline: Any) -> None:
    cache = pipeline.initialize_cache(text=ROWS)
    with pytest.raises(ValueError, match=r'reencode_window=\'twice\': must be .* "once"'):
        pipeline.update_prompt(cache, ["fox"], reencode_window="twice")


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update(values={}),
        lambda state: state.update(values=None),
        lambda state: state.update(tensors={}),
        lambda state: state["values"].update(next_index=-1),
        lambda state: state["values"].update(next_index="1"),
        lambda state: state["values"].update(fingerprint=None),
        lambda state: state["values"].update(latent={}),
    ],
)
def test_state_in_memory_is_checked_as_the_files_of_a_snapshot_are(
    pipeline: Any, damage: Any
) -> None:
    cache = pipeline.initialize_cache(text=ROWS)
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    state = cache.state_dict()
    assert pipeline.load_cache(state).next_index == 1
    damage(state)
    with pytest.raises((SnapshotError, ValueError), match=r"The state (is damaged|holds values)"):
        pipeline.load_cache(state)


UPRIGHT = pose_to_camera(torch.tensor([[0.3, -0.2, 1.1]]))


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (UPRIGHT.expand(2, 4, 4), "The control input has 32 tokens, the chunk has 16"),
        (UPRIGHT * 2, "an upright camera"),
        (torch.zeros(1, 4, 4), "an upright camera"),
        (UPRIGHT * torch.tensor([-1.0, 1, 1, 1]), "an upright camera"),
        (torch.full((1, 4, 4), float("nan")), "an upright camera"),
    ],
)
def test_the_toy_world_refuses_what_is_no_camera_of_one_chunk(poses: Tensor, message: str) -> None:
    pipeline = TOY_WORLD_PIPELINE.setup(device="cpu")
    cache = pipeline.initialize_cache(text=["dusk sky, red floor"])
    with pytest.raises(ValueError, match=message):
        pipeline.generate(0, cache, poses)
    pipeline.generate(0, cache, UPRIGHT)
