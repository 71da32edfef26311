"""Initial images sent by clients."""

import base64
import http.client
import io
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings

from torch import Tensor

from flashdreams.runtime.image_file import FORMATS, as_rgb, cover, to_pixels
from flashdreams.serving.interface import Offer, Refused
from flashdreams.serving.web.settings import WebSettings

MAX_PIXELS = 2**24
"""Maximum number of pixels of an image."""
FETCH_S = 10.0

_DATA_URL = re.compile(r"data:(image/[\w.+-]+)?(;[\w=.+-]+)*;base64,", re.ASCII)


def image_of(url: str, offer: Offer, settings: WebSettings) -> Tensor:
    """The image of an ``image_url``, scaled and cropped to the server's size; blocks.

    Returns:
        ``[1, 3, height, width]`` float32 in [-1, 1].

    Raises:
        Refused: images are not accepted, or not from this host; too large; or not an image.
    """
    if not offer.takes_image:
        raise Refused(f"{offer.model} starts without an image; omit image_reference.")
    data = _data_of(url, settings)
    return decode_image(data, offer.height, offer.width)


def decode_image(data: bytes, height: int, width: int) -> Tensor:
    """Decode a PNG, JPEG, WebP or BMP file, scaled to cover the size and cropped to its centre.

    Returns:
        ``[1, 3, height, width]`` float32 in [-1, 1].

    Raises:
        Refused: not such a file, or more than ``MAX_PIXELS``.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise Refused(
                        f"The image has {opened.width}x{opened.height} pixels; at most "
                        f"{MAX_PIXELS:,} pixels are accepted."
                    )
                image = as_rgb(ImageOps.exif_transpose(opened))
        if image.size != (width, height):
            image = cover(image, height, width)
        return to_pixels(image)
    except Refused:
        raise
    except Exception as error:  # a damaged image may raise anything
        raise Refused(f"Not a readable image; accepted formats: {', '.join(FORMATS)}.") from error


def _data_of(url: str, settings: WebSettings) -> bytes:
    limit = settings.max_upload_bytes
    if not url.startswith("data:"):
        return _fetch(url, settings)
    head = _DATA_URL.match(url)
    if head is None:
        raise Refused('image_url must begin with "data:image/png;base64," or the like.')
    encoded = url[head.end() :]
    if len(encoded) // 4 * 3 - 2 > limit:
        raise Refused(f"The image has more than {limit:,} bytes.")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise Refused("image_url is not valid base64.") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object, **options: object) -> None:
        """Follow no redirects, because they may lead anywhere."""
        return


def _fetch(url: str, settings: WebSettings) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme != "https" or parts.hostname not in settings.image_hosts or port:
        allowed = ", ".join(f"https://{host}/..." for host in settings.image_hosts)
        raise Refused(f'image_url may be: "data:image/...;base64,..."{allowed and ", " + allowed}.')
    limit = settings.max_upload_bytes
    try:
        with urllib.request.build_opener(_NoRedirect).open(url, timeout=FETCH_S) as answer:
            data = answer.read(limit + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Refused(f"The image cannot be downloaded from {parts.hostname}.") from error
    if len(data) > limit:
        raise Refused(f"The image has more than {limit:,} bytes.")
    return data
