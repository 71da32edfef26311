"""Wan 2.2 TI2V on the command line: one slug for text and for image and text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from flashdreams.infra.video_runner import (
    ImageToVideoRunner,
    ImageToVideoRunnerConfig,
    TextToVideoRunnerConfig,
    shape_fits,
)
from flashdreams.runtime.image_file import gradient_image, load_image

from .image import load_covering, size_of_shape


@dataclass(kw_only=True)
class TextImageToVideoRunnerConfig(ImageToVideoRunnerConfig):
    """A prompt, with or without a first image, to video."""

    _target: type["TextImageToVideoRunner"] = field(default_factory=lambda: TextImageToVideoRunner)

    image_path: Path | None = None
    """The first frame, an RGB image; None makes the video from the prompt alone."""
    max_pixels: int | None = 704 * 1280
    """Most pixels of a frame of a video that takes the aspect ratio of its image: it does unless
    --height, --width or --fit-image is given."""

    def size_of(self, rows: int, columns: int) -> tuple[int, int]:
        """See `ImageToVideoRunnerConfig.size_of`; of several sizes the one of nearest shape."""
        return size_of_shape(rows, columns, self.size_unit, self.max_pixels or 0)


class TextImageToVideoRunner(ImageToVideoRunner):
    """Streams one video into a file."""

    config: TextImageToVideoRunnerConfig

    def first_image(self, config: TextToVideoRunnerConfig) -> Tensor | None:
        """The image of the config, ``[1, 3, height, width]`` in [-1, 1]; None without one."""
        c = cast(TextImageToVideoRunnerConfig, config)
        height, width = c.frame_size
        if c.image_path is None:
            return gradient_image(height, width) if c.test_image else None
        load = load_covering if c.fit_image or shape_fits(c) else load_image
        return load(c.image_path, height, width)
