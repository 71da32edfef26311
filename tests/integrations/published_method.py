"""The published example of a method, word for word, with a transformer that it leaves out."""

import sys
from pathlib import Path

import pytest

from flashdreams.registry import VARIABLE

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
"""

TRANSFORMER = """
from dataclasses import dataclass, field

from flashdreams.infra.diffusion.transformer import Transformer, TransformerConfig


@dataclass(kw_only=True)
class MyTransformerConfig(TransformerConfig):
    '''A transformer that predicts no flow at all.'''

    _target: type["MyTransformer"] = field(default_factory=lambda: MyTransformer)
    latent_height: int = 4
    latent_width: int = 4


class MyTransformer(Transformer):
    '''Leaves the noise as it is.'''

    def initialize_cache(self, text):
        return list(text)

    def predict_flow(self, latent, timestep, cache):
        return latent * 0
"""


def write_published_method(folder: Path) -> None:
    """Write the package ``customized_method`` into a folder."""
    package = folder / "customized_method"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text(RUNNER)
    (package / "config.py").write_text(CONFIG)
    (package / "transformer.py").write_text(TRANSFORMER)


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the ``customized_method`` of a folder the one that this process runs."""
    for name in [n for n in sys.modules if n.split(".")[0] == "customized_method"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(VARIABLE, "customized-method=customized_method.config:RUNNER_CONFIGS")
