"""A toy world whose run goes wrong at its third AR step, in a way that the config names."""

import os
import signal
import time
from dataclasses import dataclass, field, fields
from typing import Literal

from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.runner import ToyWorldRunner, ToyWorldRunnerConfig

STEP = 2


@dataclass(kw_only=True)
class FaultyRunnerConfig(ToyWorldRunnerConfig):
    """Config of the toy world that fails."""

    _target: type["FaultyRunner"] = field(default_factory=lambda: FaultyRunner)

    fault: Literal["raise", "die", "stats", "video", "slow"] = "raise"
    """raise and die: rank 1 does; stats and video: rank zero cannot write; slow: steps of 0.2 s."""


class FaultyRunner(ToyWorldRunner):
    """Fails while it asks for the next AR step."""

    config: FaultyRunnerConfig

    def progress(self, total_blocks):
        """The AR indices, and the fault before the third."""
        fault, folder = self.config.fault, self.config.output_dir
        (folder / f"pid{self.environment.rank}").write_text(str(os.getpid()))
        for index in super().progress(total_blocks):
            if index == STEP and not self.is_rank_zero:
                (folder / "fault").touch()
                if fault == "raise":
                    raise LookupError("the map is torn")
                if fault == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
            if index == STEP and self.is_rank_zero and fault == "stats":
                (folder / f"stats_{self.config.runner_name}.json").mkdir()
            if fault == "slow":
                (folder / f"step{index}").touch()
                time.sleep(0.2)
            yield index

    def open_video(self, scale=1):
        """A writer; one that cannot make its file final where the fault says so."""
        writer = super().open_video(scale)
        if self.config.fault == "video":
            writer.path.mkdir()
        return writer


_SHARED = [f.name for f in fields(TOY_WORLD_RUNNER) if f.name not in ("_target", "runner_name")]

FAULTY = FaultyRunnerConfig(
    runner_name="faulty", **{name: getattr(TOY_WORLD_RUNNER, name) for name in _SHARED}
)
