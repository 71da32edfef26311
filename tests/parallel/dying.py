"""The toy world as a plug-in of which rank 1 is killed in the stage that ``DIES_AT`` names."""

import os
import signal
import time

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.runner import ToyWorldRunner


def reach(stage: str) -> None:
    """Die here if that is the stage, once the other rank waits for this one."""
    if os.environ["RANK"] == "1" and os.environ["DIES_AT"] == stage:
        time.sleep(0.5)
        # The agent, too, must not ask how this process ended before the other rank has looked.
        os.kill(os.getppid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)


def reached_by(owner: type, method: str, stage: str) -> None:
    """Let a method of a class reach a stage before it does anything."""
    inner = getattr(owner, method)

    def call(self, *arguments):
        reach(stage)
        return inner(self, *arguments)

    setattr(owner, method, call)


reach("import")
reached_by(ToyWorldRunner, "__init__", "meeting")
reached_by(StreamInferencePipeline, "warm_up", "warm-up")
DYING = TOY_WORLD_RUNNER
