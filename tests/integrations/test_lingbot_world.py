"""LingBot-World end to end at toy size, what it refuses, and loading at full size."""

import json
import os
import re
import struct
import zlib
from pathlib import Path

import mediapy
import numpy as np
import pytest
import torch
from PIL import Image

from flashdreams.infra.config import derive_config
from flashdreams.infra.video_runner import read_image, take_shape
from flashdreams.integrations.lingbot_world.camera import clip_poses, pixel_frames
from flashdreams.integrations.lingbot_world.config import (
    RUNNER_CONFIGS,
    TINY_PIPELINE,
    TINY_RUNNER,
    TRANSFORMER,
)
from flashdreams.integrations.lingbot_world.encoder import CameraPath
from flashdreams.integrations.lingbot_world.inset import draw_inset
from flashdreams.registry import discover
from flashdreams.run import main
from flashdreams.runtime.actions import KeyMotion, integrate, parse_actions
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.image_file import gradient_image
from tests.integrations.refusals import error_of
from tests.manifests import load_manifest, write_sparse_safetensors

SLUG = TINY_RUNNER.runner_name
MOTION = KeyMotion(move_per_frame=0.25, turn_per_frame_rad=0.03)


def example_files(folder: Path, poses: int = 21) -> list[str]:
    """An image, a path and intrinsics as files, and the flags that name them."""
    path = integrate(parse_actions(f"w{poses - 1}"), MOTION).numpy().astype(np.float32)
    np.save(folder / "poses.npy", path)
    np.save(folder / "intrinsics.npy", np.tile(np.float32([477, 477, 416, 240]), (poses, 1)))
    Image.new("RGB", (224, 126), (200, 40, 90)).save(folder / "image.jpg")
    return [
        SLUG,
        *("--image-path", str(folder / "image.jpg")),
        *("--pose-path", str(folder / "poses.npy")),
        *("--intrinsic-path", str(folder / "intrinsics.npy")),
        *("--prompt", "a fox", "--device", "cpu", "--output-dir", str(folder)),
    ]


def frames_of(folder: Path) -> np.ndarray:
    return np.asarray(mediapy.read_video(folder / f"{SLUG}.mp4"))


def roll_out(pipeline, camera: CameraPath, steps: int, seed: int = 0) -> list[torch.Tensor]:
    cache = pipeline.initialize_cache(text=["a fox"], image=gradient_image(32, 48), seed=seed)
    chunks, start = [], 0
    for i in range(steps):
        stop = pixel_frames(3 * (i + 1))
        chunks.append(pipeline.generate(i, cache, camera.part(slice(start, stop))))
        pipeline.finalize(i, cache)
        start = stop
    return chunks


def walk(actions: str) -> CameraPath:
    poses = integrate(parse_actions(actions), MOTION)
    return CameraPath(poses, torch.tensor([477.0, 477.0, 416.0, 240.0]).expand(len(poses), 4))


def test_every_slug_of_the_issue_is_registered():
    slugs = ["lingbot-world-fast", "lingbot-world-fast-taehv-window15-sink3", "lingbot-world-base"]
    slugs += [SLUG, "lingbot-world-base-tiny-random"]
    assert list(RUNNER_CONFIGS) == slugs
    found = discover()
    for slug in slugs:
        assert slug in found and RUNNER_CONFIGS[slug].pipeline.name == slug


def test_files_become_a_video_that_ends_with_the_poses(tmp_path, capsys):
    assert main(example_files(tmp_path, poses=25)) == 0
    said = capsys.readouterr().out
    assert "The poses ended: 25 of them cover 2 of 4 AR steps (21 frames)" in said
    assert frames_of(tmp_path).shape == (21, 64, 112, 3)
    records = json.loads((tmp_path / f"stats_{SLUG}.json").read_text())["records"]
    assert len(records) == 2


def test_a_path_that_is_long_enough_is_not_said_to_run_out(tmp_path, capsys):
    assert main([*example_files(tmp_path, poses=25), "--total-blocks", "1"]) == 0
    assert "ran out" not in capsys.readouterr().out
    assert len(frames_of(tmp_path)) == 9


@pytest.mark.parametrize(("total_blocks", "frames"), [(4, 25), (2, 21), (1, 9)])
def test_offline_spreads_the_whole_clip_that_was_asked_for(total_blocks, frames, tmp_path):
    """25 poses become 6 latent frames from the first pose to the last; asking for less cuts."""
    overrides = dict(actions="w20 l4", total_blocks=total_blocks, output_dir=tmp_path)
    runner = derive_config(TINY_RUNNER, device="cpu", **overrides).setup()
    camera = runner.conditions()["camera"]
    cache = runner.pipeline.encoder.initialize_cache(torch.zeros(1, 20, 1, 8, 14), camera)
    poses = integrate(parse_actions("w20 l4"), runner.config.motion())
    expected = clip_poses(poses[:frames], 3 * min(total_blocks, 2))
    assert len(camera) == frames and torch.equal(cache.clip.poses, expected)
    runner.close()


@pytest.mark.parametrize("mode", ["offline", "streaming"])
def test_key_presses_become_a_video_in_both_modes(mode, tmp_path):
    argv = [SLUG, "--actions", "w9 l8 wa4", "--pose-mode", mode, "--show-path", "True"]
    assert main([*argv, "--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    assert len(frames_of(tmp_path)) == 21


def test_steering_by_keys_runs_from_presses_and_from_files(tmp_path, capsys):
    act = [
        *("--pipeline.encoder.control-type", "act"),
        *("--pipeline.diffusion-model.transformer.camera-channels", "7"),
    ]
    files = example_files(tmp_path)
    folder = ["--device", "cpu", "--output-dir", str(tmp_path)]
    assert main([SLUG, *act, "--actions", "w12", *folder]) == 0
    assert main([*files, *act]) == 2
    assert "give --key-path FILE" in capsys.readouterr().err
    np.save(tmp_path / "keys.npy", np.eye(4)[np.zeros(21, dtype=int)])
    assert main([*files, "--key-path", str(tmp_path / "keys.npy")]) == 2  # of another model
    assert "for models that are controlled by keys: omit it" in capsys.readouterr().err
    assert main([*files, *act, "--key-path", str(tmp_path / "keys.npy")]) == 0
    assert len(frames_of(tmp_path)) == 21


@pytest.mark.skipif(
    "FLASHDREAMS_EXAMPLES_DIR" not in os.environ,
    reason="FLASHDREAMS_EXAMPLES_DIR does not name a folder with the public example",
)
def test_public_example_runs(tmp_path):
    folder = Path(os.environ["FLASHDREAMS_EXAMPLES_DIR"])
    argv = [
        *(SLUG, "--image-path", str(folder / "image.jpg"), "--total-blocks", "3"),
        *("--pose-path", str(folder / "poses.npy")),
        *("--intrinsic-path", str(folder / "intrinsics.npy")),
        *("--prompt-path", str(folder / "prompt.txt")),
        *("--device", "cpu", "--output-dir", str(tmp_path)),
    ]
    assert main(argv) == 0
    assert len(frames_of(tmp_path)) == 33


@pytest.fixture(scope="module")
def pipeline():
    sizes = dict(latent_height=4, latent_width=6)
    config = derive_config(TINY_PIPELINE, diffusion_model=dict(transformer=sizes))
    return config.setup(device="cpu")


def test_camera_and_image_steer_what_is_seen(pipeline):
    ahead, turning = walk("w20"), walk("w8 l12")
    a, b = roll_out(pipeline, ahead, 2), roll_out(pipeline, turning, 2)
    assert torch.equal(a[0], b[0])  # the same way so far
    assert not torch.equal(a[1], b[1])
    assert [chunk.shape for chunk in a] == [(1, n, 3, 32, 48) for n in (9, 12)]
    assert all(torch.equal(x, y) for x, y in zip(a, roll_out(pipeline, ahead, 2), strict=True))


def test_forks_in_a_batch_have_cameras_of_their_own(pipeline):
    paths = [walk("w32"), walk("w9 j23")]
    cache = pipeline.initialize_cache(text=["a fox"], image=gradient_image(32, 48), seed=0)
    pipeline.generate(0, cache, paths[0].part(slice(0, pixel_frames(3))))
    pipeline.finalize(0, cache)
    forks, batch = cache.fork(2), cache.fork_batch(2)
    parts = [path.part(slice(pixel_frames(3), pixel_frames(6))) for path in paths]
    pipeline.generate(1, batch, parts)
    for fork, part in zip(forks, parts, strict=True):
        pipeline.generate(1, fork, part)
    expected = torch.cat([fork.latent for fork in forks])
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(batch.latent, expected, rtol=0, atol=bound)
    assert not torch.allclose(expected[0], expected[1], atol=bound)  # negative control


def test_prompt_change_reencodes_the_window_with_its_cameras(pipeline):
    """The same prompt again changes nothing, so every chunk met its own camera."""
    camera = walk("w14 l18")
    expected = roll_out(pipeline, camera, 3)
    cache = pipeline.initialize_cache(text=["a fox"], image=gradient_image(32, 48))
    start = 0
    for i in range(3):
        end = pixel_frames(3 * (i + 1))
        chunk = pipeline.generate(i, cache, camera.part(slice(start, end)))
        torch.testing.assert_close(chunk, expected[i], rtol=0, atol=1e-5)  # float32
        pipeline.finalize(i, cache)
        pipeline.update_prompt(cache, "a fox", reencode_window=True)
        start = end


def test_inset_shows_the_way_so_far():
    chunk = torch.zeros(1, 3, 3, 40, 60)
    poses = walk("w20").poses
    shown = draw_inset(chunk, poses, 6)
    assert (chunk == 0).all() and (shown[..., :-10, :] == 0).all() and (shown[..., :-10] == 0).all()
    corner = shown[0, :, :, -10:, -10:]
    camera_rows = [(frame[2] == -0.6).nonzero()[:, 0].float().mean() for frame in corner]
    assert camera_rows[0] >= camera_rows[-1] and corner[0, 2].max() == 1  # up is ahead


@pytest.mark.parametrize("actions", ["w4", "l9", ""])
def test_inset_of_a_short_path_or_none(actions):
    poses = walk(actions).poses
    assert draw_inset(torch.zeros(1, len(poses), 3, 16, 16), poses, 0).abs().max() <= 1


def test_image_of_the_reference_aspect_ratio_is_stretched(tmp_path):
    Image.new("RGB", (1280, 720), (10, 200, 30)).save(tmp_path / "in.png")
    config = derive_config(TINY_RUNNER, image_path=tmp_path / "in.png")
    image = read_image(take_shape(config))
    assert image.shape == (1, 3, 64, 112)
    expected = torch.tensor([10, 200, 30]) / 127.5 - 1
    torch.testing.assert_close(image[0].mean((1, 2)), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_the_other_variant_is_refused(tmp_path):
    with torch.device("meta"):
        model = TRANSFORMER.setup()
    path = tmp_path / "act.safetensors"
    write_sparse_safetensors(path, load_manifest("lingbot_world_act"))
    config = CheckpointConfig(source=str(path))
    with pytest.raises(CheckpointError, match=r"patch_embedding_wancamctrl\.weight") as caught:
        load_checkpoint(model, config, device="meta")
    assert "[5120, 1792] in the file, [5120, 1536] in the module" in str(caught.value)
    with torch.device("meta"):
        other = derive_config(TRANSFORMER, camera_channels=7).setup()
    assert load_checkpoint(other, config, device="meta").tensors == 1421


# Bad input: one line each, before any weights are looked for.

FULL_SIZE = "lingbot-world-fast"


def save(name: str, change):
    def apply(folder: Path) -> None:
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return apply


def set_entry(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def replace_by(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def header_of_png(width: int, height: int):
    """A picture's head without its body, so that only the stated size can be looked at."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return replace_by("image.jpg", b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 9) + b"IDAT")


def picture(mode: str, size: tuple[int, int]):
    return lambda folder: Image.new(mode, size).save(folder / "image.jpg", format="png")


BAD_FILES = [
    (save("poses.npy", lambda p: p[:, :3]), r"--pose-path .*must be \[frames, 4, 4\]; got \[21, 3"),
    (save("poses.npy", lambda p: p.astype(complex)), "not a .npy file of numbers"),
    (save("poses.npy", set_entry((7, 0, 3), np.nan)), "pose of frame 7 is not finite"),
    (save("poses.npy", set_entry((5, 0, 0), 2.0)), "3x3 of frame 5 is not a rotation"),
    (save("poses.npy", set_entry((6, 3, 3), 0.0)), "last row of frame 6 is 0, 0, 0, 0"),
    (lambda folder: [save(f, lambda a: a[:8])(folder) for f in ("poses.npy", "intrinsics.npy")],
     "8 poses are fewer than one chunk of 3 latent frames needs; give at least 9"),
    (save("intrinsics.npy", lambda k: k[:-1]), "20 rows of intrinsics for 21 poses"),
    (save("intrinsics.npy", set_entry((2, 1), -1.0)), "focal lengths of frame 2 .* positive"),
    (save("intrinsics.npy", lambda k: k.ravel()), r"--intrinsic-path .*\[frames, 4\]"),
    (save("intrinsics.npy", set_entry((2, slice(0, 2)), 3.63)),
     "frame 2, 3.63 and 3.63, give a view of 179 degrees; at most 150 .* fx of at least 112 and"),
    (save("intrinsics.npy", lambda k: k / np.float32([832, 480, 832, 480])),
     "give a view of 180 degrees.*not in fractions of it"),
    (replace_by("poses.npy", b"not an array"), "--pose-path .*not a .npy file of numbers"),
    (replace_by("poses.npy", b""), "--pose-path .*not a .npy file of numbers"),
    (lambda folder: (folder / "poses.npy").unlink(), "--pose-path .* cannot be read: No such file"),
    (replace_by("image.jpg", b"no image"), "--image-path .*not a readable image"),
    (lambda folder: (folder / "image.jpg").unlink(), "--image-path .*No such file"),
    (header_of_png(8000, 7000), "the image is huge, 8000x7000"),
    (header_of_png(30000, 20000), "the image is huge"),
    (picture("RGB", (4000, 1)), "the image is 4000x1 .*no video of that shape.*--fit-image True"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES)
def test_bad_files_are_refused_before_weights(spoil, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    argv = example_files(tmp_path)
    spoil(tmp_path)
    code, line = error_of([FULL_SIZE, *argv[1:]], tmp_path, capsys)
    assert code == 2 and re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", "470"], "--height 470: must be a multiple of 16.*Nearest: 464 and 480"),
        (["--width", "830"], "--width 830: must be a multiple of 16.*Nearest: 816 and 832"),
        (["--actions", "w8 q4"], "unknown key 'q'"),
        (["--world-scale", "0"], "world_scale=0.*must be positive"),
        (["--move-per-frame", "-1"], "move_per_frame=-1.0 is not a speed"),
        (["--total-blocks", "0"], "--total-blocks 0"),
        (["--actions", "w8"], "starts from an image"),
        (["--actions", "w7"], "8 poses are fewer than one chunk"),
        (["--actions", "w8", "--intrinsics", "0", "1", "1", "1"], "--intrinsics: the focal"),
        (["--actions", "w8", "--intrinsics", "112", "64", "9", "9"], "give a view of 150 degrees"),
        ([], "give --pose-path FILE, or type key presses"),
    ],
)
def test_bad_flags_are_refused_before_weights(flags, message, tmp_path, capsys):
    code, line = error_of([FULL_SIZE, *flags], tmp_path, capsys)
    assert code == 2 and re.search(message, line), line
