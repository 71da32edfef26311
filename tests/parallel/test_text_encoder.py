"""Prompts encoded on rank zero alone (float32, 1e-5 against one rank; embeddings the same bits)."""

import contextlib
import io
from dataclasses import dataclass, field

import pytest
import torch

from flashdreams import run
from flashdreams.infra import assembly
from flashdreams.infra import runner as runner_module
from flashdreams.infra.config import derive_config
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.integrations.self_forcing.config import TINY_RUNNER
from flashdreams.models.prompts import HashTextEncoder
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.checkpoint import CheckpointError
from tests.harness import RankError, run_ranks
from tests.parallel.rollout import relative_error
from tests.tiny import TEXT_DIM, tiny_pipeline

RANK_ZERO_FAILED = "Rank zero failed; see its own message."


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


def start_runner(folder, prompt, check):
    """Exit code of a rank, what it said, and whether it began to load."""
    loads = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(assembly, "fetch_weights", lambda *args, **options: loads.append(args))
        patch.setattr(runner_module, "shutdown", lambda: None)  # the group is not the runner's
        patch.setattr(run, "_PAUSE_S", 0.0)
        patch.setattr(HashTextEncoder, "check_input", check)
        config = derive_config(TINY_RUNNER, prompt=prompt, output_dir=folder, device="cpu")
        code = run._run(derive_config(config, total_blocks=1), debug=False)
    return code, stderr.getvalue(), bool(loads)


def without_tokenizer(encoder, prompts):
    raise CheckpointError("tokenizer.json is not a tokenizer")


def test_a_prompt_too_long_ends_all_ranks_before_they_load(tmp_path):
    said = "prompt 0 has 33 words, 32 are allowed: shorten it by 1\n"
    check = HashTextEncoder.check_input
    assert run_ranks(start_runner, 2, tmp_path, "word " * 33, check) == [
        (2, f"flashdreams-run: error: --prompt: {said}", False),
        (2, f"flashdreams-run: error on rank 1: --prompt: {said}", False),
    ]
    assert not list(tmp_path.iterdir())
    fits = run_ranks(start_runner, 2, tmp_path, "word " * 32, check)
    assert [(code, loaded) for code, _, loaded in fits] == [(0, True)] * 2


def test_what_rank_zero_lacks_for_prompts_ends_all_ranks_before_they_load(tmp_path):
    assert run_ranks(start_runner, 2, tmp_path, "word", without_tokenizer) == [
        (2, "flashdreams-run: error: tokenizer.json is not a tokenizer\n", False),
        (1, f"flashdreams-run: error on rank 1: {RANK_ZERO_FAILED}\n", False),
    ]
