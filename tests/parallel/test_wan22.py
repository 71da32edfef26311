"""Wan 2.2 TI2V, from text and from an image, on several ranks against one; float32."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.integrations.wan22.config import TINY_PIPELINE
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.image_file import gradient_image
from tests.harness import run_ranks

TOLERANCE = 1e-5
STRATEGIES = {
    "default": ParallelConfig(),
    "ring": ParallelConfig(cfg_parallel_degree=1, ulysses_degree=1),
    "tensor": ParallelConfig(tensor_parallel_degree=2),
    "strict": ParallelConfig(strict=True),
}
PIPELINE = derive_config(TINY_PIPELINE, diffusion_model=dict(scheduler=dict(num_inference_steps=3)))


@torch.no_grad()
def sample(strategy: str, world_size: int, with_image: bool, forget_places: bool = False):
    """Latent and frames of one video on these ranks."""
    parallel = STRATEGIES[strategy] if world_size > 1 else ParallelConfig()
    parallel = replace(parallel, strict=strategy == "strict")
    heads = PIPELINE.diffusion_model.transformer.num_heads
    degrees = resolve_degrees(parallel, world_size, heads, guided=True)
    pipeline = PIPELINE.setup(device="cpu", load=False)
    if forget_places:
        plan = WanTransformer.parallel_plan(pipeline.diffusion_model.transformer)
        split = {name: dim for name, dim in plan.split.items() if name != "token_places"}
        WanTransformer.parallel_plan = lambda self: replace(plan, split=split)
    pipeline.parallelize(build_mesh(degrees, "cpu", parallel))
    pipeline.load()
    context = {"image": gradient_image(64, 96)} if with_image else {}
    cache = pipeline.initialize_cache(text=["a fox"], negative_text=["blurry"], seed=3, **context)
    frames = pipeline.generate(0, cache)
    return cache.latent.clone(), frames.clone()


@cache
def alone(with_image: bool, strict: bool = False):
    return run_ranks(sample, 1, "strict" if strict else "default", 1, with_image)[0]


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [("default", 2), ("default", 4), ("ring", 4), ("tensor", 2), ("tensor", 4), ("strict", 4)],
)
def test_ranks_make_the_video_of_one(strategy, world_size, with_image):
    strict = strategy == "strict"
    latent, frames = alone(with_image, strict)
    for found, seen in run_ranks(sample, world_size, strategy, world_size, with_image):
        if strict:
            assert torch.equal(found, latent) and torch.equal(seen, frames)
            continue
        error = float((found - latent).abs().max() / latent.abs().max())
        assert error <= TOLERANCE, error
        assert float((seen - frames).abs().max()) <= 1e-4
    assert frames.shape == (1, 9, 3, 64, 96)


def test_text_and_image_are_other_videos():
    """Negative control: the image matters, and it is the first latent frame."""
    without, given = alone(False)[0], alone(True)[0]
    z = PIPELINE.setup(device="cpu").image_encoder(gradient_image(64, 96))
    assert torch.equal(given[:, :, :1], z)
    assert (without[:, :, 1:] - given[:, :, 1:]).abs().max() > 1e-2


def test_places_that_are_not_cut_are_noticed():
    """Negative control: every rank's tokens would get the timesteps of the first tokens."""
    with pytest.raises(Exception, match=r"size of tensor|must match|shape"):
        run_ranks(sample, 2, "ring", 2, True, True)
