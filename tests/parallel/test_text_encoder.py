"""Prompts encoded on rank zero alone (float32, 1e-5 against one rank; embeddings the same bits)."""

from dataclasses import dataclass, field

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import RankError, run_ranks
from tests.parallel.rollout import relative_error
from tests.tiny import TEXT_DIM, tiny_pipeline


@dataclass(kw_only=True)
class LetterEncoderConfig(EncoderConfig):
    _target: type["LetterEncoder"] = field(default_factory=lambda: LetterEncoder)


class LetterEncoder(Encoder):
    """One token per letter; counts its calls."""

    calls = 0

    def example_input(self):
        return ["any"]

    def forward(self, input):
        type(self).calls += 1
        if any(not text.isascii() for text in input):
            raise ValueError("only ASCII letters, please")
        letters = [[float(ord(c)) for c in text[:3].ljust(3)] for text in input]
        return torch.sin(torch.tensor(letters)[..., None] * torch.arange(1, TEXT_DIM + 1))


def build(world_size, **changes):
    config = derive_config(tiny_pipeline(), text_encoder=LetterEncoderConfig(), **changes)
    pipeline = config.setup(device="cpu", load=False)
    degrees = resolve_degrees(ParallelConfig(), world_size, 2)
    pipeline.parallelize(build_mesh(degrees, "cpu"))
    pipeline.load()
    return pipeline


def roll(world_size, prompts):
    pipeline = build(world_size)
    pipeline.warm_up()
    cache = pipeline.initialize_cache(text=[prompts[0]])
    latents = []
    for index, prompt in enumerate(prompts):
        if index > 0:
            pipeline.update_prompt(cache, prompt)
        pipeline.generate(index, cache, 0.1)
        pipeline.finalize(index, cache)
        latents.append(cache.latent)
    return latents, cache.context["text"], LetterEncoder.calls, pipeline.text_encoder is None


def test_prompts_are_encoded_on_rank_zero_and_reach_all():
    latents, text, calls, _ = run_ranks(roll, 1, 1, ["sea", "fog", "sun"])[0]
    ranks = run_ranks(roll, 3, 3, ["sea", "fog", "sun"])
    assert [rank[2] for rank in ranks] == [calls, 0, 0] and calls == 1 + 3, "once to warm up"
    assert [rank[3] for rank in ranks] == [False, True, True]
    for rank in ranks:
        assert torch.equal(rank[1], text)
        assert relative_error(rank[0], latents) <= 1e-5
    other = run_ranks(roll, 1, 1, ["sea", "fog", "ice"])[0][0]
    assert relative_error(other, latents) > 1e-3


def test_a_prompt_that_rank_zero_refuses_stops_all_ranks():
    with pytest.raises(RankError, match=r"only ASCII letters|Rank zero failed"):
        run_ranks(roll, 2, 2, ["Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"])


def test_the_text_encoder_can_be_released():
    config = derive_config(
        tiny_pipeline(), text_encoder=LetterEncoderConfig(), release_text_encoder=True
    )
    pipeline = config.setup(device="cpu")
    cache = pipeline.initialize_cache(text=["sea"])
    assert pipeline.text_encoder is None
    pipeline.update_prompt(cache, torch.zeros(1, 2, TEXT_DIM))
    with pytest.raises(ValueError, match="release_text_encoder=False"):
        pipeline.update_prompt(cache, "fog")
