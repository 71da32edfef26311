"""Images as Wan takes them: read from a file, and encoded for image-to-video."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.infra.component import build_component
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.clip import CLIPImageEncoder, CLIPImageEncoderConfig
from flashdreams.models.wan.vae import WanVAEImageEncoder, WanVAEImageEncoderConfig, as_video

MASK_CHANNELS = 4
"""Mask values per latent frame: one for each of the pixel frames that it stands for."""

ORIENTATION = 0x0112
"""Exif tag; 5 to 8 mean that rows and columns are exchanged."""

MAX_IMAGE_PIXELS = 50_000_000
"""Most pixels of a first image: more than any camera's picture needs here."""


@dataclass(kw_only=True)
class WanImageConditionEncoderConfig(EncoderConfig):
    """Config of the image condition of the Wan 2.1 image-to-video models."""

    _target: type["WanImageConditionEncoder"] = field(
        default_factory=lambda: WanImageConditionEncoder
    )

    vae: WanVAEImageEncoderConfig = field(default_factory=WanVAEImageEncoderConfig)
    """Encodes the clip that begins with the image and is grey from there on."""

    clip: CLIPImageEncoderConfig = field(default_factory=CLIPImageEncoderConfig)
    """Encodes the image to tokens for cross-attention."""

    latent_frames: int = 21
    """Latent frames of the clip to be generated."""

    def __post_init__(self) -> None:
        check_range(self, "latent_frames")


class WanImageConditionEncoder(Encoder):
    """An image to the context ``image_tokens`` and ``condition`` of a Wan transformer.

    The two networks read their weights from files of their own.
    """

    config: WanImageConditionEncoderConfig

    def __init__(self, config: WanImageConditionEncoderConfig) -> None:
        super().__init__(config)
        self.vae: WanVAEImageEncoder = build_component(config.vae)
        self.clip: CLIPImageEncoder = build_component(config.clip)

    def example_input(self) -> Tensor:
        """A small grey image."""
        return self.vae.example_input()

    @torch.no_grad()
    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """Encode the first frame of a clip.

        Args:
            input: ``[B, 3, height, width]``, RGB in [-1, 1].

        Returns:
            ``image_tokens`` ``[B, S, C]``, and ``condition`` ``[B, 4 + 16, T, H, W]`` float32: the
            mask, 1 on the first latent frame, then the latents of the image and grey frames.

        Raises:
            ValueError: wrong shape or size.
            TypeError: integer pixels, or no tensor.

        Source: Wan-Video/Wan2.1, wan/image2video.py.
        """
        frames = 1 + (self.config.latent_frames - 1) * self.vae.config.time_factor
        clip = as_video(input)
        if clip.ndim == 5 and clip.shape[2] == 1:
            clip = F.pad(clip, (0, 0, 0, 0, 0, frames - 1))
        latent = self.vae(clip)
        return {"image_tokens": self.clip(input), "condition": mark_first_frame(latent)}


def mark_first_frame(latent: Tensor) -> Tensor:
    """Put a mask before latents ``[B, C, T, H, W]`` that says which of them are given.

    Returns:
        ``[B, 4 + C, T, H, W]``: 1 on the first latent frame, 0 on all others, then the latents.
    """
    mask = torch.zeros_like(latent[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], dim=1)


def load_image(path: Path, height: int, width: int, *, fit: bool = False) -> Tensor:
    """Read an image from a file.

    Args:
        path: any format that Pillow reads; a camera's turned image is set upright.
        height: wanted height in pixels.
        width: wanted width in pixels.
        fit: scale and crop an image of another size, keeping its centre; if not, refuse it.

    Returns:
        ``[1, 3, height, width]`` float32 in [-1, 1].

    Raises:
        ValueError: no readable image, a huge one, not RGB, or of another size.
    """
    from PIL import Image, ImageOps

    image_size(path)  # a huge image is not decoded
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # what a damaged image raises is no narrower
        raise _unreadable(path, error) from error
    if image.mode != "RGB":
        raise ValueError(
            f"--image-path {path}: the image mode is {image.mode}; it must be RGB. Convert it, for "
            'example with: python -c "from PIL import Image; '
            "Image.open('in.png').convert('RGB').save('out.png')\"."
        )
    if image.size != (width, height):
        if not fit:
            raise ValueError(
                f"--image-path {path}: the image is {image.width}x{image.height} (width x height); "
                f"this run wants {width}x{height}. Type --fit-image True to scale and crop it, or "
                "give --height and --width."
            )
        image = _cover(image, height, width)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, height, width, 3).permute(0, 3, 1, 2)
    return pixels.contiguous().float() / 127.5 - 1


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image file, set upright; a huge one is not decoded.

    Raises:
        ValueError: no image, or a huge one.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                huge = width * height > MAX_IMAGE_PIXELS
                turned = not huge and image.getexif().get(ORIENTATION, 1) > 4
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"--image-path {path}: the image is huge; at most {MAX_IMAGE_PIXELS:,} pixels are read."
        ) from error
    except Exception as error:  # what a damaged image raises is no narrower
        raise _unreadable(path, error) from error
    if huge:
        raise ValueError(
            f"--image-path {path}: the image is huge, {width}x{height} (width x height); at most "
            f"{MAX_IMAGE_PIXELS:,} pixels are read. Scale it down first."
        )
    return (height, width) if turned else (width, height)


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or "it is no image that can be read"
    return ValueError(f"--image-path {path}: {reason}.")


def gradient_image(height: int, width: int) -> Tensor:
    """A colour gradient ``[1, 3, height, width]`` in [-1, 1], where any image will do."""
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width).expand(height, width)
    return torch.stack([rows, columns, -rows * columns])[None]


def _cover(image: Any, height: int, width: int) -> Any:
    """Cut away what stands out of the size's shape, evenly, and scale the rest to it."""
    from PIL import Image

    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (
        max(0.0, left),
        max(0.0, top),
        image.width - max(0.0, left),
        image.height - max(0.0, top),
    )
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
