"""The causal engine under a family of its own: two caches per layer, of different windows.

float32; against plain recomputation, atol 1e-5 on outputs of order one.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import RotaryEmbedding3D, apply_rope
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.diffusion.causal_state import CausalState
from flashdreams.infra.diffusion.transformer import ContextChunk
from tests.tiny import call_network
from tests.unit.runtime.test_cuda_graph import trace_graphs

ATOL = 1e-5
CPU = torch.device("cpu")
NEAR, FAR = "layers.*.near", "layers.*.far"
DIM, HEADS, CHANNELS, CHUNK, FRAMES = 24, 2, 3, 2, 12
GRID = (2, 2)
TOKENS = 4
CLEAN = torch.tensor(0.0)
WINDOWS = [((3, 1), (6, 0)), ((6, 1), (2, 3)), ((4, 0), (4, 2)), ((5, 1), (5, 1))]
"""Window and sink of the near and of the far attention."""


@dataclass(kw_only=True)
class TwoCachesConfig(CausalTransformerConfig):
    _target: type["TwoCaches"] = field(default_factory=lambda: TwoCaches)
    far_window_t: int = 6
    far_sink_t: int = 0


class Layer(nn.Module):
    """Attends to the tokens of near frames, then to one mean token of each far frame."""

    def __init__(self) -> None:
        super().__init__()
        self.near_qkv = nn.Linear(DIM, 3 * DIM)
        self.far_q, self.far_kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.near, self.far = AttentionCore(DIM // HEADS), AttentionCore(DIM // HEADS)

    def forward(self, x: Tensor, attend_near, attend_far) -> Tensor:
        x = x + attend_near(*heads(self.near_qkv(x), 3))
        frames = x.unflatten(1, (-1, TOKENS)).mean(2)
        return x + attend_far(*heads(self.far_q(x), 1), *heads(self.far_kv(frames), 2))


class TwoCaches(CausalTransformer):
    config: TwoCachesConfig

    def __init__(self, config: TwoCachesConfig) -> None:
        super().__init__(config)
        self.inward, self.outward = nn.Linear(CHANNELS, DIM), nn.Linear(DIM, CHANNELS)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        c, near = self.config, self.cache_spec(batch_size)
        far = replace(
            near,
            window_size_t=c.far_window_t,
            sink_size_t=c.far_sink_t,
            tokens_per_frame=1,
            relative_sink=c.relative_rope and c.far_sink_t > 0,
        )
        return {NEAR: near, FAR: far}

    def rotations(self, frames: Tensor) -> dict[str, Tensor]:
        return {"near": self.rope(frames, *GRID, CPU), "far": self.rope(frames, 1, 1, CPU)}

    def modulations(self, timestep: Tensor) -> Tensor:
        return timestep.float()[:, None, None] / 1000

    def embed_control(self, control: Tensor) -> Tensor:
        return control / 2

    def embed(self, latent: Tensor, modulation: Tensor, control: Tensor) -> Tensor:
        return self.inward(latent.flatten(2).transpose(1, 2)) + modulation + control

    def forward(self, latent, modulation, inputs, state, write_only=False) -> Tensor:
        x = self.embed(latent, modulation, inputs.control)
        near, far = inputs.rotations["near"], inputs.rotations["far"]
        for layer, *caches in zip(
            self.layers, *(state.caches[x] for x in (NEAR, FAR)), strict=True
        ):
            attend_near = partial(attend, layer.near, caches[0], near, near)
            x = layer(x, attend_near, partial(attend, layer.far, caches[1], near, far))
        if write_only:
            return x.new_empty(0)
        return self.outward(x).transpose(1, 2).reshape(latent.shape)


def heads(x: Tensor, count: int) -> list[Tensor]:
    return list(x.unflatten(-1, (count, HEADS, -1)).unbind(2))


def attend(core: AttentionCore, cache: KVCache, q_table, k_table, q, k, v) -> Tensor:
    return core(apply_rope(q, q_table), apply_rope(k, k_table), v, cache).flatten(2)


def build(near=(3, 1), far=(6, 0), kind=TwoCaches, **overrides) -> TwoCaches:
    config = TwoCachesConfig(
        dim=DIM,
        num_heads=HEADS,
        in_channels=CHANNELS,
        patch_size=(1, 1, 1),
        latent_height=GRID[0],
        latent_width=GRID[1],
        len_t=CHUNK,
        window_size_t=near[0],
        sink_size_t=near[1],
        far_window_t=far[0],
        far_sink_t=far[1],
        **overrides,
    )
    torch.manual_seed(0)
    model = kind(config).requires_grad_(False)
    for parameter in model.parameters():  # attention must matter
        if parameter.ndim > 1:
            parameter.mul_(1.5)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    """Clean latents and control of all frames."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, CHANNELS, FRAMES, *GRID, generator=generator)
    return latent, torch.randn(1, FRAMES * TOKENS, DIM, generator=generator)


def chunks() -> list[tuple[Tensor, Tensor]]:
    latent, control = inputs()
    parts = latent.split(CHUNK, dim=2), control.split(CHUNK * TOKENS, dim=1)
    return list(zip(*parts, strict=True))


def streamed(model: TwoCaches, state: CausalState | None = None) -> Tensor:
    """Outputs of the clean chunks; ``state`` takes what is left at the end."""
    state, outputs = state or model.initialize_cache(), []
    for index, (latent, control) in enumerate(chunks()):
        model.begin_step(index, state, control)
        model.predict_flow(latent + index + 1, torch.tensor(900.0), state)  # must not show
        outputs.append(call_network(model, latent, CLEAN, state))
        model.update_cache(latent, CLEAN, state)
    return torch.cat(outputs, dim=2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v).flatten(2)


def table(frames: list[int], grid: tuple[int, int]) -> Tensor:
    return RotaryEmbedding3D(DIM // HEADS)(torch.tensor(frames), *grid, CPU)


class Recomputed:
    """An attention that keeps all keys as they are before rotation, frame by frame, for ever.

    Each chunk takes those that its window holds, in order, and rotates them afresh; with relative
    positions the sink stands right before the window.
    """

    def __init__(self, grid: tuple[int, int], window: int, sink: int, relative: bool) -> None:
        self.grid, self.window, self.sink, self.relative = grid, window, sink, relative
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, tokens = len(self.keys), self.grid[0] * self.grid[1]
        self.keys += k.split(tokens, dim=1)
        self.values += v.split(tokens, dim=1)
        end = len(self.keys)
        seen = [f for f in range(end) if f < self.sink or f >= end - self.window]
        moved = (end - len(seen)) * self.relative
        places = [f + moved if f < self.sink else f for f in seen]
        keys = torch.cat([self.keys[f] for f in seen], dim=1)
        values = torch.cat([self.values[f] for f in seen], dim=1)
        q = apply_rope(q, table(list(range(start, end)), GRID))
        return softmax_attention(q, apply_rope(keys, table(places, self.grid)), values)


def recomputed(model: TwoCaches, near, far, relative: bool = False) -> Tensor:
    attentions = [
        (Recomputed(GRID, *near, relative), Recomputed((1, 1), *far, relative))
        for _ in model.layers
    ]
    outputs = []
    for latent, control in chunks():
        x = model.embed(latent, torch.zeros(1, 1, 1), control / 2)
        for layer, pair in zip(model.layers, attentions, strict=True):
            x = layer(x, *pair)
        outputs.append(model.outward(x).transpose(1, 2).reshape(latent.shape))
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("near", "far"), WINDOWS)
def test_both_caches_evict_by_their_own_window(near, far, relative):
    model = build(near, far, relative_rope=relative)
    found = streamed(model)
    expected = recomputed(model, near, far, relative)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    assert found.std() > 0.1


@pytest.mark.parametrize(
    ("near", "far", "relative"),
    [
        ((4, 1), (6, 1), False),
        ((3, 1), (5, 1), False),
        ((3, 1), (6, 0), False),
        ((6, 1), (3, 1), False),
        ((3, 1), (6, 1), True),
    ],
)
def test_another_window_or_position_is_another_function(near, far, relative):
    """Negative control: one frame more or less, the two swapped, or a sink that moves."""
    model = build((3, 1), (6, 1))
    assert (streamed(model) - recomputed(model, near, far, relative)).abs().max() > 50 * ATOL


def test_the_state_has_a_cursor_per_window_and_caches_of_both_sizes():
    model = build((3, 1), (6, 0))
    state = model.initialize_cache()
    streamed(model, state)
    near, far = state.caches[NEAR], state.caches[FAR]
    assert [len(near), len(far), len(state.cursors)] == [2, 2, 2]
    assert {id(c.cursor) for c in near} == {id(state.cursors[0])}
    assert {id(c.cursor) for c in far} == {id(state.cursors[1])}
    assert [c.past_frames() for c in state.cursors] == [[0, 9, 10, 11], [6, 7, 8, 9, 10, 11]]
    assert (near[0].k.shape[1], far[0].k.shape[1]) == (4 * TOKENS, 6)
    sizes = sum(x.nbytes for cache in state.layers() for x in (cache.k, cache.v))
    assert model.cache_nbytes(1) == sizes
    assert model.warm_up_steps == 6 // CHUNK + 1


def held_chunks(frames: list[int]) -> list[ContextChunk]:
    found = []
    for index, (latent, control) in enumerate(chunks()):
        kept = tuple(i for i in range(CHUNK) if CHUNK * index + i in frames)
        if kept:
            own = tuple(CHUNK * index + i for i in kept)
            part = latent[:, :, list(kept)]
            found.append(ContextChunk(frames=own, kept=kept, latent=part, control=control))
    return found


class Whole:
    """An attention of all frames to all frames; keeps rotated keys and values."""

    def __init__(self, frames: list[int], grid: tuple[int, int]) -> None:
        self.frames, self.grid = frames, grid

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k, self.v = apply_rope(k, table(self.frames, self.grid)), v
        return softmax_attention(apply_rope(q, table(self.frames, GRID)), self.k, v)


def written_at_once(model: TwoCaches, frames: list[int]) -> list[Tensor]:
    """Keys and values of one forward over the frames, without a mask: near, then far."""
    latent, control = inputs()
    control = control.unflatten(1, (FRAMES, TOKENS))[:, frames].flatten(1, 2)
    x = model.embed(latent[:, :, frames], torch.zeros(1, 1, 1), control / 2)
    pairs = [(Whole(frames, GRID), Whole(frames, (1, 1))) for _ in model.layers]
    for layer, pair in zip(model.layers, pairs, strict=True):
        x = layer(x, *pair)
    return [y for which in zip(*pairs, strict=True) for one in which for y in (one.k, one.v)]


def kept(state: CausalState) -> list[Tensor]:
    """Keys and values, frames in order."""
    return [x for cache in state.layers() for _, x in cache.canonical_tensors()]


def test_rewriting_at_once_is_one_forward_without_a_mask():
    model = build((5, 1), (5, 1))
    state = model.initialize_cache()
    streamed(model, state)
    before, places = kept(state), [cache.k.data_ptr() for cache in state.layers()]
    frames = model.context_frames(state)
    assert frames == [0, 7, 8, 9, 10, 11]  # of two chunks a part is left
    model.rewrite_context(state, held_chunks(frames), CLEAN, mode="once")
    expected = written_at_once(model, frames)
    for found, wanted in zip(kept(state), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)
    assert [cache.k.data_ptr() for cache in state.layers()] == places
    assert model.context_frames(state) == frames and state.is_steady

    def differ(found: list[Tensor]) -> list[bool]:
        pairs = zip(found, expected, strict=True)
        return [bool((x - y).abs().max() > 50 * ATOL) for x, y in pairs]

    # Negative controls: not what was there, and not what chunk by chunk gives. The first near
    # keys and values see no other frame.
    own = [True] * 2
    assert differ(before)[2:] == own * 3
    model.rewrite_context(state, held_chunks(frames), CLEAN)
    assert differ(kept(state)) == [False, False, *own * 3]


def test_at_once_is_refused_where_the_sink_turns_in_between():
    model = build((3, 1), (3, 1), relative_rope=True)
    state = model.initialize_cache()
    streamed(model, state)
    held, before = held_chunks(model.context_frames(state)), kept(state)
    with pytest.raises(ValueError, match=r"cannot be used with relative_rope=True; use \"chunks\""):
        model.rewrite_context(state, held, CLEAN, mode="once")
    assert all(torch.equal(x, y) for x, y in zip(kept(state), before, strict=True))
    model.rewrite_context(state, held, CLEAN)  # negative control: chunk by chunk it goes
    assert not all(torch.equal(x, y) for x, y in zip(kept(state), before, strict=True))


@pytest.mark.parametrize("mode", ["chunks", "once"])
def test_windows_of_different_lengths_are_not_rewritten(mode):
    """The shorter one has no room for what the longer one holds."""
    for near, far in WINDOWS[:3]:
        model = build(near, far)
        state = model.initialize_cache()
        streamed(model, state)
        before = kept(state)
        held = held_chunks(model.context_frames(state))
        with pytest.raises(ValueError, match=r"windows of several sizes.*cannot be recomputed"):
            model.rewrite_context(state, held, CLEAN, mode=mode)
        assert all(torch.equal(x, y) for x, y in zip(kept(state), before, strict=True))


def flows(model: TwoCaches) -> list[Tensor]:
    state, found = model.initialize_cache(), []
    for index, (latent, control) in enumerate(chunks()):
        model.begin_step(index, state, control)
        for timestep in (900.0, 500.0):
            found.append(model.predict_flow(latent, torch.tensor(timestep), state))
        model.update_cache(latent, CLEAN, state)
    return found


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("near", "far"), [((3, 1), (6, 0)), ((6, 1), (2, 3))])
@torch.no_grad()
def test_a_graph_of_the_steady_state_replays_the_same_bits(near, far, relative):
    model = build(near, far, relative_rope=relative, use_cuda_graph=True)
    eager = flows(model)
    trace_graphs(model)
    model.network.reset()
    assert all(torch.equal(x, y) for x, y in zip(flows(model), eager, strict=True))
    filling = -(-max(sum(near), sum(far)) // CHUNK) - 1
    calls = 3 * FRAMES // CHUNK
    assert (model.network.captures, model.network.eager_calls) == (2, 3 * filling)
    assert model.network.replays == calls - 3 * filling - 2 > 0


@torch.no_grad()
def test_a_graph_of_one_full_window_would_be_wrong():
    """Negative control: the near window is full before the far one is."""
    model = build((3, 1), (6, 0), use_cuda_graph=True)
    eager = flows(model)
    trace_graphs(model)
    model.network.key = lambda inputs, state, write_only=False: (
        write_only if state.cursor.is_full else None
    )
    assert not all(torch.equal(x, y) for x, y in zip(flows(model), eager, strict=True))


@torch.no_grad()
def test_warm_up_sees_that_replays_are_exact():
    model = build(use_cuda_graph=True)
    trace_graphs(model)
    state = model.initialize_cache()
    streamed(model, state)
    control = chunks()[0][1]
    assert model.replay_is_exact(state, control)
    far = state.caches[FAR][1].k
    for key, graph in list(model.network._graphs.items()):

        def other(replay=graph.replay) -> None:
            replay()
            far.add_(1)

        model.network._graphs[key] = replace(graph, replay=other)
    assert not model.replay_is_exact(state, control)  # negative control


class NoSuchCore(TwoCaches):
    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        return super().cache_specs(batch_size) | {"layers.*.middle": self.cache_spec(batch_size)}


def test_a_glob_that_matches_nothing_is_named():
    model = build(kind=NoSuchCore)
    with pytest.raises(ValueError, match=r"names 'layers\.\*\.middle', which matches no submodule"):
        model.initialize_cache()


class NoForward(CausalTransformer):
    pass


def test_a_family_without_forward_says_what_to_write():
    model = build(kind=NoForward)
    state = model.initialize_cache()
    model.begin_step(0, state)
    latent = torch.zeros(model.latent_shape(1))
    message = r"NoForward does not define forward\(latent, modulation, inputs, state\)"
    for call in (model.predict_flow, model.update_cache):
        with pytest.raises(TypeError, match=message):
            call(latent, CLEAN, state)


def test_control_for_a_family_that_takes_none_is_refused():
    model = build(kind=NoForward)
    with pytest.raises(ValueError, match="NoForward takes no control input"):
        model.begin_step(0, model.initialize_cache(), torch.zeros(1))
