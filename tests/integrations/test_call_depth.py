"""How many functions of the engine lie between a runner's loop and a kernel."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import flashdreams
from flashdreams.attention.backends import sdpa
from flashdreams.attention.core import AttentionCore
from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import RUNNER_CONFIGS
from flashdreams.runtime import grad_mode

OURS = str(Path(flashdreams.__file__).parent)
WRAPPER = grad_mode.__file__
"""Decorates what begins an AR step, in the place of two of PyTorch's own."""
BUDGET = 11
"""run, 2 x generate, sample, flow, predict_flow, network, block, self-attention, core, backend."""


def functions_above() -> Iterator[str]:
    """Names of the engine's functions that are being called, innermost first.

    Comprehensions are none: from Python 3.12 on they have no frame of their own. Nor is the
    decorator that sets the mode of autograd.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        counts = code.co_filename.startswith(OURS) and code.co_filename != WRAPPER
        if counts and not code.co_name.endswith("comp>"):
            yield code.co_name
        frame = frame.f_back


def test_eleven_functions_lie_between_the_loop_and_the_kernel(tmp_path: Path) -> None:
    """Counted from the runner's ``run`` on, without PyTorch's own wrappers."""
    config = derive_config(
        RUNNER_CONFIGS["self-forcing-tiny-random"], total_blocks=1, output_dir=tmp_path
    )
    runner = config.setup()
    depths: list[list[str]] = []

    def backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> Any:
        depths.append(["backend", *functions_above()])
        return sdpa(q, k, v, **kwargs)

    for module in runner.pipeline.modules():
        if isinstance(module, AttentionCore):
            module.backend = backend
    runner.run()
    runner.close()
    denoising = [names for names in depths if "sample" in names]
    assert denoising and all(names[-1] == "run" for names in denoising)
    deepest = max(denoising, key=len)
    assert len(deepest) == BUDGET, deepest[::-1]
