"""The published example of a method, word for word, with a transformer that it leaves out."""

import sys
from pathlib import Path

import pytest

from flashdreams.registry import VARIABLE
from tests.unit.infra.test_config_snippets import CONFIG, RUNNER

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
