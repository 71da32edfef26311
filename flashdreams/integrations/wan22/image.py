"""The first image of Wan 2.2 TI2V, which determines the size of the video."""

from pathlib import Path
from typing import Any

from torch import Tensor

from flashdreams.runtime.image_file import open_image, to_pixels


def size_of_shape(rows: int, columns: int, unit: int, max_pixels: int) -> tuple[int, int]:
    """The largest video with about an image's aspect ratio.

    One side is as long as the shape allows, the other fills what is left of the pixels; of the two
    ways to do that the one whose aspect ratio is nearer to the image's is taken.

    Args:
        rows: height of the image in pixels.
        columns: its width.
        unit: both sides become multiples of it.
        max_pixels: most pixels of a frame.

    Returns:
        Height and width in pixels; 0 if a side would be shorter than ``unit``.

    Source: Wan-Video/Wan2.2, wan/utils/utils.py, best_output_size.
    """
    aspect = columns / rows
    wide = int((max_pixels * aspect) ** 0.5) // unit * unit
    high = int((max_pixels / aspect) ** 0.5) // unit * unit
    if min(wide, high) == 0:
        return high, wide
    by_width = (max_pixels // wide // unit * unit, wide)
    by_height = (high, max_pixels // high // unit * unit)

    def distance(size: tuple[int, int]) -> float:
        found = size[1] / size[0]
        return max(aspect / found, found / aspect)

    return by_width if distance(by_width) < distance(by_height) else by_height


def cover(image: Any, height: int, width: int) -> Any:
    """Scale a Pillow image to cover the size, rounded to pixels, and crop to its centre.

    Source: Wan-Video/Wan2.2, wan/textimage2video.py (Lanczos).
    """
    from PIL import Image

    scale = max(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def load_covering(path: Path, height: int, width: int) -> Tensor:
    """An image from a file, scaled and cropped to ``[1, 3, height, width]`` in [-1, 1].

    Raises:
        ValueError: the file is not a readable image, is too large, or not RGB.
    """
    return to_pixels(cover(open_image(path), height, width))
