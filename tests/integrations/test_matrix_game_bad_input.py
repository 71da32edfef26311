"""What Matrix-Game refuses: one line each, before any weights are looked for."""

import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flashdreams.infra.config import derive_config
from flashdreams.integrations.matrix_game.config import RUNNER_CONFIGS, TINY_PIPELINE, TINY_RUNNER
from flashdreams.integrations.matrix_game.controls import KEYS, read_actions
from flashdreams.integrations.matrix_game.encoder import Actions
from flashdreams.integrations.matrix_game.runner import read_first_frame
from tests.integrations.refusals import error_of
from tests.integrations.test_matrix_game import (
    UNIVERSAL,
    actions_of,
    advance,
    begin,
    same,
    save_actions,
)


@pytest.fixture(scope="module")
def pipeline():
    return TINY_PIPELINE.setup(device="cpu")


def bad_array(**changes):
    return lambda folder: save_actions(folder / "a.npz", **changes)


def nan_at(row: int) -> np.ndarray:
    mouse = np.zeros((33, 2))
    mouse[row, 1] = np.nan
    return mouse


BAD_FILES = [
    (bad_array(keyboard=np.zeros((33, 5))), r"keyboard: must be \[frames, 4\].*got \[33, 5\]"),
    (bad_array(mouse=np.zeros((33, 3))), r"mouse: must be \[frames, 2\].*got \[33, 3\]"),
    (bad_array(mouse=np.zeros((21, 2))), "keyboard has 33 frames and mouse 21"),
    (bad_array(frames=20), "20 actions, and --total-blocks 3 makes 33 .*Type --total-blocks 1"),
    (bad_array(frames=5), "5 actions, and --total-blocks 3 makes 33 frames. Give more"),
    (bad_array(frames=0), r"must be \[frames, 4\]"),
    (bad_array(keyboard=np.zeros(33)), r"keyboard must be \[frames, 4\]; got \[33\]"),
    (bad_array(keyboard=np.full((33, 4), "w")), "keyboard does not hold numbers"),
    (bad_array(keyboard=np.full((33, 4), 2.0)), "keyboard must be from 0 to 1"),
    (bad_array(mouse=nan_at(7)), "mouse: row 7 has a value that is not finite"),
    (bad_array(mouse=np.full((33, 2), 12.0)), "mouse must be from -1 to 1"),
    (bad_array(mouse=np.full((33, 2), 1e300)), "row 0 has a value that is not finite"),
    (bad_array(mouse=None), r"holds keyboard; .*needs keyboard \[frames, 4\] and mouse"),
    (bad_array(wheel=np.zeros(3)), "holds keyboard, mouse, wheel"),
    (bad_array(keyboard=np.array([None] * 33, dtype=object)), "not an .npz file of numbers"),
    (lambda f: (f / "a.npz").write_bytes(b"no archive"), "not an .npz file of numbers"),
    (lambda f: np.save((f / "a.npz").open("wb"), np.zeros((33, 4))), "not an .npz file of numbers"),
    (lambda f: None, "cannot be read: No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_files_are_refused_before_weights(make, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    make(tmp_path)
    argv = ["--action-path", str(tmp_path / "a.npz"), "--total-blocks", "3", "--test-image", "True"]
    code, line = error_of([UNIVERSAL, *argv], tmp_path, capsys)
    assert code == 2 and re.search(message, line), line


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    save_actions(tmp_path / "a.npz")
    read_actions(tmp_path / "a.npz", KEYS["universal"])
    module = sys.modules[read_actions.__module__]
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="cannot be read"):
        read_actions(tmp_path / "a.npz", KEYS["universal"])


@pytest.mark.parametrize(
    ("slug", "flags", "message"),
    [
        (UNIVERSAL, ["--actions", "w8 q4"], "unknown key 'q'.*look right"),
        (UNIVERSAL, ["--actions", "w0"], "'0' in 'w0'"),
        (UNIVERSAL, ["--actions", "w8", "--action-path", "a.npz"], "Type --actions None"),
        (UNIVERSAL, ["--variant", "temple_run"], "has 7 keyboard columns and no mouse"),
        (UNIVERSAL, ["--total-blocks", "0"], "--total-blocks 0"),
        (UNIVERSAL, [], "starts from an image of 640x352"),
        ("matrix-game-2-gta-drive", ["--actions", "j4"], "unknown key 'j'.*steer left"),
        ("matrix-game-2-temple-run", ["--actions", "wa4"], "one key at a time"),
    ],
)
def test_bad_flags_are_refused_before_weights(slug, flags, message, tmp_path, capsys):
    code, line = error_of([slug, *flags], tmp_path, capsys)
    assert code == 2 and re.search(message, line), line


@pytest.mark.parametrize(
    ("mode", "size", "fit", "message"),
    [
        ("RGB", (640, 640), False, "the image is 640x640 .*shape of 640x352. Type --fit-image"),
        ("RGBA", (640, 352), False, None),
        ("RGB", (640, 352), False, None),
        ("RGB", (1280, 720), False, None),
        ("RGB", (500, 900), True, None),
    ],
)
def test_images_are_cropped_or_refused(mode, size, fit, message, tmp_path):
    Image.new(mode, size, (10, 200, 30, 255)[: len(mode)]).save(tmp_path / "in.png")
    config = derive_config(RUNNER_CONFIGS[UNIVERSAL], image_path=tmp_path / "in.png", fit_image=fit)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            read_first_frame(config)
        return
    image = read_first_frame(config)
    assert image.shape == (1, 3, 352, 640)
    expected = torch.tensor([10, 200, 30]) / 127.5 - 1
    torch.testing.assert_close(image[0].mean((1, 2)), expected, rtol=0, atol=1e-4)


def test_a_resized_image_has_8_bit_values(tmp_path):
    """Near torch's antialiased resize, rounded as Pillow rounds in the official code."""
    pixels = torch.randint(0, 256, (121, 201, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.byte().numpy()).save(tmp_path / "in.png")
    config = derive_config(TINY_RUNNER, image_path=tmp_path / "in.png")
    levels = (read_first_frame(config) + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    cropped = pixels.permute(2, 0, 1)[None, :, :120].float()  # half a row goes to the even side
    resize = partial(F.interpolate, cropped, (48, 80))
    smooth = resize(mode="bilinear", antialias=True)
    assert 0.1 < (levels - smooth).abs().max() <= 1.01
    assert (levels - resize(mode="nearest")).abs().max() > 50  # negative control


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"takes Actions\(keyboard, mouse\) over 9 pixel frames; got NoneType"),
        (torch.zeros(9, 4), "got Tensor"),
        (Actions(torch.zeros(9, 4)), "needs mouse"),
        (Actions(torch.zeros(9, 5), torch.zeros(9, 2)), r"\[9, 4\].*got \[9, 5\]"),
        (Actions(torch.zeros(12, 4), torch.zeros(12, 2)), r"\[9, 4\].*got \[12, 4\]"),
        (Actions(torch.zeros(9, 4), torch.full((9, 2), float("nan"))), "row 0 .*not finite"),
    ],
)
def test_actions_that_do_not_fit_leave_the_world_as_it_was(pipeline, given, message):
    cache = begin(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline.generate(0, cache, given)
    assert cache.encoder.keyboard is None
    found = advance(pipeline, cache, actions_of(0), 0, 1)
    assert same(found, advance(pipeline, begin(pipeline), actions_of(0), 0, 1))
