"""Short rollouts of a tiny method whose window rolls, to hold quantized caches against float32."""

from typing import Any

import torch

from tests.tiny import TEXT_DIM, tiny_pipeline

STEPS = 6
SINK = dict(sink_size_t=2, window_size_t=3, relative_rope=True)


def build(**transformer: Any) -> Any:
    """The pipeline on a CPU, with weights twice as large as they begin: those are too tame."""
    pipeline = tiny_pipeline(**{**SINK, **transformer}).setup(device="cpu")
    for parameter in pipeline.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)
    return pipeline


def begin(pipeline: Any, seed: int = 3) -> Any:
    """A rollout with a random prompt."""
    text = torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return pipeline.initialize_cache(text=text, seed=seed)


def run(pipeline: Any, cache: Any, steps: int = STEPS) -> torch.Tensor:
    """Latents ``[B, C, T, H, W]`` of the AR steps up to ``steps``."""
    latents = []
    for index in range(cache.next_index, steps):
        pipeline.generate(index, cache, 0.1 * index)
        pipeline.finalize(index, cache)
        latents.append(cache.latent)
    return torch.cat(latents, dim=2)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry of ``b``."""
    return float((a - b).abs().max() / b.abs().max())
