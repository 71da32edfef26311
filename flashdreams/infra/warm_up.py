"""What a pipeline does before its first rollout, so that no rollout pays for it."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flashdreams.infra.pipeline import StreamInferencePipeline


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What was built before the first rollout."""

    ms: float
    """Milliseconds that it took."""

    steps: int
    """AR steps that were run with dummy values."""

    def __str__(self) -> str:
        return f"{self.ms / 1e3:.1f} s, {self.steps} AR steps with dummy values"

    def stats(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {"warm_up_ms": self.ms, "warm_up_steps": self.steps}


def warm_up(pipeline: "StreamInferencePipeline") -> WarmUp:
    """Run every form that a network call takes once; see `StreamInferencePipeline.warm_up`."""
    start = time.perf_counter()
    steps = pipeline.diffusion_model.warm_up()
    if pipeline.target_device.type == "cuda":
        torch.cuda.synchronize(pipeline.target_device)
    return WarmUp(ms=1e3 * (time.perf_counter() - start), steps=steps)
