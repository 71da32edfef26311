"""Resource use of a session, measured with a trial session, and how many sessions fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashdreams.infra.controller import Controller
from flashdreams.infra.fork import copied_bytes
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.session import Session
from flashdreams.infra.state import StateError
from flashdreams.parallel.environment import least_of_all_ranks
from flashdreams.parallel.messages import MessageChannel
from flashdreams.runtime.stats import free_bytes

DERIVED_SESSIONS = 8
"""Default upper bound on sessions per server, because each one slows down all others."""
RESERVE = 0.05
"""Share of the free memory that is kept in reserve."""
MOST_STEPS = 24
"""Maximum number of AR steps of the trial."""


@dataclass(frozen=True)
class Trial:
    """Measured resource use of one session on this rank."""

    rollout_bytes: int
    """Memory of its state."""
    step_bytes: int
    """Temporary memory of an AR step; sessions take turns, so they share it."""
    chunk_frames: int
    """Pixel frames of the last chunk."""
    height: int
    width: int
    keeps: bool
    """Whether its state can be saved, forked and parked."""


def try_session(
    pipeline: StreamInferencePipeline,
    conditions: Mapping[str, Any],
    controller: Controller | None,
    channel: MessageChannel,
) -> Trial:
    """Run a session until its AR steps are in the steady state, and measure it; a collective call.

    Args:
        pipeline: loaded and warmed up.
        conditions: initial conditions of sessions.
        controller: controller of sessions, or None.
        channel: to the other ranks.

    Raises:
        TypeError: the method produces no pictures.
    """
    device, transformer = pipeline.target_device, pipeline.diffusion_model.transformer
    before = _allocated(device)
    session = Session(pipeline, conditions, controller=controller, channel=channel, name="trial")
    held = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = min(MOST_STEPS, max(3, transformer.warm_up_steps + 1)) if streams(pipeline) else 1
    for _ in range(steps):
        step = session.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    shape = () if step.chunk is None else tuple(step.chunk.shape)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    keeps, state = True, 0
    try:
        state = copied_bytes(session.cache, pipeline.layout)
    except StateError:
        keeps = False
    session.release()
    if shape and (len(shape) != 5 or shape[2] != 3):
        raise TypeError(
            f"a served method makes pictures [1, F, 3, height, width]; this one makes {list(shape)}"
        )
    return Trial(
        rollout_bytes=max(held - before, state),
        step_bytes=max(0, peak - held),
        chunk_frames=len(step.frames),
        height=shape[3] if shape else 0,
        width=shape[4] if shape else 0,
        keeps=keeps,
    )


def streams(pipeline: StreamInferencePipeline) -> bool:
    """Whether a method generates its video chunk by chunk; if not, a session has one chunk."""
    return bool(getattr(pipeline.diffusion_model.transformer.config, "streaming", True))


def count_places(trial: Trial, device: torch.device, max_sessions: int | None, pooled: int) -> int:
    """How many sessions may be on the device at a time; a collective call.

    Args:
        trial: measurements of one session.
        device: device of the sessions.
        max_sessions: requested number; None: as many as fit, at most `DERIVED_SESSIONS`.
        pooled: sessions whose state is allocated already.

    Raises:
        ValueError: fewer fit than requested.
    """
    free = free_bytes(device)
    fits = DERIVED_SESSIONS if max_sessions is None else max_sessions
    room = int(free * (1 - RESERVE)) - trial.step_bytes
    fits = min(fits, pooled + max(0, room) // max(1, trial.rollout_bytes))
    fits = least_of_all_ranks(fits)
    if fits < (max_sessions or 1):
        gib = 2**30
        raise ValueError(
            f"--max-sessions {max_sessions or 1}: a session takes {trial.rollout_bytes / gib:.2f} "
            f"GiB and an AR step {trial.step_bytes / gib:.2f} GiB more; {free / gib:.2f} "
            f"GiB are free on {device}: {fits} fit. Ask for fewer, or for a smaller window."
        )
    return fits


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
