"""The example in the documentation: what the model imagines chooses what the truth would."""

import runpy
from pathlib import Path

import pytest

from flashdreams.integrations.toy_world import config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/source/examples/model_predictive_control.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
    reason="needs the toy world's weights",
)
def test_the_search_reaches_the_goal_and_agrees_with_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLE))
    runner = config.TOY_WORLD_RUNNER.setup()
    rows = example["search"](runner, 4)
    runner.close()
    assert len(example["CANDIDATES"]) == 8
    assert sum(best == ideal for best, ideal, _ in rows) >= 3
    reached = [psnr for *_, psnr in rows]
    assert reached[-1] > reached[0] + 5  # of the goal's picture, in dB


@pytest.mark.slow
def test_walking_blindly_does_not_reach_it(tmp_path, monkeypatch):
    """Negative control: the same number of steps with keys that nobody compared."""
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLE))
    example["search"].__globals__["CANDIDATES"] = ("j",)
    runner = config.TOY_WORLD_RUNNER.setup()
    reached = [psnr for *_, psnr in example["search"](runner, 3)]
    runner.close()
    assert reached[-1] < reached[0] + 5
