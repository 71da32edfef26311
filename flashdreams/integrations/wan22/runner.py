"""Wan 2.2 TI2V on the command line: one slug for text and for image and text."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from flashdreams.infra.video_runner import (
    ImageToVideoRunner,
    ImageToVideoRunnerConfig,
    TextToVideoRunnerConfig,
)
from flashdreams.runtime.image_file import gradient_image, image_size, load_image

from .image import load_covering, size_of_shape


@dataclass(kw_only=True)
class TextImageToVideoRunnerConfig(ImageToVideoRunnerConfig):
    """A prompt, with or without a first image, to video."""

    _target: type["TextImageToVideoRunner"] = field(default_factory=lambda: TextImageToVideoRunner)

    image_path: Path | None = None
    """The first frame, an RGB image; None makes the video from the prompt alone. Unless --height or
    --width is given, the video takes the image's aspect ratio."""
    fit_image: bool = False
    """With --height or --width: scale and crop an image of another size."""
    max_pixels: int = 704 * 1280
    """Most pixels of a frame whose size is derived from the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pixels < self.size_unit**2:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: must be at least {self.size_unit**2}, a frame of "
                f"{self.size_unit}x{self.size_unit}."
            )

    @property
    def size_unit(self) -> int:
        """Pixels that height and width are multiples of."""
        return self.spatial_factor * max(self.transformer.patch_size[1:])


class TextImageToVideoRunner(ImageToVideoRunner):
    """Streams one video into a file."""

    config: TextImageToVideoRunnerConfig

    def __init__(self, config: TextImageToVideoRunnerConfig) -> None:
        super().__init__(take_shape(config))

    def first_image(self, config: TextToVideoRunnerConfig) -> Tensor | None:
        """The image of the config, ``[1, 3, height, width]`` in [-1, 1]; None without one."""
        c = cast(TextImageToVideoRunnerConfig, config)
        height, width = c.frame_size
        if c.image_path is None:
            return gradient_image(height, width) if c.test_image else None
        load = load_covering if c.fit_image else load_image
        return load(c.image_path, height, width)


def take_shape(config: TextImageToVideoRunnerConfig) -> TextImageToVideoRunnerConfig:
    """Derive the size of the video from its image, unless a size is given.

    Raises:
        ValueError: the file is not an image, is too large, or has an extreme aspect ratio.
    """
    if config.image_path is None or config.height is not None or config.width is not None:
        return config
    columns, rows = image_size(config.image_path)
    try:
        height, width = size_of_shape(rows, columns, config.size_unit, config.max_pixels)
    except ValueError as error:
        raise ValueError(f"--image-path {config.image_path}: {error}") from error
    return replace(config, height=height, width=width, fit_image=True)
