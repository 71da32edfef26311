"""The published snippets of the config system and of registering a method, as they are written."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashdreams import run
from flashdreams.infra.config import derive_config
from flashdreams.infra.config_file import dump_config, load_config
from flashdreams.infra.decoder.base import StreamingDecoderConfig
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.registry import VARIABLE, discover

pytest.importorskip("flashdreams.infra.runner")

from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.transformer import Transformer, TransformerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig

RUNNER = """
from dataclasses import dataclass, field
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner, RunnerConfig

@dataclass(kw_only=True)
class CustomizedMethodRunnerConfig(RunnerConfig):
    '''Runner config for my method.'''
    _target: type["CustomizedMethodRunner"] = field(default_factory=lambda: CustomizedMethodRunner)
    prompt: str = "A cat surfing."
    total_blocks: int = 60

class CustomizedMethodRunner(Runner[CustomizedMethodRunnerConfig, StreamInferencePipeline]):
    def run(self) -> None:
        cfg = self.config

        # 1. Initialize the autoregressive cache
        cache = self.pipeline.initialize_cache(text=[cfg.prompt])

        # 2. Drive the autoregressive rollout
        for i in range(cfg.total_blocks):
            video_chunk = self.pipeline.generate(autoregressive_index=i, cache=cache)
            self.pipeline.finalize(autoregressive_index=i, cache=cache)

        if self.is_rank_zero:
            # 3. Write outputs only on the main process
            ...
"""

CONFIG = """
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig

from customized_method.runner import CustomizedMethodRunnerConfig
from customized_method.transformer import MyTransformerConfig

# Define your pipeline config literal
CUSTOMIZED_PIPELINE_CONFIG = StreamInferencePipelineConfig(
    name="customized-method",
    diffusion_model=DiffusionModelConfig(
        transformer=MyTransformerConfig(),
        scheduler=FlowMatchSchedulerConfig(),
    ),
)

# Define your runner config
CUSTOMIZED_METHOD_RUNNER = CustomizedMethodRunnerConfig(
    runner_name=CUSTOMIZED_PIPELINE_CONFIG.name,
    description="Custom description for my method.",
    pipeline=CUSTOMIZED_PIPELINE_CONFIG,
)
RUNNER_CONFIGS = {CUSTOMIZED_METHOD_RUNNER.runner_name: CUSTOMIZED_METHOD_RUNNER}

def deferred():
    return RUNNER_CONFIGS
"""


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


@dataclass(kw_only=True)
class MyTransformerConfig(TransformerConfig):
    """My transformer."""

    _target: type["MyTransformer"] = field(default_factory=lambda: MyTransformer)


class MyTransformer(Transformer):
    """Never run here."""


@pytest.fixture
def my_base() -> StreamInferencePipelineConfig:
    return StreamInferencePipelineConfig(
        name="customized-method-name",
        encoder=MyEncoderConfig(),
        diffusion_model=DiffusionModelConfig(
            transformer=MyTransformerConfig(),
            scheduler=FlowMatchSchedulerConfig(),
        ),
        decoder=StreamingDecoderConfig(),
    )


@pytest.fixture
def customized_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed's package, with a transformer, importable but not installed."""
    package = tmp_path / "customized_method"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text(RUNNER)
    (package / "config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "customized_method"]:
        monkeypatch.delitem(sys.modules, name)
    transformer = ModuleType("customized_method.transformer")
    transformer.MyTransformerConfig = MyTransformerConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, transformer.__name__, transformer)


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


def test_a_pipeline_config_round_trips(my_base: StreamInferencePipelineConfig) -> None:
    assert load_config(dump_config(my_base), [my_base]) == my_base


@pytest.mark.parametrize("attr", ["CUSTOMIZED_METHOD_RUNNER", "RUNNER_CONFIGS", "deferred"])
@pytest.mark.usefixtures("customized_method")
def test_a_method_registers_for_the_time_being(monkeypatch: pytest.MonkeyPatch, attr: str) -> None:
    monkeypatch.setenv(VARIABLE, f"customized-method=customized_method.config:{attr}")
    found = discover()
    config: Any = found["customized-method"]
    assert config.description == "Custom description for my method."
    assert config.total_blocks == 60
    assert not [broken for broken in found.broken if broken.slug == "customized-method"]


@pytest.mark.usefixtures("customized_method")
def test_a_registered_method_is_listed_explained_and_overridden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "customized-method=customized_method.config:RUNNER_CONFIGS")
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


@pytest.mark.usefixtures("customized_method")
def test_a_registered_method_goes_through_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "customized-method=customized_method.config:RUNNER_CONFIGS")
    assert run.main(["customized-method", "--total-blocks", "9", "--print-config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert run.main(["--config", str(file), "--no-instantiate", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "total_blocks=9," in out
    assert "seed=5," in out
