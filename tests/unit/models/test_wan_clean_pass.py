"""The clean pass of the Wan transformer: what it leaves behind, and what it leaves out.

Against whole forwards over the same chunks, bit for bit, float32.
"""

import pytest
import torch
from torch import nn

from flashdreams.attention.core import AttentionCore
from flashdreams.infra.diffusion.transformer import ContextChunk
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_transformer

CASES = {
    "window": dict(sink_size_t=0),
    "sink": {},
    "relative_rope": dict(sink_size_t=2, relative_rope=True),
    "one_block": dict(num_layers=1),
}
CLEAN = torch.tensor(0.0)


def build(**overrides) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, **overrides)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def run_whole_network(model: WanTransformer) -> WanTransformer:
    """Have every clean pass compute its output as well."""
    whole = model.forward
    model.forward = lambda latent, modulation, inputs, state, write_only=False: whole(
        latent, modulation, inputs, state
    )
    return model


def keys_and_values(cache) -> list[torch.Tensor]:
    return [x.clone() for layer in list(cache.layers()) for x in (layer.k, layer.v)]


@torch.no_grad()
def roll_out(model: WanTransformer, steps: int = 5) -> list[torch.Tensor]:
    """Flows, and the cache after every step; the last step is run under a rewritten context."""
    draw = torch.Generator().manual_seed(1)
    cache = model.initialize_cache(text=torch.randn(1, 4, TEXT_DIM, generator=draw))
    found, chunks = [], []
    for step in range(steps):
        control = torch.randn(1, 8, CONTROL_DIM, generator=draw)
        latent = torch.randn(model.latent_shape(1), generator=draw)
        if step == steps - 1:
            held = model.context_frames(cache)
            context = [chunk for chunk in chunks if set(chunk.frames) <= set(held)]
            model.rewrite_context(cache, context, CLEAN)
            found += keys_and_values(cache)
        model.begin_step(step, cache, control)
        found.append(model.predict_flow(latent, torch.tensor(700.0), cache))
        model.update_cache(latent, CLEAN, cache)
        found += keys_and_values(cache)
        frames = (2 * step, 2 * step + 1)
        chunks.append(ContextChunk(frames=frames, kept=(0, 1), latent=latent, control=control))
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_leaves_the_same_bits_as_a_whole_forward(case):
    lean, whole = roll_out(build(**CASES[case])), roll_out(run_whole_network(build(**CASES[case])))
    assert all(torch.equal(a, b) for a, b in zip(lean, whole, strict=True))


@pytest.mark.parametrize("mode", ["chunks", "once"])
@torch.no_grad()
def test_a_control_for_all_tokens_is_rewritten_as_one_for_each(mode):
    """The window holds half of two of the four chunks."""
    found = []
    for lengths, factor in (((1, 1, 8, 1), 1), ((8, 8, 8, 8), 1), ((8, 8, 8, 8), 2)):
        model, draw, chunks = build(), torch.Generator().manual_seed(1), []
        cache = model.initialize_cache(text=torch.ones(1, 4, TEXT_DIM))
        for step, length in enumerate(lengths):
            control = factor * torch.randn(1, 1, CONTROL_DIM, generator=draw).expand(-1, length, -1)
            latent = torch.randn(model.latent_shape(1), generator=draw)
            model.begin_step(step, cache, control)
            model.update_cache(latent, CLEAN, cache)
            chunks.append((latent, control))
        held, context = model.context_frames(cache), []
        for step, (latent, control) in enumerate(chunks):
            kept = tuple(i for i in (0, 1) if 2 * step + i in held)
            part = {"frames": tuple(2 * step + i for i in kept), "latent": latent[:, :, list(kept)]}
            context.append(ContextChunk(kept=kept, control=control, **part))
        assert [len(chunk.kept) for chunk in context] == [1, 1, 2, 2]
        model.rewrite_context(cache, context, CLEAN, mode)
        found.append(keys_and_values(cache))
    for a, b in zip(*found[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(found[0][-1], found[2][-1], atol=1e-2)  # negative control


def test_a_pass_that_writes_too_little_is_seen():
    """Negative control: the last block's keys stay those of the noisy chunk."""
    model, whole = build(), roll_out(build())
    model.blocks[-1].write = lambda *arguments: None
    wrong = roll_out(model)
    assert not all(torch.equal(a, b) for a, b in zip(wrong, whole, strict=True))


def calls_of(model: WanTransformer, pass_: str) -> dict[str, int]:
    """How often each part of the network runs in one pass."""
    cache = model.initialize_cache(text=torch.ones(1, 4, TEXT_DIM))
    model.begin_step(0, cache, torch.ones(1, 8, CONTROL_DIM))
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for name, module in model.named_modules():
        if isinstance(module, AttentionCore | nn.Linear | nn.Conv3d):
            name = name.replace(f"blocks.{len(model.blocks) - 1}", "last")
            module.register_forward_hook(lambda *_, name=name: count(name))
    with torch.no_grad():
        getattr(model, pass_)(torch.ones(model.latent_shape(1)), CLEAN, cache)
    return counts


def test_it_leaves_out_all_that_comes_after_the_last_keys_and_values():
    whole, lean = (calls_of(build(), name) for name in ("predict_flow", "update_cache"))
    left_out = {name for name in whole if name not in lean}
    rest_of_last = {f"self_attn.{x}" for x in ("q", "o", "core")} | {"ffn.0", "ffn.2"}
    rest_of_last |= {f"cross_attn.{x}" for x in ("q", "o", "core")}
    assert left_out == {f"last.{name}" for name in rest_of_last} | {"head.head"}
    assert lean == {name: count for name, count in whole.items() if name not in left_out}


def test_a_whole_pass_is_seen_to_leave_out_nothing():
    """Negative control of the counts."""
    whole = calls_of(build(), "predict_flow")
    assert calls_of(run_whole_network(build()), "update_cache") == whole
