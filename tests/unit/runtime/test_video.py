"""The streaming video file: what comes back, and what is left when something fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdreams.runtime.video import VideoWriter, to_pixels

PSNR_BOUND_DB = 35.0
"""Smooth frames through H.264 at crf 18 and 4:2:0."""


def smooth_frames(count: int, height: int = 64, width: int = 64, offset: int = 0) -> Tensor:
    """``[F, 3, H, W]`` in [-1, 1], a pattern that moves."""
    y = torch.linspace(0, 3, height)[:, None]
    x = torch.linspace(0, 3, width)[None]
    frames = []
    for t in range(offset, offset + count):
        shift = torch.tensor(t / 4)
        channels = (x + y + shift).sin(), (x - y + shift).cos(), (0.5 * x + y - shift).sin()
        frames.append(0.9 * torch.stack(channels))
    return torch.stack(frames)


def read(path: Path) -> np.ndarray:
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return np.asarray(mediapy.read_video(path))


def psnr_db(actual: np.ndarray, expected: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((actual.astype(float) - expected.astype(float)) ** 2))


def test_frames_come_back_in_number_and_colour(tmp_path: Path) -> None:
    frames = smooth_frames(30)
    with VideoWriter(tmp_path / "new" / "clip.mp4", fps=24) as writer:
        writer.write(frames[:9].bfloat16())
        writer.write(frames[None, 9:21].double())
        writer.write(frames[21:21])
        writer.write(frames[21:])
        assert not writer.path.exists()
        assert writer.partial_path.exists()
        assert writer.partial_path.name == "clip.partial.mp4"
    assert writer.frames_written == 30
    assert [p.name for p in writer.path.parent.iterdir()] == ["clip.mp4"]
    found = read(writer.path)
    expected = to_pixels(frames).numpy()
    assert found.shape == (30, 64, 64, 3)
    assert psnr_db(found, expected) > PSNR_BOUND_DB
    assert psnr_db(found[1:], expected[:-1]) < PSNR_BOUND_DB - 6


def test_odd_sizes_are_enlarged_and_padded(tmp_path: Path) -> None:
    frames = smooth_frames(3, height=15, width=21)
    with VideoWriter(tmp_path / "odd.mp4", fps=10, scale=3) as writer:
        writer.write(frames)
    found = read(writer.path)
    assert found.shape == (3, 46, 64, 3)
    expected = to_pixels(frames).numpy().repeat(3, axis=1).repeat(3, axis=2)
    assert psnr_db(found[:, :45, :63], expected) > 25
    assert psnr_db(found[:, 45:], found[:, 44:45]) > 25


def test_pixels_are_rounded_to_the_nearest() -> None:
    values = torch.tensor([-2.0, -1.0, -0.998, -0.99, 0.0, 1 / 255, 0.998, 1.0, 3.0])
    pixels = to_pixels(values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pixels.shape == (1, 1, 9, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 128, 255, 255, 255]
    assert pixels.dtype == torch.uint8


def test_samples_of_a_batch_stand_side_by_side() -> None:
    batch = torch.stack([smooth_frames(2, 4, 6), -smooth_frames(2, 4, 6)])
    pixels = to_pixels(batch)
    assert pixels.shape == (2, 4, 12, 3)
    assert torch.equal(pixels[:, :, :6], to_pixels(batch[0]))
    assert torch.equal(pixels[:, :, 6:], to_pixels(batch[1]))
    assert not torch.equal(pixels[:, :, 6:], to_pixels(batch[0]))


def test_a_chunk_may_be_overwritten_after_write(tmp_path: Path) -> None:
    chunk = smooth_frames(4)
    expected = to_pixels(chunk).numpy()
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(chunk)
        chunk.fill_(1.0)
    assert psnr_db(read(writer.path), expected) > PSNR_BOUND_DB


@pytest.mark.parametrize(
    ("chunk", "error", "text"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"got \[3, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"got \[2, 8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(2, 3, 8, 10), ValueError, "10x8 pixels cannot follow frames of 8x8"),
    ],
)
def test_unusable_chunks_are_refused(
    tmp_path: Path, chunk: Tensor, error: type[Exception], text: str
) -> None:
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(torch.zeros(2, 3, 8, 8))
        with pytest.raises(error, match=text):
            writer.write(chunk)
    with pytest.raises(ValueError, match="is closed"):
        writer.write(torch.zeros(2, 3, 8, 8))
    assert len(read(writer.path)) == 2


@pytest.mark.parametrize("fields", [{"fps": 0}, {"scale": 0}, {"crf": 52}, {"path": "clip.avi"}])
def test_unusable_settings_are_refused(tmp_path: Path, fields: dict) -> None:
    arguments: dict[str, Any] = {"path": "clip.mp4", "fps": 24} | fields
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        VideoWriter(tmp_path / arguments.pop("path"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_a_frame_no_file_is_left(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", fps=24):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failing_run_leaves_a_playable_partial_file(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "clip.mp4", fps=24)
    with pytest.raises(RuntimeError, match="the model failed"), writer:
        writer.write(smooth_frames(7))
        raise RuntimeError("the model failed")
    assert not writer.path.exists()
    assert len(read(writer.partial_path)) == 7


def test_a_directory_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("not a directory")
    with pytest.raises(OSError, match=r"outputs: .*--output-dir"):
        VideoWriter(tmp_path / "outputs" / "clip.mp4", fps=24)


@pytest.mark.parametrize("name", ["clip.partial.mp4", ""])
@pytest.mark.parametrize("act", ["remove", "rename", "replace"])
def test_a_video_that_vanishes_is_noticed_at_the_next_chunk(
    name: str, act: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    writer = VideoWriter(folder / "clip.mp4", fps=24)
    writer.write(smooth_frames(48))
    wait_for(lambda: writer.partial_path.stat().st_size > 0)
    lost = folder / name
    lost.rename(tmp_path / "elsewhere")
    if act == "replace":
        folder.mkdir(exist_ok=True)
        (folder / "clip.partial.mp4").write_bytes(b"of somebody else")
    if act == "remove" and lost != folder:
        (tmp_path / "elsewhere").unlink()
    with pytest.raises(OSError, match=r"clip\.partial\.mp4, which .* was removed, renamed or"):
        writer.write(smooth_frames(4))
    with pytest.raises(OSError, match="was removed, renamed or replaced"):
        writer.close()
    assert not (folder / "clip.mp4").exists()


def test_a_link_under_the_partial_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_bytes(b"precious")
    (tmp_path / "clip.partial.mp4").symlink_to(victim)
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(smooth_frames(4))
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "clip.mp4").is_file() and not (tmp_path / "clip.mp4").is_symlink()


def write_until_refused(writer: VideoWriter) -> None:
    for index in range(100):
        writer.write(smooth_frames(4, offset=4 * index))
    writer.close()


def test_an_encoder_that_dies_is_reported_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = []
    original = VideoWriter._new_encoder

    def recorded(self: VideoWriter, shape: tuple[int, int]) -> Any:
        encoders.append(original(self, shape))
        return encoders[-1]

    monkeypatch.setattr(VideoWriter, "_new_encoder", recorded)
    writer = VideoWriter(tmp_path / "clip.mp4", fps=24)
    writer.write(smooth_frames(4))
    wait_for(lambda: bool(encoders))
    encoders[0]._writer._proc.kill()
    with pytest.raises(OSError, match="ffmpeg was stopped"):
        writer.close()
    assert not writer.path.exists()


def test_a_slow_encoder_slows_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks wait and one is being encoded; the fourth write() waits."""
    gate = threading.Event()

    class SlowEncoder:
        def add(self, image: np.ndarray) -> None:
            gate.wait(100)

        def close(self) -> None:
            pass

    monkeypatch.setattr(VideoWriter, "_new_encoder", lambda self, shape: SlowEncoder())
    writer = VideoWriter(tmp_path / "clip.mp4", fps=24, max_pending_chunks=2)

    def write_six() -> None:
        for _ in range(6):
            writer.write(smooth_frames(1))

    caller = threading.Thread(target=write_six)
    caller.start()
    wait_for(lambda: writer.frames_written == 3)
    time.sleep(0.1)
    assert writer.frames_written == 3
    gate.set()
    caller.join(100)
    writer.abort()
    assert writer.frames_written == 6


def test_a_caller_that_waits_for_the_encoder_is_freed_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingEncoder:
        def add(self, image: np.ndarray) -> None:
            time.sleep(0.05)
            raise OSError("no more")

        def close(self) -> None:
            pass

    monkeypatch.setattr(VideoWriter, "_new_encoder", lambda self, shape: FailingEncoder())
    writer = VideoWriter(tmp_path / "clip.mp4", fps=24, max_pending_chunks=1)
    with pytest.raises(OSError, match="no more"):
        write_until_refused(writer)
    with pytest.raises(OSError, match="no more"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


CHILD = """
import sys, time
from tests.unit.runtime.test_video import smooth_frames
from flashdreams.runtime.video import VideoWriter
writer = VideoWriter(sys.argv[1], fps=24)
for index in range(10):
    writer.write(smooth_frames(12, offset=12 * index))
time.sleep(3600)
"""
FRAGMENT = 6
"""Frames of a quarter of a second."""


@pytest.mark.slow
def test_a_killed_run_leaves_all_but_its_last_fragment(tmp_path: Path) -> None:
    """kill -9 of the whole process group, ffmpeg included, so that nothing can finish the file."""
    path, partial = tmp_path / "clip.mp4", tmp_path / "clip.partial.mp4"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        start_new_session=True,
        cwd=Path(__file__).parents[3],
    )
    try:
        wait_for(lambda: child.poll() is not None or frames_in(partial) >= 120 - FRAGMENT)
        assert child.poll() is None
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert not path.exists()
    found = read(partial)
    assert 120 - FRAGMENT <= len(found) <= 120
    expected = to_pixels(smooth_frames(len(found))).numpy()
    assert psnr_db(found, expected) > PSNR_BOUND_DB


def frames_in(path: Path) -> int:
    """Frames of a file that may have no fragment yet."""
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        return 0


FORGETFUL_CHILD = """
import sys, time, torch
from flashdreams.runtime.video import VideoWriter
writer = VideoWriter(sys.argv[1], fps=24, max_pending_chunks=100)
original = VideoWriter._new_encoder
def slowly(self, shape):
    time.sleep(0.2)
    return original(self, shape)
VideoWriter._new_encoder = slowly
for _ in range(100):
    writer.write(torch.zeros(1, 3, 64, 64))
"""


INTERRUPTED_TWICE = """
join = writer._thread.join
def interrupted():
    writer._thread.join = join
    raise KeyboardInterrupt
writer._thread.join = interrupted
try:
    writer.abort()
except KeyboardInterrupt:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", INTERRUPTED_TWICE], ids=["forgotten", "interrupted twice"])
def test_a_program_that_ends_without_closing_keeps_its_frames(tmp_path: Path, end: str) -> None:
    path = tmp_path / "clip.mp4"
    child = subprocess.run(
        [sys.executable, "-c", FORGETFUL_CHILD + end, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert not path.exists()
    assert len(read(path.with_name("clip.partial.mp4"))) == 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_chunks_are_copied_before_they_are_overwritten(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="writes a video")
    frames = smooth_frames(24)
    chunk = torch.empty(12, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        for part in frames.split(12):
            chunk.copy_(part)
            writer.write(chunk)
            chunk.fill_(1.0)
    expected = to_pixels(frames.bfloat16()).numpy()
    assert psnr_db(read(writer.path), expected) > PSNR_BOUND_DB
    assert torch.equal(to_pixels(frames.cuda()).cpu(), to_pixels(frames))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_writers_of_one_name_have_a_whole_video_each(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    levels = (-0.5, 0.5)
    writers = [VideoWriter(tmp_path / "same.mp4", fps=16) for _ in levels]
    assert [writer.path.name for writer in writers] == ["same.mp4", "same.2.mp4"]
    for _ in range(3):
        for writer, level in zip(writers, levels, strict=True):
            writer.write(torch.full((2, 3, 16, 16), level))
    for index in order:
        writers[index].close()
    for writer, level in zip(writers, levels, strict=True):
        found = read(writer.path)
        assert len(found) == 6
        assert abs(found.mean() - (level + 1) * 127.5) < 4
    with VideoWriter(tmp_path / "same.mp4", fps=16) as later:  # the name is free again
        assert later.path.name == "same.mp4"


@pytest.mark.parametrize("folder", ["10:30", "-x", "pipe:1", "data:x", "~", "a b", "100%d"])
def test_the_name_of_a_folder_is_no_protocol_and_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(Path(folder) / "clip.mp4", fps=16) as writer:
        writer.write(smooth_frames(3))
    assert len(read(tmp_path / folder / "clip.mp4")) == 3
