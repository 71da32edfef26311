"""Matrix-Game 2.0 on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdreams.infra.controller import Controller
from flashdreams.infra.diffusion.given import INITIAL_LATENT, load_initial_latent
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.infra.session import Command, key_commands
from flashdreams.infra.video_runner import SPATIAL_FACTOR
from flashdreams.infra.weights import with_downloads
from flashdreams.runtime.actions import parse_actions
from flashdreams.runtime.image_file import drawn_image, has_shape, image_size, open_image, to_pixels

from .controls import KEYS, ActionController, ActionKeys, RecordedActions, Variant, read_actions
from .encoder import TIME_FACTOR
from .transformer import MatrixGameTransformerConfig


@dataclass(kw_only=True)
class MatrixGameRunnerConfig(RunnerConfig):
    """A world that starts from an image and is played with keys and mouse."""

    _target: type["MatrixGameRunner"] = field(default_factory=lambda: MatrixGameRunner)

    variant: Variant = "universal"
    """The variant of the weights, which determines the keys."""
    image_path: Path | None = None
    """The first frame: an RGB image of the video's shape."""
    fit_image: bool = False
    """Crop an image of another shape."""
    test_image: bool = False
    """Start from a drawn colour gradient if no image is given."""
    actions: str | None = None
    """Keys and the number of pixel frames they are held, from frame 0 on: "w20 wl8" walks, then
    walks and turns. Afterwards no key is held."""
    action_path: Path | None = None
    """An .npz file of actions instead: keyboard [frames, columns] and, with a mouse, mouse
    [frames, 2] (pitch and yaw), one row per pixel frame."""
    initial_latent: Path | None = None
    """A .safetensors file with latents of whole chunks, as written by --save-latents: the rollout
    starts with them and continues, with actions from frame 0 on. They count as AR
    steps."""
    total_blocks: int = 50
    """AR steps; each is one chunk of the video."""
    fps: int = 12
    """Frames per second of the video, as the official demo writes it."""
    download: bool = False
    """Download all weights that are not on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actions is not None and self.action_path is not None:
            raise ValueError(
                f"--action-path and --actions {self.actions!r} exclude each other: give one of "
                "them. Type --actions None for the file."
            )
        keys, sizes = self.keys, self.transformer
        if (sizes.keyboard_dim, sizes.mouse_dim is not None) != (keys.keyboard_dim, keys.has_mouse):
            raise ValueError(
                f"--variant {self.variant} has {keys.keyboard_dim} keyboard columns and "
                f"{'a' if keys.has_mouse else 'no'} mouse; the transformer has keyboard_dim="
                f"{sizes.keyboard_dim}, mouse_dim={sizes.mouse_dim}."
            )
        for held in parse_actions(self.actions or "", keys.names):
            keys.check(held)

    def for_serving(self) -> "MatrixGameRunnerConfig":
        """The config, controlled by keys and mouse; see `RunnerConfig.for_serving`.

        Raises:
            ValueError: actions from a file, which cannot be steered.
        """
        if self.action_path is not None:
            raise ValueError("--action-path: a live session is steered by its client; omit it.")
        return super().for_serving()

    @property
    def keys(self) -> ActionKeys:
        """The keys of the variant."""
        return KEYS[self.variant]

    @property
    def transformer(self) -> MatrixGameTransformerConfig:
        """Config of the transformer."""
        found = self.pipeline.diffusion_model.transformer
        if not isinstance(found, MatrixGameTransformerConfig):
            raise TypeError(
                f"{self.runner_name} needs a Matrix-Game transformer, got {type(found).__name__}."
            )
        return found


class MatrixGameRunner(Runner[MatrixGameRunnerConfig, StreamInferencePipeline]):
    """Plays key presses, or the actions of a file, into a video."""

    fetch_all = "--download True"

    def __init__(self, config: MatrixGameRunnerConfig) -> None:
        """Read and check image and actions, then build and load the pipeline.

        Raises:
            ValueError: input that cannot be used; no weights have been read.
        """
        self.recorded = None
        if config.action_path is not None:
            self.recorded = read_actions(config.action_path, config.keys)
            check_length(config, len(self.recorded.keyboard))
        self.image = read_first_frame(config)
        self.initial_latent = read_initial_latent(config)
        if config.download:
            config = replace(config, pipeline=with_downloads(config.pipeline))
        super().__init__(config)

    def conditions(self) -> dict[str, Any]:
        """The image and, where the rollout continues from a file, its latents."""
        found: dict[str, Any] = {"image": self.image.to(self.device)}
        if self.initial_latent is not None:
            found[INITIAL_LATENT] = self.initial_latent
        return found

    def controller(self) -> Controller:
        """Keys and mouse, or the actions of the file."""
        if self.recorded is not None:
            return RecordedActions(self.recorded)
        return ActionController(self.config.keys)

    def commands(self) -> Sequence[Command]:
        """The key presses of ``--actions``."""
        return key_commands(self.config.actions or "", self.config.keys.names, first_frame=0)


def check_length(config: MatrixGameRunnerConfig, frames: int) -> None:
    """Refuse a file with fewer actions than the video has frames.

    Raises:
        ValueError: states how many AR steps the file covers.
    """
    len_t = config.transformer.len_t
    wanted = 1 + TIME_FACTOR * (config.total_blocks * len_t - 1)
    if frames < wanted:
        enough = ((frames - 1) // TIME_FACTOR + 1) // len_t
        advice = f"Type --total-blocks {enough}" if enough else "Give more"
        raise ValueError(
            f"--action-path {config.action_path}: {frames} actions, and --total-blocks "
            f"{config.total_blocks} makes {wanted} frames. {advice}."
        )


def read_initial_latent(config: MatrixGameRunnerConfig) -> Tensor | None:
    """The latents at the start of the rollout; None if no file is given.

    Raises:
        ValueError: an invalid file, or latents of more AR steps than requested.
    """
    path, c = config.initial_latent, config.transformer
    if path is None:
        return None
    shape = (1, c.in_channels, c.len_t, c.latent_height, c.latent_width)
    return load_initial_latent(path, shape, "--initial-latent", config.total_blocks)


def read_first_frame(config: MatrixGameRunnerConfig) -> Tensor:
    """The first frame ``[1, 3, height, width]`` in [-1, 1].

    As in the official code its centre is cropped to the video's shape and resized by Pillow, with
    antialiasing and 8-bit values; a larger crop requires --fit-image.

    Raises:
        ValueError: the file is missing, not an image, or has another shape.
    """
    height = config.transformer.latent_height * SPATIAL_FACTOR
    width = config.transformer.latent_width * SPATIAL_FACTOR
    if config.image_path is None:
        return drawn_image(config.runner_name, height, width, drawn=config.test_image)
    columns, rows = size = image_size(config.image_path)
    if not config.fit_image and not has_shape(size, height, width):
        raise ValueError(
            f"--image-path {config.image_path}: the image is {columns}x{rows} (width x height); "
            f"this run needs the shape of {width}x{height}. Type --fit-image True to crop it."
        )
    from PIL import Image

    kept_rows, kept_columns = rows, columns
    if columns / rows > width / height:
        kept_columns = max(1, int(rows * width / height))
    else:
        kept_rows = max(1, int(columns * height / width))
    left, top = (columns - kept_columns) / 2, (rows - kept_rows) / 2
    image = open_image(config.image_path).crop((left, top, left + kept_columns, top + kept_rows))
    return to_pixels(image.resize((width, height), Image.Resampling.BILINEAR))
