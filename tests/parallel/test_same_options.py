"""Ranks that were started with different options are refused before they compute."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import save_file

from flashdreams import run
from flashdreams.infra.config import derive_config
from flashdreams.infra.same_options import refuse_other_options, refuse_other_weights
from flashdreams.integrations.self_forcing.config import TINY_RUNNER
from flashdreams.parallel.environment import RankZeroError
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.harness import run_ranks

RUNNER = derive_config(TINY_RUNNER, device="cpu", total_blocks=1)


def start(folder: Path, *changes: dict) -> tuple[int, str]:
    """Exit code of a rank, and what it says, where the last rank has the last options."""
    run._PAUSE_S = 0.0
    is_last = dist.get_rank() == dist.get_world_size() - 1
    config = derive_config(replace(RUNNER, output_dir=folder), **changes[-is_last])
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run._run(config, debug=False)
    return code, stderr.getvalue()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "--seed is 5 on rank 1, 0 on rank 0"),
        ({"prompt": "a dog"}, "--prompt is 'a dog' on rank 1"),
        (
            {"pipeline": {"diffusion_model": {"transformer": {"window_size_t": 9}}}},
            "--pipeline.diffusion-model.transformer.window-size-t is 9 on rank 1",
        ),
    ],
)
def test_other_options_on_one_rank_are_named(change: dict, named: str, tmp_path: Path) -> None:
    (code, said), (other, _) = run_ranks(start, 2, tmp_path, {}, change)
    assert (code, other) == (run.WRONG_USAGE, run.RUN_FAILED) and named in said
    assert said.count("\n") == 1 and not list(tmp_path.glob("*.mp4"))


def compare(folder: Path, prompt: str) -> str:
    """What a rank is told where ranks differ in what belongs to a node."""
    path = folder / f"prompt{dist.get_rank()}.txt"
    path.write_text(prompt if dist.get_rank() == 1 else "A dog.")
    config = replace(RUNNER, prompt_path=path)
    if dist.get_rank() == 1:
        config = replace(config, output_dir=folder, threads=1, log_json=True, device="auto")
    try:
        refuse_other_options(config)
    except ValueError as error:
        return str(error)
    except RankZeroError:
        return "refused"
    return "same"


def test_paths_and_devices_of_a_node_may_differ(tmp_path: Path) -> None:
    """Negative control."""
    assert run_ranks(compare, 2, tmp_path, "A dog.") == ["same", "same"]


def test_files_of_other_content_are_refused(tmp_path: Path) -> None:
    said, other = run_ranks(compare, 2, tmp_path, "A cat.")
    assert "--prompt-path is a file of SHA-256 " in said and other == "refused"


def weigh(*changes: dict) -> None:
    config = derive_config(RUNNER, **changes[dist.get_rank()])
    refuse_other_weights(config.pipeline)


@pytest.mark.parametrize("changed", [0.0, 1e-3])
def test_weights_of_other_content_are_refused(changed: float, tmp_path: Path) -> None:
    transformer = RUNNER.pipeline.setup(device="cpu").diffusion_model.transformer
    changes = []
    for rank in range(2):
        path = tmp_path / str(rank) / "weights.safetensors"
        path.parent.mkdir()
        weights = {name: x.contiguous() for name, x in transformer.state_dict().items()}
        last = sorted(weights)[-1]
        save_file({**weights, last: weights[last] + rank * changed}, path)
        checkpoint = {"transformer": {"checkpoint": CheckpointConfig(source=str(path))}}
        changes.append({"pipeline": {"diffusion_model": checkpoint}})
    if not changed:  # negative control: each rank has its own copy
        run_ranks(weigh, 2, *changes)
        return
    (code, said), (other, _) = run_ranks(start, 2, tmp_path, *changes)
    assert (code, other) == (run.WRONG_USAGE, run.RUN_FAILED) and said.count("\n") == 1
    assert "The ranks have different weights: --pipeline.diffusion-model.transformer is " in said
