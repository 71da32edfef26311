"""What Wan 2.2 TI2V says to input that it cannot take, and what it makes of images of any shape."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashdreams.infra.config import derive_config
from flashdreams.integrations.wan22.config import PIPELINE, TINY_RUNNER
from flashdreams.integrations.wan22.image import load_covering, size_of_shape
from flashdreams.models.wan.config import WAN_TRANSFORMER_1_3B
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.image_file import gradient_image
from tests.integrations.refusals import error_of
from tests.manifests import load_manifest, write_sparse_safetensors


def save_image(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    Image.new(mode, (width, height)).save(path)
    return path


# Images of any shape


@pytest.mark.parametrize(
    ("columns", "rows", "width", "height"),
    [(1920, 1080, 1248, 704), (1024, 1024, 960, 928), (1280, 704, 1280, 704)],
)
def test_the_video_takes_the_shape_of_the_image(columns, rows, width, height):
    assert size_of_shape(rows, columns, 32, 704 * 1280) == (height, width)
    if columns != rows:
        assert size_of_shape(columns, rows, 32, 704 * 1280) == (width, height)


def test_sizes_are_whole_and_within_the_pixels_and_near_the_shape():
    for columns in range(200, 2000, 83):
        for rows in range(200, 2000, 97):
            height, width = size_of_shape(rows, columns, 32, 704 * 1280)
            assert height % 32 == width % 32 == 0 and height * width <= 704 * 1280
            assert 0.9 < (width / height) / (columns / rows) < 1.1


def test_a_run_is_as_large_as_its_image_allows(tmp_path):
    """Tiny: at most 64x96 pixels; beside it the shape of the image."""
    paths = {
        (64, 96): save_image(tmp_path / "wide.png", 150, 100),
        (96, 64): save_image(tmp_path / "high.png", 100, 150),
    }
    for size, path in paths.items():
        config = derive_config(TINY_RUNNER, image_path=path, output_dir=tmp_path, device="cpu")
        runner = config.setup()
        assert runner.config.frame_size == size and runner.image.shape == (1, 3, *size)
        transformer = runner.pipeline.diffusion_model.transformer.config
        assert (16 * transformer.latent_height, 16 * transformer.latent_width) == size
        runner.close()


def test_the_centre_of_an_image_is_kept(tmp_path):
    pixels = Image.new("RGB", (100, 32), (255, 0, 0))
    pixels.paste((0, 255, 0), (26, 0, 74, 32))
    pixels.save(tmp_path / "in.png")
    image = load_covering(tmp_path / "in.png", 32, 48)
    middle = image[:, :, :, 2:-2]
    assert (middle[:, 1] == 1).all() and (middle[:, 0] == -1).all()


def test_without_an_image_the_video_follows_from_the_prompt_alone(tmp_path):
    runner = derive_config(TINY_RUNNER, output_dir=tmp_path, device="cpu").setup()
    assert "image" not in runner.conditions()
    runner.close()
    drawn = derive_config(TINY_RUNNER, output_dir=tmp_path, device="cpu", test_image=True).setup()
    assert torch.equal(drawn.conditions()["image"], gradient_image(64, 96))
    drawn.close()


# Bad input


@pytest.mark.parametrize("slug", ["wan22-ti2v-tiny-random", "wan22-ti2v-5b-704p"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", "720"], r"--height 720: must be a multiple of 32 pixels \(latents of 16, "
         r"patches of 2\)\. Nearest: 704 and 736"),
        (["--image-path", "IMAGE", "--height", "64", "--width", "64"],
         r"the image is 100x50 .*; this run needs 64x64.*--fit-image True"),
        (["--image-path", "LONG"], r"the image is 4000x1 .*no video of that shape.*--fit-image"),
        (["--image-path", "/nowhere.png"], "No such file"),
        (["--max-pixels", "1000"], "--max-pixels 1000: must be at least 1024, a frame of 32x32"),
        (["--total-blocks", "2"], "whole video in one AR step; it must be 1"),
        (["--prompt-embeds", "/nowhere.safetensors"], "--negative-prompt-embeds together"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong_before_weights_are_asked_for(
    slug, flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    images = {
        "IMAGE": save_image(tmp_path / "image.png", 100, 50),
        "LONG": save_image(tmp_path / "long.png", 4000, 1),
    }
    argv = [slug, *(str(images.get(f, f)) for f in flags)]
    code, line = error_of(argv, tmp_path, capsys)
    assert code == 2
    assert re.search(message, line), line


def test_an_encoded_image_of_another_size_is_refused():
    pipeline = TINY_RUNNER.pipeline.setup(device="cpu")
    with pytest.raises(ValueError, match=r"first latent frames of \[1, 48, 3, 4, 6\].*48, 1, 4, 4"):
        pipeline.initialize_cache(text=["a fox"], image=gradient_image(64, 64))
    with pytest.raises(ValueError, match="height 40 is not divisible by 16"):
        pipeline.initialize_cache(text=["a fox"], image=gradient_image(40, 64))


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        (WAN_TRANSFORMER_1_3B, "wan22_ti2v_5B"),
        (PIPELINE.diffusion_model.transformer, "wan21_t2v_1.3B"),
        (PIPELINE.decoder, "wan21_vae"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(config, manifest, tmp_path):
    with torch.device("meta"):
        module = config.setup()
    path = tmp_path / "other.safetensors"
    write_sparse_safetensors(path, load_manifest(manifest))
    ignore = config.checkpoint.ignore if config.checkpoint is not None else ()
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(module, CheckpointConfig(source=str(path), ignore=ignore))
    assert all(parameter.is_meta for parameter in module.parameters())
