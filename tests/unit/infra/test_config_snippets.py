"""The published snippets of the config system and of registering a method, as they are written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdreams import run
from flashdreams.infra.config import derive_config
from flashdreams.infra.decoder.base import StreamingDecoderConfig
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.transformer import TransformerConfig
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from tests.integrations.published_method import register, write_published_method


@dataclass(kw_only=True)
class MyEncoderConfig(EncoderConfig):
    """My custom encoder config."""

    # Point to the class that will be instantiated by this config
    _target: type["MyEncoder"] = field(default_factory=lambda: MyEncoder)

    # Expose your configurable parameters
    embedding_dim: int = 512
    num_layers: int = 6


class MyEncoder(Encoder):
    """My custom encoder model.

    Args:
        config: Configuration to instantiate the encoder.
    """

    # Enable type checking
    config: MyEncoderConfig

    def __init__(self, config: MyEncoderConfig) -> None:
        super().__init__(config)
        # Build your layers using self.config.embedding_dim, etc.
        ...

    def forward(self, input: Any) -> Any:
        return input


@pytest.fixture
def my_base() -> StreamInferencePipelineConfig:
    return StreamInferencePipelineConfig(
        name="customized-method-name",
        encoder=MyEncoderConfig(),
        diffusion_model=DiffusionModelConfig(
            transformer=TransformerConfig(),
            scheduler=FlowMatchSchedulerConfig(),
        ),
        decoder=StreamingDecoderConfig(),
    )


def test_a_component_is_made_by_its_config() -> None:
    encoder = MyEncoderConfig(embedding_dim=8).setup()
    assert type(encoder) is MyEncoder
    assert encoder.config.embedding_dim == 8
    assert encoder(torch.ones(1)) == torch.ones(1)


def test_a_pipeline_config_is_composed_and_varied(my_base: StreamInferencePipelineConfig) -> None:
    my_variant_config = derive_config(
        my_base,
        encoder=dict(embedding_dim=1024),
    )
    assert my_variant_config.encoder == MyEncoderConfig(embedding_dim=1024)
    assert my_base.encoder == MyEncoderConfig()
    assert my_variant_config.diffusion_model == my_base.diffusion_model
    assert my_variant_config != my_base


def test_a_registered_method_is_listed_explained_and_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_published_method(tmp_path)
    register(monkeypatch, tmp_path)
    assert run.main(["--help"]) == 0
    assert "Custom description for my method." in capsys.readouterr().out
    assert run.main(["customized-method", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--prompt STR" in out
    assert "--pipeline.diffusion-model.transformer.use-cuda-graph {True,False}" in out
    flags = [
        "--prompt", "A beautiful custom generation.", "--total-blocks", "7",
        "--pipeline.diffusion-model.transformer.use-cuda-graph", "True",
    ]  # fmt: skip
    assert run.main(["customized-method", *flags, "--no-instantiate"]) == 0
    out = capsys.readouterr().out
    for line in (
        "prompt='A beautiful custom generation.'",
        "total_blocks=7",
        "use_cuda_graph=True",
    ):
        assert f"{line}," in out
