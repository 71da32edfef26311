"""A rollout that is saved and loaded on as many ranks, or cloned, continues with the same bits.

Not strict: the ranks compute as they did, so sums have the order that they had.
"""

import json

import pytest
import torch
from safetensors.torch import load, save

from tests.harness import run_ranks
from tests.parallel.pipelines import begin, build_pipeline, control

SAVED_AT, STEPS = 4, 7
"""The window is full and has evicted when the rollout is saved."""
SIZES = dict(transformer=dict(latent_width=6, patch_size=(1, 2, 3)))
"""Two columns and one on four ranks."""


def build(decode: str, world_size: int):
    return build_pipeline(f"{decode}_decode", world_size, diffusion_model=SIZES)[0]


def go_on(pipeline, cache, steps: int = STEPS):
    """Latents and, where this rank decodes, frames of the AR steps up to ``steps``."""
    latents, frames = [], []
    for index in range(cache.next_index, steps):
        chunk = pipeline.generate(index, cache, control("plain", index))
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
        if chunk is not None:
            frames.append(chunk.clone())
    return latents, frames


def written(state):
    """The state as it comes back from JSON and safetensors; None where this rank has none."""
    if state is None:
        return None
    tensors = load(save(state["tensors"]))
    return {**state, "values": json.loads(json.dumps(state["values"])), "tensors": tensors}


def layouts(cache):
    """Shape and strides of what the decoder carries."""
    return {name: (x.shape, x.stride()) for name, x in cache.decoder.slots.items()}


def without_order(value):
    """Values in which no tensor has a memory format."""
    if isinstance(value, dict):
        return {k: None if k == "order" else without_order(x) for k, x in value.items()}
    return [without_order(x) for x in value] if isinstance(value, list) else value


def damaged(state, part: str):
    """The state with the last tensor of a part lost; None where this rank has none."""
    if state is None:
        return None
    lost = [name for name in state["tensors"] if name.startswith(part)][-1]
    return {**state, "tensors": state["tensors"] | {lost: torch.zeros_like(state["tensors"][lost])}}


@torch.no_grad()
def saved(decode: str, world_size: int):
    """What this rank makes of the rollout that stayed, and of those that were loaded."""
    pipeline = build(decode, world_size)
    cache = begin(pipeline, "plain")
    go_on(pipeline, cache, SAVED_AT)
    carried = [layouts(cache)]
    state = written(cache.state_dict())
    found = {"stayed": go_on(pipeline, cache)}
    other = build(decode, world_size)
    loaded = other.load_cache(state)
    carried.append(layouts(loaded))
    found["loaded"] = go_on(other, loaded)
    plain = None if state is None else {**state, "values": without_order(state["values"])}
    states = {"order": plain, **{part: damaged(state, part) for part in ("decoder", "conditional")}}
    for lost, changed in states.items():
        found[lost] = go_on(other, other.load_cache(changed))
    return found, carried


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("decode", ["split", "replicated", "rank0"])
def test_a_saved_rollout_goes_on_with_the_same_bits(decode, world_size):
    """Negative controls: a memory format, a decoder's tensor or a cache that gets lost shows."""
    for rank, (found, (before, after)) in enumerate(
        run_ranks(saved, world_size, decode, world_size)
    ):
        latents, frames = found["stayed"]
        decodes = decode != "rank0" or rank == 0
        assert len(latents) == STEPS - SAVED_AT and bool(frames) == bool(before) == decodes
        assert before == after
        assert same(found["loaded"][0], latents) and same(found["loaded"][1], frames)
        for lost in ("order", "decoder"):
            assert same(found[lost][0], latents)
            assert same(found[lost][1], frames) == (not decodes), lost
        assert not same(found["conditional"][0], latents)


@torch.no_grad()
def cloned(decode: str, world_size: int):
    """Rollouts that were cloned and their clones, whichever continues first."""
    pipeline = build(decode, world_size)
    alone = begin(pipeline, "plain")
    go_on(pipeline, alone, SAVED_AT)
    alone = go_on(pipeline, alone)
    found = []
    for clone_first in (False, True):
        cache = begin(pipeline, "plain")
        go_on(pipeline, cache, SAVED_AT)
        pair = [cache, cache.clone()]
        assert layouts(pair[0]) == layouts(pair[1])
        found += [go_on(pipeline, one) for one in (reversed(pair) if clone_first else pair)]
    shared = begin(pipeline, "plain")
    go_on(pipeline, shared, SAVED_AT)
    other = shared.clone()
    other.decoder = shared.decoder
    go_on(pipeline, shared, SAVED_AT + 1)
    other.decoder.chunks -= 1
    return alone, found, go_on(pipeline, other)


@pytest.mark.parametrize("decode", ["split", "replicated", "rank0"])
def test_a_clone_goes_on_with_the_same_bits(decode):
    """Negative control: a clone that shares the decoder's state with its source."""
    for rank, (alone, found, sharing) in enumerate(run_ranks(cloned, 2, decode, 2)):
        for latents, frames in found:
            assert same(latents, alone[0]) and same(frames, alone[1])
        assert same(sharing[0], alone[0])
        assert same(sharing[1], alone[1]) == (decode == "rank0" and rank == 1)
