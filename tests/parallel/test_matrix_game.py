"""Matrix-Game on several ranks: action paths and trunk with heads of their own; float32."""

import math
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from flashdreams.integrations.matrix_game.config import TINY_PIPELINE
from flashdreams.integrations.matrix_game.encoder import Actions
from flashdreams.integrations.matrix_game.transformer import (
    KEYBOARD_CACHE,
    MOUSE_CACHE,
    MatrixGameTransformer,
    MatrixGameTransformerConfig,
)
from flashdreams.parallel.context import GatheredAttention, UlyssesAttention
from flashdreams.parallel.mesh import Mesh, ParallelConfig, build_mesh, resolve_degrees
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.tensor import ColwiseLinear
from flashdreams.runtime.checkpoint import CheckpointConfig, load_checkpoint
from flashdreams.runtime.image_file import gradient_image
from flashdreams.runtime.region import whole_region
from tests.harness import run_ranks
from tests.parallel.rollout import relative_error

FLOAT32_TOLERANCE = 1e-5
STEPS = 3
TRUNK_HEADS, ACTION_HEADS = 6, 4
CONFIG = MatrixGameTransformerConfig(
    dim=48,
    ffn_dim=96,
    num_heads=TRUNK_HEADS,
    num_layers=3,
    freq_dim=16,
    image_dim=12,
    latent_height=6,
    latent_width=10,
    action_blocks=2,
    action_heads=ACTION_HEADS,
    action_dim=48,
    keyboard_embed_dim=6,
)
"""45 tokens in a chunk, so that 2 and 4 ranks have to pad."""

STRATEGIES = {
    2: [{}, {"ulysses_degree": 1}, {"tensor_parallel_degree": 2}],
    3: [
        {},
        {"tensor_parallel_degree": 3},
        {"ulysses_degree": 1},
        {"ulysses_degree": 1, "ring_method": "rotate"},
    ],
    4: [
        {},
        {"tensor_parallel_degree": 4},
        {"tensor_parallel_degree": 2},
        {"ulysses_degree": 4},
    ],
}
"""3 does not divide the action heads, 4 does not divide those of the trunk."""
OTHER = {"action_blocks": 3, "ffn_dim": 97}
"""Action caches in the last block, and a feed-forward that no number of ranks divides."""


def build(**changes) -> MatrixGameTransformer:
    config = MatrixGameTransformerConfig(**{**vars(CONFIG), **changes})
    torch.manual_seed(0)
    model = MatrixGameTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def roll_out(model: MatrixGameTransformer, offset: float = 0.0) -> list[torch.Tensor]:
    """Clean latents of every AR step, past the end of the window; a batch of two."""
    c, draw = model.config, torch.Generator().manual_seed(1)
    shape = (2, 16, c.len_t, c.latent_height, c.latent_width)
    image_tokens = torch.randn(2, 5, c.image_dim, generator=draw)
    state, latents = model.initialize_cache(image_tokens=image_tokens), []
    for step in range(STEPS):
        control = model.example_control(2)
        for name, x in control.items():
            control[name] = torch.randn(x.shape, generator=draw)
        control["keyboard"] += offset
        model.begin_step(step, state, control)
        x = torch.randn(shape, generator=draw)
        for time in (947.0, 825.0):
            x = x - 0.5 * model.predict_flow(x, torch.tensor(time), state)
        model.update_cache(x, torch.tensor(0.0), state)
        latents.append(x)
    return latents


def new_mesh(world_size: int, strategy: dict) -> Mesh:
    config = ParallelConfig(**strategy)
    degrees = resolve_degrees(
        config, world_size, TRUNK_HEADS, cached_frame_tokens=15, any_degree=True
    )
    return build_mesh(degrees, "cpu", config)


def parallel_model(world_size: int, strategy: dict, **changes) -> MatrixGameTransformer:
    model = build(**changes)
    parallelize(model, model.parallel_plan(), new_mesh(world_size, strategy))
    return model


def all_strategies(world_size: int) -> dict[str, list[torch.Tensor]]:
    found = {
        str(strategy): roll_out(parallel_model(world_size, strategy))
        for strategy in STRATEGIES[world_size]
    }
    found["all blocks"] = roll_out(parallel_model(world_size, {}, **OTHER))
    tensor = {"tensor_parallel_degree": world_size}
    found["whole feed-forward"] = roll_out(parallel_model(world_size, tensor, **OTHER))
    return found


@cache
def one_rank(**changes) -> list[torch.Tensor]:
    return roll_out(build(**changes))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rollouts_equal_one_rank(world_size):
    for latents in run_ranks(all_strategies, world_size, world_size):
        for name in ("all blocks", "whole feed-forward"):
            assert relative_error(latents.pop(name), one_rank(**OTHER)) <= FLOAT32_TOLERANCE
        errors = {name: relative_error(x, one_rank()) for name, x in latents.items()}
        assert len(errors) == len(STRATEGIES[world_size])
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def strict_bits(world_size: int) -> list[list[torch.Tensor]]:
    return [
        roll_out(parallel_model(world_size, {"strict": True, **degrees}))
        for degrees in ({}, {"ulysses_degree": 1})
    ]


@pytest.fixture(scope="module")
def strict_on_one_rank():
    return run_ranks(strict_bits, 1, 1)[0][0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_strict_rollouts_have_the_same_bits(world_size, strict_on_one_rank):
    for found in run_ranks(strict_bits, world_size, world_size):
        for latents in found:
            pairs = zip(latents, strict_on_one_rank, strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
    assert relative_error(strict_on_one_rank, one_rank()) <= FLOAT32_TOLERANCE


def test_without_strict_the_bits_are_others(strict_on_one_rank):
    """Negative control."""
    plain = zip(strict_on_one_rank, one_rank(), strict=True)
    assert not all(torch.equal(x, y) for x, y in plain)


def actions_of_its_own() -> list[torch.Tensor]:
    rank = torch.distributed.get_rank()
    return roll_out(parallel_model(2, {}), offset=0.1 * rank)


def each_position_sees_its_rank_alone() -> list[torch.Tensor]:
    GatheredAttention.forward = lambda self, q, k, v, cache=None: v
    return roll_out(parallel_model(3, {}))


def shares_that_are_not_per_part() -> list[torch.Tensor]:
    """A contiguous third of queries, keys and values in place of a share of each."""
    made = ColwiseLinear.__init__
    ColwiseLinear.__init__ = lambda self, linear, channel, name, parts=1: made(
        self, linear, channel, name
    )
    return roll_out(parallel_model(2, {"tensor_parallel_degree": 2}))


@pytest.mark.parametrize(
    ("ranks", "mistake"),
    [
        (2, actions_of_its_own),
        (3, each_position_sees_its_rank_alone),
        (2, shares_that_are_not_per_part),
    ],
)
def test_mistakes_are_seen(ranks, mistake):
    """Negative control."""
    for latents in run_ranks(mistake, ranks):
        assert relative_error(latents, one_rank()) > 1e-3


def kinds(world_size: int, strategy: dict) -> list:
    model = parallel_model(world_size, strategy)
    attention, action = model.blocks[0].self_attn, model.blocks[0].action_model
    state = model.initialize_cache(image_tokens=torch.zeros(1, 5, 12))
    heads = [state.caches[glob][0].spec.num_heads for glob in (MOUSE_CACHE, KEYBOARD_CACHE)]
    weights = attention.q.weight.shape[0], action.t_qkv.weight.shape[0]
    whole = whole_region((2, 30, TRUNK_HEADS, 8))
    written = math.prod(map(len, attention.core.written_region(whole)))
    return [type(attention.core), type(action.mouse_core), *heads, *weights, written]


@pytest.mark.parametrize(
    ("ranks", "strategy", "trunk", "mouse", "heads", "weights"),
    [
        (2, {}, UlyssesAttention, UlyssesAttention, [2, 4], (48, 144)),
        (3, {}, UlyssesAttention, GatheredAttention, [4, 4], (48, 144)),
        (3, {"tensor_parallel_degree": 3}, None, None, [4, 4], (16, 144)),
        (4, {"tensor_parallel_degree": 4}, None, None, [1, 1], (48, 36)),
        (4, {"ulysses_degree": 4}, GatheredAttention, UlyssesAttention, [1, 4], (48, 144)),
    ],
)
def test_each_attention_is_cut_by_its_own_heads(ranks, strategy, trunk, mouse, heads, weights):
    found, *others = run_ranks(kinds, ranks, ranks, strategy)
    assert found[2:-1] == [*heads, *weights]
    if "tensor_parallel_degree" not in strategy:  # which does not divide the trunk
        assert sum(each[-1] for each in (found, *others)) == 2 * 30 * TRUNK_HEADS * 8
    for got, wanted in zip(found[:2], (trunk, mouse), strict=True):
        assert wanted is None or got is wanted


def load_slices(path: str, world_size: int):
    """Build with other weights, cut, read this rank's slices alone."""
    torch.manual_seed(5)
    model = MatrixGameTransformer(CONFIG)
    mesh = new_mesh(world_size, {"tensor_parallel_degree": world_size})
    slices = parallelize(model, model.parallel_plan(), mesh).slices
    report = load_checkpoint(model, CheckpointConfig(source=path), slices=slices)
    own = sum(p.numel() for p in model.parameters()) * 4
    return roll_out(model.requires_grad_(False)), report.bytes_read, own


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_rank_reads_its_slices_alone(world_size, tmp_path):
    model = build()
    path = str(tmp_path / "model.safetensors")
    save_file(model.state_dict(), path)
    whole = sum(p.numel() for p in model.parameters()) * 4
    for latents, read, own in run_ranks(load_slices, world_size, path, world_size):
        assert read == own < whole
        assert relative_error(latents, one_rank()) <= FLOAT32_TOLERANCE


def piece(world_size, parallel, state, steps):
    """Some AR steps of the tiny world; latents and the state after them on rank zero."""
    pipeline = TINY_PIPELINE.setup(device="cpu", load=False)
    mesh = pipeline.build_mesh(world_size, ParallelConfig(**parallel))
    pipeline.parallelize(mesh)
    pipeline.load()
    if state is None:
        cache = pipeline.initialize_cache(image=gradient_image(48, 80), seed=3)
    else:
        cache = pipeline.load_cache(state)
    latents = []
    for index in range(*steps):
        frames = len(pipeline.pixel_frames(index))
        draw = torch.Generator().manual_seed(index)
        actions = Actions(
            torch.randint(2, (frames, 4), generator=draw).float(),
            torch.randn(frames, 2, generator=draw),
        )
        pipeline.generate(index, cache, actions)
        pipeline.finalize(index, cache)
        latents.append(cache.latent)
    return latents, cache.state_dict()


@pytest.mark.parametrize("parallel", [{}, {"strict": True}, {"tensor_parallel_degree": "all"}])
def test_a_world_moves_between_numbers_of_ranks(parallel):
    """Action caches, past actions and the image's video move, too."""
    state, moved = None, []
    for ranks, steps in ((2, (0, 2)), (3, (2, 3)), (1, (3, 4)), (4, (4, 5))):
        degrees = {k: ranks if v == "all" else v for k, v in parallel.items()}
        latents, state = run_ranks(piece, ranks, ranks, degrees, state, steps)[0]
        moved += latents
    degrees = {k: v for k, v in parallel.items() if v != "all"}
    stayed, _ = run_ranks(piece, 1, 1, degrees, None, (0, 5))[0]
    if "strict" in parallel:
        assert all(torch.equal(x, y) for x, y in zip(moved, stayed, strict=True))
    assert relative_error(moved, stayed) <= FLOAT32_TOLERANCE


def test_a_world_that_loses_its_past_actions_is_another():
    """Negative control."""
    _, state = run_ranks(piece, 2, 2, {}, None, (0, 2))[0]
    expected, _ = run_ranks(piece, 1, 1, {}, state, (2, 3))[0]
    names = [n for n in state["tensors"] if "mouse_core" in n or n == "encoder/keyboard"]
    assert len(names) == 2 * 2 + 1
    for name in names[:1] + names[-1:]:
        kept = state["tensors"][name]
        state["tensors"][name] = torch.zeros_like(kept)
        found, _ = run_ranks(piece, 1, 1, {}, state, (2, 3))[0]
        state["tensors"][name] = kept
        assert relative_error(found, expected) > 1e-4, name
