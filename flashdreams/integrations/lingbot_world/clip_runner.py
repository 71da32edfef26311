"""LingBot-World base on the command line: one clip, with or without a camera."""

from dataclasses import dataclass, field

from flashdreams.infra.config import derive_config
from flashdreams.infra.video_runner import take_length
from flashdreams.runtime.text import tell

from .camera import TIME_FACTOR, pixel_frames
from .runner import CameraToVideoRunner, CameraToVideoRunnerConfig


@dataclass(kw_only=True)
class CameraToClipRunnerConfig(CameraToVideoRunnerConfig):
    """An image, a prompt and an optional camera path to one clip."""

    _target: type["CameraToClipRunner"] = field(default_factory=lambda: CameraToClipRunner)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.has_camera:
            return
        alone = {
            "--intrinsic-path": self.intrinsic_path is not None,
            "--key-path": self.key_path is not None,
            "--show-path": self.show_path,
        }
        given = [name for name, there in alone.items() if there]
        if given:
            raise ValueError(
                f"{' and '.join(given)} without a camera: give --pose-path FILE or --actions too."
            )

    @property
    def has_camera(self) -> bool:
        """Whether a path is given; without one, only the prompt controls motion."""
        return self.pose_path is not None or self.actions is not None


class CameraToClipRunner(CameraToVideoRunner):
    """Writes one clip; a path shorter than the method's clip gives a shorter clip."""

    config: CameraToClipRunnerConfig

    def __init__(self, config: CameraToClipRunnerConfig) -> None:
        """Set the length of the clip from the path; otherwise as `CameraToVideoRunner`.

        Raises:
            ValueError: input that cannot be used; no weights have been read.
        """
        full = take_length(config).transformer.len_t
        super().__init__(config)
        frames = pixel_frames(self.config.transformer.len_t)
        if self.is_rank_zero and frames < pixel_frames(full):
            tell(
                f"The camera path has {self.num_poses} poses: the clip has {frames} frames "
                f"instead of {pixel_frames(full)}."
            )

    def fitted(self, config: CameraToVideoRunnerConfig, poses: int) -> CameraToVideoRunnerConfig:
        """The config with a clip no longer than its camera path.

        Source: Robbyant/lingbot-world, wan/image2video.py: 4 n + 1 frames, at most one per pose.
        """
        len_t = min(config.transformer.len_t, (poses - 1) // TIME_FACTOR + 1)
        if len_t == config.transformer.len_t:
            return config
        sizes = {"len_t": len_t, "window_size_t": len_t}
        return derive_config(config, pipeline={"diffusion_model": {"transformer": sizes}})
