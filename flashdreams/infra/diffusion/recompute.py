"""Difference between the numerics of this process and those of a loaded rollout."""

import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.causal_state import CausalState
from flashdreams.infra.diffusion.model import DiffusionCache, DiffusionModel
from flashdreams.infra.diffusion.transformer import ContextChunk
from flashdreams.parallel.environment import largest_of_all_ranks


def numerics_difference(model: DiffusionModel, cache: DiffusionCache) -> float | None:
    """Difference between the cached last chunk and this process's recomputation of it.

    A collective call.

    Args:
        model: that continues the rollout.
        cache: of a loaded rollout, between AR steps.

    Returns:
        See `clean_pass_difference`, for all ranks; None where that pass cannot be run again: before
        the first chunk, after a change of the prompt, and for transformers that are no
        `CausalTransformer`.
    """
    chunks, network = model.held_chunks(cache), model.transformer
    if not chunks or cache.prompt_is_newer or not isinstance(network, CausalTransformer):
        return None
    given = (chunks[-1], model.context_timestep)
    own = max(clean_pass_difference(network, branch, *given) for branch in cache.branches)
    return largest_of_all_ranks(own)


def clean_pass_difference(
    transformer: CausalTransformer, state: CausalState, chunk: ContextChunk, timestep: Tensor
) -> float:
    """Run the clean pass of the last chunk again, and compare what it writes with what is cached.

    The window holds exactly what that pass saw, so equal numerics give equal bits. Afterwards the
    state has its original bits. A collective call.

    Args:
        transformer: of the rollout.
        state: between AR steps, under the prompt of the last clean pass.
        chunk: the last one, whole.
        timestep: of the clean pass.

    Returns:
        Largest difference of this rank's keys and values of the chunk, over the largest of them.
    """
    for cursor in state.cursors:
        cursor.reset(cursor.start - len(chunk.frames), cursor.frames, cursor.pinned)
    transformer.begin_step(chunk.frames[0] // len(chunk.frames), state, chunk.control)
    layers = list(state.layers())
    # Copies on the host: with a long window the device may lack the memory.
    cached = [[x.cpu() for x in layer.read_chunk()] for layer in layers]
    beside = [[x.clone() for x in _beside(layer)] for layer in layers]
    transformer.update_cache(chunk.latent, timestep, state)
    changes, sizes = [], []
    for layer, on_host, kept in zip(layers, cached, beside, strict=True):
        was = [x.to(chunk.latent.device) for x in on_host]
        for new, old in zip(layer.read_chunk(), was, strict=True):
            changes.append((new.float() - old.float()).abs().max())
            sizes.append(old.float().abs().max())
        _put_back(layer, was, kept)
    if not changes:
        return 0.0
    difference, largest = (float(torch.stack(x).max()) for x in (changes, sizes))
    return difference / largest if largest else difference


def _beside(layer: KVCache) -> list[Tensor]:
    """The small tensors that a pass over the first chunks writes besides keys and values."""
    sink = layer.sink_k
    tensors = [] if sink is None else [sink] if isinstance(sink, Tensor) else sink.parts
    return tensors if layer.scales is None else [*tensors, layer.scales]


def _put_back(layer: KVCache, chunk: list[Tensor], beside: list[Tensor]) -> None:
    for into, x in zip(_beside(layer), beside, strict=True):
        into.copy_(x)
    for stored, x in zip((layer.k, layer.v), chunk, strict=True):
        stored[:, layer.cursor.slots] = x
