"""How many functions of the engine lie between a runner's loop and a kernel."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flashdreams
from flashdreams.infra import runner as runner_module
from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import RUNNER_CONFIGS
from flashdreams.runtime import grad_mode
from tests.harness import run_ranks

OURS = str(Path(flashdreams.__file__).parent) + os.sep
BUDGET = {1: 12, 2: 13}
"""Ranks (Ulysses) -> functions from ``Runner.run`` to the attention kernel.

One rank: run, stream, Session.step, 2 x generate, sample, predict_flow, network, block, attention,
core, backend. Ulysses puts one more around the core.
"""


def functions_above() -> list[str]:
    """The engine's functions that are being called, outermost first, from the loop on.

    Every frame of a file of the engine counts: sessions, generators, decorators. Comprehensions do
    not: from Python 3.12 on they have no frame of their own.
    """
    names: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and (not names or names[-1] != "Runner.run"):
        code = frame.f_code
        if code.co_filename.startswith(OURS) and not code.co_name.endswith("comp>"):
            names.append(code.co_qualname)
        frame = frame.f_back
    return names[::-1]


def chains(folder: Path, wrapped: str | None = None) -> list[list[str]]:
    """The functions above every attention kernel of a run with two AR steps.

    Args:
        folder: for the files of the run.
        wrapped: a method of the pipeline that gets a decorator of the engine more.
    """
    config = derive_config(
        RUNNER_CONFIGS["self-forcing-tiny-random"], total_blocks=2, output_dir=folder, device="cpu"
    )
    found: list[list[str]] = []
    kernel = F.scaled_dot_product_attention

    def watched(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found.append(functions_above())
        return kernel(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "shutdown", lambda: None)  # the group is not the runner's
        runner = config.setup()
        if wrapped is not None:
            decorated = grad_mode.without_grad(getattr(runner.pipeline, wrapped))
            patch.setattr(runner.pipeline, wrapped, decorated)
        patch.setattr(F, "scaled_dot_product_attention", watched)
        runner.run()
        runner.close()
    return found


def depths(ranks: int, folder: Path, wrapped: str | None = None) -> dict[str, list[str]]:
    """The longest chain of denoising, clean pass and decoder, over all ranks."""
    found = [chain for each in run_ranks(chains, ranks, folder, wrapped) for chain in each]
    assert all(chain[0] == "Runner.run" for chain in found), found
    kinds = {
        "denoising": "FlowMatchScheduler.sample",
        "clean": "CausalTransformer.update_cache",
        "decoder": "StreamInferencePipeline._decode",
    }
    return {
        kind: max((chain for chain in found if name in chain), key=len)
        for kind, name in kinds.items()
    }


@pytest.mark.parametrize("ranks", BUDGET)
def test_few_functions_lie_between_the_loop_and_the_kernel(ranks: int, tmp_path: Path) -> None:
    """Counted from the runner's ``run`` on, without PyTorch's own wrappers."""
    longest = depths(ranks, tmp_path)
    for kind, chain in longest.items():
        assert len(chain) <= BUDGET[ranks], (kind, len(chain), chain)
    assert ("UlyssesAttention.forward" in longest["denoising"]) == (ranks == 2)
    assert {"Session.step", "Runner.stream"} < set(longest["denoising"])
    assert longest["denoising"][-1] == longest["clean"][-1] == "sdpa"


@pytest.mark.parametrize("ranks", BUDGET)
def test_a_decorator_more_is_seen(ranks: int, tmp_path: Path) -> None:
    """Negative control, also for frames of ``grad_mode.py``."""
    plain = depths(ranks, tmp_path)["denoising"]
    deeper = depths(ranks, tmp_path, "generate")["denoising"]
    assert len(deeper) == len(plain) + 1 > BUDGET[ranks], deeper
    assert "without_grad.<locals>.called" in set(deeper) - set(plain)
