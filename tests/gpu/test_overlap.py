"""The clean pass on a stream of its own, on a real GPU."""

import pytest
import torch

from flashdreams.runtime.noise import NoiseSource
from tests.tiny import TEXT_DIM, tiny_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def latents(overlap: bool, use_cuda_graph: bool) -> list[torch.Tensor]:
    sizes = dict(dim=384, ffn_dim=1536, num_heads=6, attention_backend="sdpa")
    config = tiny_pipeline(**sizes, use_cuda_graph=use_cuda_graph)
    config.diffusion_model.overlap_clean_pass = overlap
    pipeline = config.setup(device="cuda")
    pipeline.warm_up()
    text = torch.randn(1, 3, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    found = []
    cache = None
    for _ in range(3):  # the second and third begin beside the last clean pass
        if cache is not None:
            cache.release()  # there are graphs for one rollout at a time
        cache = pipeline.initialize_cache(text=text, seed=1)
        for index in range(8):
            chunk = pipeline.generate(index, cache, 0.1 * index)
            pipeline.finalize(index, cache)
            found += [cache.latent.clone(), chunk.clone()]
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_overlap_gives_the_same_bits(use_cuda_graph):
    beside, behind = (latents(overlap, use_cuda_graph) for overlap in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(beside, behind, strict=True))


def test_the_clean_pass_is_on_another_stream():
    """Negative control: without it the two would be equal for want of any overlap."""
    pipeline = tiny_pipeline().setup(device="cuda")
    streams = []
    update = pipeline.diffusion_model.transformer.update_cache
    pipeline.diffusion_model.transformer.update_cache = lambda *args: (
        streams.append(torch.cuda.current_stream()),
        update(*args),
    )
    cache = pipeline.initialize_cache(text=torch.ones(1, 3, TEXT_DIM))
    pipeline.generate(0, cache, 0.5)
    pipeline.finalize(0, cache)
    assert streams[0] != torch.cuda.current_stream()


def test_noise_drawn_ahead_changes_nothing_and_a_callable_is_not_asked_early():
    pipeline = tiny_pipeline().setup(device="cuda")
    text, asked = torch.ones(1, 3, TEXT_DIM), []

    def noise(index, step, shape):
        asked.append(index)
        return NoiseSource(5)(index, step, shape)

    found = []
    for chosen in (dict(seed=5), dict(noise=noise)):
        cache = pipeline.initialize_cache(text=text, **chosen)
        for index in range(3):
            pipeline.generate(index, cache, 0.5)
            assert not asked or max(asked) == index
            pipeline.finalize(index, cache)
            found.append(cache.latent.clone())
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    assert max(asked) == 2
