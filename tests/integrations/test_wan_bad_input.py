"""What the Wan integrations say to input that they cannot take: one clear line each."""

import json
import random
import re
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashdreams.infra.config import derive_config
from flashdreams.infra.prompt import read_prompt
from flashdreams.infra.video_runner import read_image, take_shape
from flashdreams.integrations.causal_forcing.config import TINY_RUNNER as CAUSAL_FORCING
from flashdreams.integrations.lingbot_world import config as lingbot
from flashdreams.integrations.self_forcing.config import TINY_RUNNER as SELF_FORCING
from flashdreams.integrations.wan21.config import (
    I2V_14B_480P_RUNNER,
    I2V_TINY_RUNNER,
    T2V_TINY_RUNNER,
)
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.runtime.image_file import image_size, load_image
from tests.integrations.refusals import error_of

TRANSFORMER = "--pipeline.diffusion-model.transformer"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prompt", " "], 2, "--prompt is empty; describe what the video shows"),
        (["--prompt", "word " * 33], 2, "--prompt: prompt 0 has 33 words, 32 are allowed"),
        (["--height", "40"], 2, "--height 40: must be a multiple of 16.*Nearest: 32 and 48"),
        (["--width", "8"], 2, "--width 8: must be a multiple of 16.*Nearest: 16 and 32"),
        (["--prompt-path", "/nowhere.txt"], 2, "--prompt-path /nowhere.txt cannot be read: No su"),
        (["--prompt-embeds", "/nowhere.safetensors"], 2, "--prompt-embeds: /nowhere.* cannot be r"),
        (["--negative-prompt", "blurry"], 2, "runs without guidance"),
        (["--seed", "-1"], 2, "--seed -1: must be from 0 to 2\\*\\*64 - 1"),
        (["--seed", str(2**64)], 2, "must be from 0 to 2\\*\\*64 - 1"),
        (
            ["--pipeline.diffusion-model.transformer.latent-width", "5"],
            2,
            "latent_width=5 is not a multiple of the patch size 2; the nearest that are: 4, 6",
        ),
        (
            [f"{TRANSFORMER}.text-len", "4"],
            2,
            "makes embeddings of .*text_len=32; .* at most text_len=4",
        ),
        (
            ["--pipeline.text-encoder.text-dim", "8"],
            2,
            "text_dim=8, .* transformer takes text_dim=32",
        ),
        ([f"{TRANSFORMER}.freq-dim", "31"], 2, "freq_dim=31 must be even"),
        (
            ["--pipeline.decoder.dim-mult", "1", "2", "0", "4"],
            2,
            "dim_mult=.*: each must be at least 1",
        ),
        (
            ["--pipeline.decoder.latent-std", *["1"] * 15, "0"],
            2,
            "latent_std=.*: each must be posit",
        ),
        (["--shot", "word " * 33, "a"], 2, "error: shot 1: prompt 0 has 33 words"),
    ],
)
def test_one_line_says_what_is_wrong(flags, code, message, tmp_path, capsys):
    found, line = error_of(["self-forcing-tiny-random", *flags], tmp_path, capsys)
    assert found == code
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 31), "shape [1, 8, 31]; this model takes [rows, 32]"),
        ((0, 8, 32), "shape [0, 8, 32]; this model takes [rows, 32]"),
        ((2, 8, 32), "holds 2 prompts, and a run makes one video"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_before_anything_is_built(
    shape, message, tmp_path, capsys
):
    path = tmp_path / "prompt.safetensors"
    save_file({"prompt_embeds": torch.zeros(shape)}, path)
    argv = ["self-forcing-tiny-random", "--prompt-embeds", str(path)]
    code, line = error_of(argv, tmp_path, capsys)
    assert code == 2 and message in line
    assert list(tmp_path.iterdir()) == [path]


def test_negative_prompts_of_another_number_are_refused():
    pipeline = T2V_TINY_RUNNER.pipeline.setup(device="cpu")
    with pytest.raises(ValueError, match="negative_text holds 2 prompts for a batch of 1"):
        pipeline.initialize_cache(text=["a fox"], negative_text=["blurry", "dark"])


def test_negative_prompts_without_guidance_are_refused():
    pipeline = SELF_FORCING.pipeline.setup(device="cpu")
    with pytest.raises(ValueError, match="runs without guidance, so it takes no negative_text"):
        pipeline.initialize_cache(text=["a fox"], negative_text=["blurry"])


def test_a_second_step_of_a_bidirectional_model_is_refused():
    pipeline = T2V_TINY_RUNNER.pipeline.setup(device="cpu")
    cache = pipeline.initialize_cache(text=["a fox"])
    pipeline.generate(autoregressive_index=0, cache=cache)
    pipeline.finalize(autoregressive_index=0, cache=cache)
    with pytest.raises(ValueError, match="autoregressive_index=1: with streaming=False the whole"):
        pipeline.generate(autoregressive_index=1, cache=cache)


@pytest.mark.parametrize("runner", [CAUSAL_FORCING, I2V_TINY_RUNNER])
def test_an_image_that_is_no_tensor_is_refused(runner):
    pipeline = runner.pipeline.setup(device="cpu")
    with pytest.raises(TypeError, match=r"the image is a Image; expected a tensor .*load_image"):
        pipeline.initialize_cache(text=["a fox"], image=Image.new("RGB", (48, 32)))


def test_a_negative_prompt_of_white_space_is_none(tmp_path):
    config = derive_config(T2V_TINY_RUNNER, negative_prompt=" ", output_dir=tmp_path, device="cpu")
    assert config.setup().conditions()["negative_text"] == [""]


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfa fox\r\n")
    assert read_prompt("", tmp_path / "prompt.txt") == "a fox"


def test_an_image_is_one_latent_frame():
    longer = {"transformer": {"len_t": 3, "window_size_t": 6}}
    with pytest.raises(ValueError, match=r"starts from an image.*len_t must be 1, got 3"):
        derive_config(CAUSAL_FORCING, pipeline={"diffusion_model": longer})


def test_images_of_another_size_are_refused(tmp_path):
    Image.new("RGB", (40, 32)).save(tmp_path / "in.png")
    config = derive_config(CAUSAL_FORCING, image_path=tmp_path / "in.png", output_dir=tmp_path)
    message = r"the image is 40x32 .width x height.; this run needs 48x32.*--fit-image True"
    with pytest.raises(ValueError, match=message):
        config.setup()
    derive_config(config, fit_image=True).setup()  # as the message says


def test_the_video_takes_the_shape_of_its_image(tmp_path, capsys):
    Image.new("RGB", (90, 110)).save(tmp_path / "in.png")
    start = derive_config(I2V_TINY_RUNNER, image_path=tmp_path / "in.png", output_dir=tmp_path)
    with start.setup() as runner:
        runner.run()
    assert "size: 32x32 (width x height), after the image of 90x110" in capsys.readouterr().out
    transformer = runner.pipeline.diffusion_model.transformer.config
    assert (transformer.latent_height, transformer.latent_width) == (4, 4)
    assert json.loads(runner.recorder.stats_path.read_text())["header"]["frame_size"] == [32, 32]
    again = read_image(runner.config)  # as a replay reads it
    assert torch.equal(again["frame"], runner.image["frame"])
    assert again["frame"].shape == (1, 3, 32, 32) and again["whole"].shape == (1, 3, 110, 90)

    with pytest.raises(ValueError, match=r"the image is 90x110 .*this run needs 48x32"):
        derive_config(start, height=32).setup()
    for given in ({"fit_image": True}, {"height": 32, "width": 48, "fit_image": True}):
        assert take_shape(derive_config(start, **given)).frame_size == (32, 48)


@pytest.mark.parametrize("start", [T2V_TINY_RUNNER, I2V_TINY_RUNNER, lingbot.BASE_TINY_RUNNER])
def test_a_clip_of_another_length(start, tmp_path):
    config = derive_config(start, frames=17, output_dir=tmp_path, device="cpu")
    for message, frames in (("Nearest: 17 and 21", 18), ("Nearest: 1 and 5", -3)):
        with pytest.raises(ValueError, match=message):
            derive_config(start, frames=frames)
    with pytest.raises(ValueError, match="streams; type --total-blocks instead"):
        derive_config(SELF_FORCING, frames=17)
    with config.setup() as runner:
        (step,) = runner.stream(1)
        assert step.chunk.shape[1] == 17 and step.cache.latent.shape[2] == 5


@pytest.mark.parametrize(
    ("image", "video"),
    [
        ((1080, 1920), (464, 832)), ((1920, 1080), (832, 464)), ((1024, 1024), (624, 624)),
        ((768, 1024), (544, 720)), ((480, 832), (464, 832)), ((832, 480), (832, 480)),
    ],
)  # fmt: skip
def test_the_size_is_that_of_the_official_code(image, video):
    """As computed by wan/image2video.py; 480x832 becomes 464x832 there by rounding."""
    for config in (I2V_14B_480P_RUNNER, lingbot.RUNNER, lingbot.BASE_RUNNER):
        assert config.size_of(*image) == video


def test_an_image_is_fitted_if_asked_for(tmp_path):
    pixels = Image.new("RGB", (100, 32), (255, 0, 0))
    pixels.paste((0, 255, 0), (26, 0, 74, 32))
    pixels.save(tmp_path / "in.png")
    image = load_image(tmp_path / "in.png", 32, 48, fit=True)
    assert image.shape == (1, 3, 32, 48)
    middle = image[:, :, :, 2:-2]
    assert (middle[:, 1] == 1).all() and (middle[:, 0] == -1).all()  # the centre is kept


def test_an_image_of_any_shape_is_fitted_without_a_larger_copy(tmp_path):
    Image.new("RGB", (1, 40_000), (255, 0, 0)).save(tmp_path / "in.png")
    image = load_image(tmp_path / "in.png", 32, 48, fit=True)  # scaled whole: 1.9e6 rows
    assert (image[:, 0] == 1).all() and (image[:, 1:] == -1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_turned_image_is_set_upright(orientation, tmp_path):
    upright = Image.new("RGB", (48, 32), (255, 0, 0))
    upright.paste((0, 255, 0), (0, 0, 16, 16))
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn_back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "in.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert image_size(tmp_path / "in.png") == (48, 32)
    found = load_image(tmp_path / "in.png", 32, 48)
    assert torch.equal(found, load_image(tmp_path / "upright.png", 32, 48))
    assert not torch.equal(found, found.flip(3)) and not torch.equal(found, found.flip(2))


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    (tmp_path / "in.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with pytest.raises(ValueError, match="the image is huge; at most 50,000,000 pixels are read"):
        load_image(tmp_path / "in.png", 32, 48)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_images_are_read_or_refused_in_one_line(suffix, tmp_path):
    """Pillow raises whatever a damaged file leads it to: SyntaxError, struct.error, ..."""
    path, rng = tmp_path / f"in{suffix}", random.Random(0)
    Image.effect_noise((48, 32), 90).convert("RGB").save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(8, min(len(whole), 200))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_image(path, 32, 48, fit=True)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused


def test_no_image_and_no_readable_image_are_refused(tmp_path):
    (tmp_path / "in.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="it is not a readable image"):
        load_image(tmp_path / "in.png", 32, 48)
    with pytest.raises(ValueError, match="No such file"):
        load_image(tmp_path / "absent.png", 32, 48)
    config = derive_config(CAUSAL_FORCING, test_image=False, output_dir=tmp_path)
    with pytest.raises(ValueError, match="starts from an image of 48x32"):
        config.setup()


def test_images_the_model_did_not_ask_for_are_refused():
    pipeline = SELF_FORCING.pipeline.setup(device="cpu")
    with pytest.raises(TypeError, match="self-forcing-tiny-random takes no image"):
        pipeline.initialize_cache(text=["a fox"], image=torch.zeros(1, 3, 32, 48))


def test_conditions_of_another_shape_are_refused():
    transformer = WanTransformerConfig(
        dim=12, ffn_dim=12, num_heads=1, num_layers=1, text_dim=4, text_len=2, freq_dim=4,
        condition_channels=20, latent_height=4, latent_width=6,
    ).setup()  # fmt: skip
    text = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"\[1, 20, latent frames, 4, 6\]; got None"):
        transformer.initialize_cache(text=text)
    with pytest.raises(ValueError, match=r"got \[1, 16, 3, 4, 6\]"):
        transformer.initialize_cache(text=text, condition=torch.zeros(1, 16, 3, 4, 6))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("attention-backend flash_attn", "'flash_attn' cannot be used here: .*Usable on cpu"),
        ("attention-backend triton", "'triton' cannot be used here: needs a CUDA device"),
    ],
)
def test_options_are_refused_before_weights_are_asked_for(
    flags, message, tmp_path, capsys, monkeypatch
):
    """Negative control: without them it is the weights that are missing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    slug = "self-forcing-wan2.1-t2v-1.3b"
    options = f"--pipeline.diffusion-model.transformer.{flags}".split()
    code, line = error_of([slug, *options], tmp_path, capsys)
    assert code == 2
    assert re.search(message, line), line
    code, line = error_of([slug], tmp_path, capsys)
    assert code == 1
    assert "needs 4 checkpoints that are not on this machine, 17.6 GB" in line
    assert line.endswith("To let this program download all of them: --download True.\n")


@pytest.mark.parametrize("suffix", ["gif", "tiff", "ppm", "eps", "ico", "pcx"])
def test_images_reach_no_other_decoder(suffix, tmp_path):
    """Pillow hands PostScript to an interpreter outside of the process."""
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (8, 8)).save(path)
    path.rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"not a readable image \(PNG, JPEG, WEBP, BMP\)"):
        load_image(tmp_path / "image.png", 8, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_images_of_these_formats_are_read(suffix, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / f"image.{suffix}")
    assert load_image(tmp_path / f"image.{suffix}", 8, 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 99, b"PK\x03\x04" + bytes(99)])
def test_damaged_embeddings_are_one_line_with_file_and_option(suffix, content, tmp_path, capsys):
    path = tmp_path / f"prompt.{suffix}"
    path.write_bytes(content)
    argv = ["self-forcing-tiny-random", "--prompt-embeds", str(path)]
    code, line = error_of(argv, tmp_path, capsys)
    assert code == 2 and f"--prompt-embeds: {path}" in line


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"\xff" * 99, b"PK\x03\x04"])
def test_damaged_poses_are_one_line_with_file_and_option(content, tmp_path, capsys):
    path = tmp_path / "poses.npy"
    path.write_bytes(content)
    argv = ["lingbot-world-tiny-random", "--test-image", "True", "--pose-path", str(path)]
    code, line = error_of(argv, tmp_path, capsys)
    assert code == 2 and f"--pose-path {path} cannot be read: it is not a .npy file" in line
