"""The method on the command line: initial conditions and controls of a rollout."""

from dataclasses import dataclass, field

from flashdreams.infra.controller import KeyCamera
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.infra.session import Command, key_commands
from flashdreams.runtime.actions import KeyMotion, parse_actions


@dataclass(kw_only=True)
class StreamingMethodRunnerConfig(RunnerConfig):
    """Fly over a plane of colours."""

    _target: type["StreamingMethodRunner"] = field(default_factory=lambda: StreamingMethodRunner)

    prompt: str = "a quilt of silk"
    """What the plane is made of."""
    actions: str = "w24 wl20 d24 s20 aj24"
    """Keys and how many frames they are held: w a s d move, j l turn, "wl6" holds two together."""
    total_blocks: int = 40
    """AR steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_actions(self.actions)


class StreamingMethodRunner(Runner[StreamingMethodRunnerConfig, StreamInferencePipeline]):
    """Streams a flight; the loop, the prompt and the video are those of `Runner`."""

    def controller(self) -> KeyCamera:
        """A camera whose poses ``[T, 4, 4]`` are the control input of a chunk."""
        motion = KeyMotion(move_per_frame=0.04, turn_per_frame_rad=0.03)
        return KeyCamera(motion, to_input=lambda poses, held: poses)

    def commands(self) -> list[Command]:
        """The key presses of ``--actions``."""
        return key_commands(self.config.actions)
