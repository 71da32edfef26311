"""Conversion of any image to the 8-bit RGB that a viewer shows."""

from typing import Any

import numpy as np

BACKDROP = (255, 255, 255)
"""What is seen through transparent pixels: white, as on a page."""

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BITS = 65535


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
    import io

    from PIL import ImageCms

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(
            image, own, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError):  # a damaged profile, or one of other colours
        return image.convert("RGB")
