"""Pictures of every kind of colours, read as a viewer shows them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flashdreams.runtime.image_file import as_rgb, load_image

HEIGHT, WIDTH = 32, 48
RED, GREEN = (255, 0, 0), (0, 255, 0)


def saved(image: Image.Image, path: Path, **options: object) -> Tensor:
    """Left and right half as they are read, ``[2, 3]`` of 0 to 255."""
    image.save(path, **options)
    pixels = (load_image(path, HEIGHT, WIDTH)[0] + 1) * 127.5
    return torch.stack([pixels[:, :, : WIDTH // 2], pixels[:, :, WIDTH // 2 :]]).mean((2, 3))


def halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (WIDTH, HEIGHT), left)  # type: ignore[arg-type]
    image.paste(right, (WIDTH // 2, 0, WIDTH, HEIGHT))  # type: ignore[arg-type]
    return image


def near(found: Tensor, left: tuple[int, ...], right: tuple[int, ...], within: float = 1) -> bool:
    return bool((found - torch.tensor([left, right])).abs().max() <= within)


def test_hidden_colours_are_not_seen(tmp_path: Path) -> None:
    white, blue = (255, 255, 255), (0, 0, 255)
    image = halves("RGBA", (240, 30, 10, 0), (*blue, 255))
    assert near(saved(image, tmp_path / "in.png"), white, blue)
    image = halves("RGBA", (0, 0, 0, 51), (*blue, 255))
    assert near(saved(image, tmp_path / "in.png"), (204,) * 3, blue)
    assert near(saved(halves("LA", (7, 0), (9, 255)), tmp_path / "in.png"), white, (9,) * 3)


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_a_transparent_colour_is_not_seen(tmp_path: Path, mode: str) -> None:
    image = halves("RGB", RED, GREEN)
    clear: object = RED
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        clear = image.getpixel((0, 0))
    elif mode == "L":
        image, clear = halves("L", 100, 200), 100
    right = (200,) * 3 if mode == "L" else GREEN
    found = saved(image, tmp_path / "in.png", transparency=clear)
    assert near(found, (255, 255, 255), right)
    assert not near(saved(image, tmp_path / "in.png"), (255, 255, 255), right), "without it it is"


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, WIDTH).astype(np.uint16), (HEIGHT, 1))
    Image.fromarray(ramp).save(tmp_path / "in.png")
    found = (load_image(tmp_path / "in.png", HEIGHT, WIDTH) + 1) * 127.5
    expected = torch.from_numpy(ramp.astype(np.float32)) / 257
    assert (found - expected).abs().max() <= 0.51
    wide = np.full((HEIGHT, WIDTH), 70000, np.int32)
    with pytest.raises(ValueError, match="without a defined range; save it with 8 or 16"):
        as_rgb(Image.fromarray(wide))


@pytest.mark.parametrize(
    ("mode", "left", "right", "seen", "suffix"),
    [
        ("P", 0, 1, (RED, GREEN), "png"),
        ("1", 0, 1, ((0,) * 3, (255,) * 3), "png"),
        ("L", 10, 250, ((10,) * 3, (250,) * 3), "png"),
        ("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (RED, GREEN), "jpg"),
        ("YCbCr", (76, 85, 255), (150, 44, 21), (RED, GREEN), "jpg"),
    ],
)
def test_other_colours_are_read(
    tmp_path: Path, mode: str, left: object, right: object, seen: tuple, suffix: str
) -> None:
    image = halves(mode, left, right)
    if mode == "P":
        image.putpalette([*RED, *GREEN])
    assert near(saved(image, tmp_path / f"in.{suffix}"), *seen, within=6)
