"""The first frame of a video: read from a file, or drawn."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdreams.runtime.text import check_regular, reason_of

ORIENTATION = 0x0112
"""Exif tag; 5 to 8 mean that rows and columns are swapped."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Decoders that a file may reach. Pillow tries 43 formats if none are named, and for a PostScript
header starts an interpreter."""

MAX_IMAGE_PIXELS = 50_000_000
"""Most pixels of a first image: more than any camera's picture needs here."""

BACKDROP = (255, 255, 255)
"""What is seen through transparent pixels: white, as on a page."""

MAX_STRETCH = 0.05
"""Difference of aspect ratios up to which an image counts as of a frame's shape."""

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BITS = 65535


def load_image(path: Path, height: int, width: int, *, fit: bool = False) -> Tensor:
    """Read an image from a file.

    Args:
        path: PNG, JPEG, WebP or BMP in any colours, see `as_rgb`; a camera's turned
            image is set upright.
        height: wanted height in pixels.
        width: wanted width in pixels.
        fit: scale and crop an image of another size, keeping its centre; if not, refuse it.

    Returns:
        ``[1, 3, height, width]`` float32 in [-1, 1].

    Raises:
        ValueError: not a readable image, too large, or of another size.
    """
    image = open_image(path)
    if image.size != (width, height):
        if not fit:
            raise ValueError(
                f"--image-path {path}: the image is {image.width}x{image.height} (width x height); "
                f"this run needs {width}x{height}. Type --fit-image True to scale and crop it, or "
                "give --height and --width."
            )
        image = cover(image, height, width)
    return to_pixels(image)


def open_image(path: Path) -> Any:
    """Read an image, set upright, as Pillow holds it.

    Raises:
        ValueError: not a readable image, too large, or not RGB.
    """
    from PIL import Image, ImageOps

    image_size(path)  # a huge image is not decoded
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # damaged images raise all kinds of errors
        raise _unreadable(path, error) from error
    try:
        return as_rgb(image)
    except ValueError as error:
        raise ValueError(f"--image-path {path}: {error}") from error


def to_pixels(image: Any) -> Tensor:
    """An RGB image of Pillow as ``[1, 3, height, width]`` float32 in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)
    return pixels.contiguous().float() / 127.5 - 1


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image file, set upright; a huge one is not decoded.

    Raises:
        ValueError: not an image, or too large.
    """
    from PIL import Image

    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--image-path {path}: {reason_of(error)}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                huge = width * height > MAX_IMAGE_PIXELS
                turned = not huge and image.getexif().get(ORIENTATION, 1) > 4
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"--image-path {path}: the image is huge; at most {MAX_IMAGE_PIXELS:,} pixels are read."
        ) from error
    except Exception as error:  # damaged images raise all kinds of errors
        raise _unreadable(path, error) from error
    if huge:
        raise ValueError(
            f"--image-path {path}: the image is huge, {width}x{height} (width x height); at most "
            f"{MAX_IMAGE_PIXELS:,} pixels are read. Scale it down first."
        )
    return (height, width) if turned else (width, height)


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None)
    reason = reason or f"it is not a readable image ({', '.join(FORMATS)})"
    return ValueError(f"--image-path {path}: {reason}.")


def has_shape(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether an image has nearly the aspect ratio of a frame, within ``MAX_STRETCH``.

    Args:
        size: columns and rows of the image, as from `image_size`.
        height: of the frame.
        width: of the frame.
    """
    stretch = (size[0] / size[1]) / (width / height)
    return 1 / (1 + MAX_STRETCH) <= stretch <= 1 + MAX_STRETCH


def drawn_image(slug: str, height: int, width: int, *, drawn: bool) -> Tensor:
    """What a method that needs a first frame starts from if no file is named.

    Args:
        slug: the method, for the message.
        height: of the frame.
        width: of the frame.
        drawn: whether a colour gradient was asked for.

    Returns:
        As from `gradient_image`.

    Raises:
        ValueError: it was not; says what to type.
    """
    if drawn:
        return gradient_image(height, width)
    raise ValueError(
        f"{slug} starts from an image of {width}x{height} (width x height): name it with "
        "--image-path FILE, or type --test-image True for a colour gradient."
    )


def gradient_image(height: int, width: int) -> Tensor:
    """A colour gradient ``[1, 3, height, width]`` in [-1, 1], where any image will do."""
    rows = torch.linspace(-1, 1, height, dtype=torch.float32, device="cpu")[:, None].expand(
        height, width
    )
    columns = torch.linspace(-1, 1, width, dtype=torch.float32, device="cpu").expand(height, width)
    return torch.stack([rows, columns, -rows * columns])[None]


def cover(image: Any, height: int, width: int) -> Any:
    """Scale an image of Pillow to cover a size, and cut away evenly what is outside."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def as_rgb(image: Any) -> Any:
    """A Pillow image of any mode as mode ``RGB``.

    Transparency is laid on `BACKDROP`, also that of a palette or of one colour (tRNS); 16 bits are
    scaled to 8; CMYK with a colour profile goes through that.

    Raises:
        ValueError: pixel values without a fixed range, whose brightness is undefined.
    """
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_sixteen_bits(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKDROP), image).convert("RGB")
    if image.mode == "CMYK":
        return _from_cmyk(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_sixteen_bits(image: Any) -> Any:
    """Grey of 16 bits as ``L``, or as ``LA`` where one level is transparent."""
    from PIL import Image

    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _SIXTEEN_BITS:
        raise ValueError(
            f"the image holds numbers from {levels.min():g} to {levels.max():g} (mode "
            f"{image.mode}), without a defined range; save it with 8 or 16 bits "
            "per channel."
        )
    grey = Image.fromarray(np.rint(levels / (_SIXTEEN_BITS / 255)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def _from_cmyk(image: Any) -> Any:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    from PIL import ImageCms

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(
            image, own, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError):  # a damaged profile, or one of other colours
        return image.convert("RGB")
