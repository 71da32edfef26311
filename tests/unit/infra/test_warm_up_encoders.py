"""Encoders of the prompt and the image are called once before the first rollout."""

from dataclasses import dataclass, field

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.models.clip import CLIPImageEncoderConfig
from flashdreams.models.wan.config import TINY_IMAGE_CONDITION_ENCODER, TINY_VAE_IMAGE_ENCODER
from flashdreams.runtime.checkpoint import CheckpointError
from tests.tiny import TEXT_DIM, tiny_pipeline


@dataclass(kw_only=True)
class LazyEncoderConfig(EncoderConfig):
    _target: type["LazyEncoder"] = field(default_factory=lambda: LazyEncoder)
    example: str | None = "a"
    fails: type[Exception] | None = None


class LazyEncoder(Encoder):
    """Notes what it is called with; may lack what it needs."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def example_input(self):
        return None if self.config.example is None else [self.config.example]

    def forward(self, input):
        self.seen.append(input)
        if self.config.fails is not None:
            raise self.config.fails("not installed")
        return torch.stack([torch.full((2, TEXT_DIM), float(len(text))) for text in input])


def build(**fields):
    return derive_config(tiny_pipeline(), text_encoder=LazyEncoderConfig(**fields)).setup()


def first_chunk(pipeline, text):
    cache = pipeline.initialize_cache(text=text)
    return pipeline.generate(autoregressive_index=0, cache=cache, input=0.0)


def test_a_text_encoder_is_called_once_whatever_the_device():
    pipeline = build()
    pipeline.warm_up()
    pipeline.warm_up()
    assert pipeline.text_encoder.seen == [["a"]]


def test_rollouts_do_not_notice_the_call():
    warm, cold = build(), build()
    warm.warm_up()
    chunk = first_chunk(warm, ["a long prompt"])
    assert torch.equal(chunk, first_chunk(cold, ["a long prompt"]))
    assert not torch.equal(chunk, first_chunk(cold, ["another"]))


def test_an_encoder_without_an_example_is_left_alone():
    pipeline = build(example=None)
    pipeline.warm_up()
    assert pipeline.text_encoder.seen == []


@pytest.mark.parametrize("missing", [ImportError, CheckpointError])
def test_what_is_missing_is_missed_by_the_first_prompt_alone(missing):
    pipeline = build(fails=missing)
    pipeline.warm_up()
    assert first_chunk(pipeline, torch.zeros(1, 2, TEXT_DIM)) is not None
    with pytest.raises(missing, match="not installed"):
        pipeline.initialize_cache(text=["a prompt"])


def test_an_encoder_that_fails_otherwise_is_heard():
    with pytest.raises(ZeroDivisionError):
        build(fails=ZeroDivisionError).warm_up()


@pytest.mark.parametrize(
    "config",
    [
        CLIPImageEncoderConfig(image_size=28, dim=32, out_dim=16, num_heads=2, num_layers=2),
        TINY_VAE_IMAGE_ENCODER,
        TINY_IMAGE_CONDITION_ENCODER,
    ],
    ids=lambda config: type(config).__name__,
)
def test_examples_of_shipped_encoders_fit_them(config):
    encoder = config.setup()
    assert encoder(encoder.example_input()) is not None
