"""A video file that is written while its frames are generated."""

import atexit
import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flashdreams.runtime.files import OutputGuard, give_name, open_partial, remedy
from flashdreams.runtime.text import reason_of
from flashdreams.runtime.transfer import start_host_copy

# Nothing waits in the encoder for later frames (zerolatency), and a fragment is closed every
# quarter of a second, so that is what a killed run loses. The matrix is named because players
# guess it from the size.
FFMPEG_ARGS = (
    *("-tune", "zerolatency", "-g", "24"),
    *("-vf", "scale=out_color_matrix=bt709"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    *("-movflags", "+frag_keyframe+empty_moov+default_base_moof"),
    *("-frag_duration", "250000", "-flush_packets", "1"),
)


WriterT = TypeVar("WriterT", bound="ClosedAtEnd")


Frames = tuple[Tensor, "torch.cuda.Event | None"]
"""Pixels on the host, ``[F, H, W, 3]`` uint8, once the event has passed (None: they have)."""


class ClosedAtEnd(ABC):
    """A context that calls ``close`` at its end, and ``abort`` if its body raises."""

    @abstractmethod
    def close(self) -> None:
        """Complete the file."""

    @abstractmethod
    def abort(self) -> None:
        """Leave what was written under a partial name."""

    def __enter__(self: WriterT) -> WriterT:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class VideoWriter(ClosedAtEnd):
    """Streams chunks into ``<name>.partial.mp4``, which becomes ``<name>.mp4`` at the end.

    H.264 in fragmented mp4: a process that is killed leaves a partial file which plays up to its
    last fragment. Only a completely written video gets the final name, and the name has
    one writer at a time: a second one writes ``<name>.2.mp4``, see ``path``. Encoding runs in a
    thread behind a bounded queue, so memory stays constant and a slow disk slows the caller. What
    fails there is raised, as OSError, by the next :meth:`write` or by
    :meth:`close`.

    As a context manager it closes at the end, and aborts if the body raises. A program that ends
    without either counts as failed: its video is aborted. Width or height that
    is odd after enlargement gets its last column or row twice: the 4:2:0 format needs even sizes.

    Frames go to imageio-ffmpeg's binary through mediapy's writer, which passes further ffmpeg
    arguments on (fragments need some) and reports ffmpeg's exit status and messages;
    ``imageio_ffmpeg.write_frames`` does neither, so a full disk would look like success.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        scale: int = 1,
        crf: int = 18,
        preset: str = "veryfast",
        max_pending_chunks: int = 4,
    ) -> None:
        """Reserve the partial file and start the encoding thread.

        Args:
            path: final name, ending in ``.mp4``; its directory is made where it does not exist.
            fps: frames per second.
            scale: whole factor by which pixels are enlarged (nearest neighbour).
            crf: x264's constant rate factor, 0 (lossless) to 51; 18 is visually near lossless.
            preset: x264's speed preset.
            max_pending_chunks: chunks that may wait for the encoder before :meth:`write` waits.

        Raises:
            ValueError: a name that does not end in ``.mp4``, or a number out of range.
            OSError: the directory or the file cannot be written.
        """
        self.path = Path(path)
        if self.path.suffix != ".mp4":
            raise ValueError(f"a video must be named <name>.mp4, got {self.path.name!r}.")
        if not fps > 0 or scale < 1 or not 0 <= crf <= 51 or max_pending_chunks < 1:
            raise ValueError(
                f"fps={fps}, scale={scale}, crf={crf}, max_pending_chunks={max_pending_chunks}: "
                "fps must be above 0, scale at least 1, crf from 0 to 51, "
                "max_pending_chunks at least 1."
            )
        self.frames_written = 0  # queued, that is; the file grows later
        self._fps, self._scale, self._crf, self._preset = fps, scale, crf, preset
        self._frame_shape: tuple[int, int] | None = None
        self._error: OSError | None = None
        self._closed = False
        _import_mediapy()
        self._reserve()
        self._queue: queue.Queue[Frames | None] = queue.Queue(max_pending_chunks)
        # A daemon, for an interpreter that ends would wait for any other thread before it asks
        # for _finish(). It has to: a thread that is cut off inside PyTorch aborts the process.
        self._thread = threading.Thread(target=self._encode, name="video", daemon=True)
        self._thread.start()
        atexit.register(self._finish)

    def write(self, chunk: Tensor) -> None:
        """Append the frames of one chunk.

        The chunk may be changed as soon as this returns: its pixels have been converted (on CUDA:
        the conversion and the copy are queued on the current stream, without waiting for them).

        Args:
            chunk: ``[F, 3, H, W]`` or ``[B, F, 3, H, W]`` in [-1, 1], any floating type, CPU or
                CUDA. The samples of a batch are side by side in the video.

        Raises:
            OSError: the video could not be written; no file has the final name.
            ValueError: the chunk has another form, or its frames another size than those before.
            TypeError: the chunk is not of a floating type.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed; another video needs its own writer.")
        self._check_place()
        self._raise_error()
        pixels = to_pixels(chunk)
        if len(pixels) == 0:
            return
        shape = (pixels.shape[1], pixels.shape[2])
        if shape != (self._frame_shape or shape):
            raise ValueError(
                f"frames of {shape[1]}x{shape[0]} pixels cannot follow frames of "
                f"{self._frame_shape[1]}x{self._frame_shape[0]} in one video."  # type: ignore[index]
            )
        self._frame_shape = shape
        self._queue.put(start_host_copy(pixels) if pixels.is_cuda else (pixels, None))
        self.frames_written += len(pixels)

    def close(self) -> None:
        """Finish the video and give it its final name. Without a frame, no file is left.

        Raises:
            OSError: the video could not be written; the final name is unchanged, and what
                could be written is in the partial file.
        """
        if self._closed:
            return
        try:
            try:
                self._check_place()
            finally:
                self._finish()
            self._raise_error()
            self._give_name()
        finally:
            self._owned.close()

    def abort(self) -> None:
        """Finish the partial file with the frames so far, and leave it under its partial name."""
        if not self._closed:
            self._finish()
            self._owned.close()

    def _give_name(self) -> None:
        if self.frames_written == 0:
            give_name(self._owned, self.partial_path, None)
            return
        self._check_place()
        try:
            give_name(self._owned, self.partial_path, self.path)
        except OSError as error:
            kept = f" It is complete in {self.partial_path}." * self.partial_path.exists()
            raise OSError(
                f"cannot give the video its name {self.path}: {reason_of(error)}.{kept}"
            ) from error

    def _reserve(self) -> None:
        try:
            # ffmpeg writes the same file by its name.
            opened = open_partial(self.path, ".partial.mp4")
            self._owned, self.partial_path, self.path = opened
            self._guard = OutputGuard(self.partial_path)
        except OSError as error:
            raise OSError(
                f"cannot write a video to {self.path.parent}: {reason_of(error)}. "
                "Choose a directory that you may write to, e.g. --output-dir outputs."
            ) from error

    def _finish(self) -> None:
        """End the thread; may be called again, as it is at exit where an interrupt broke it off."""
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        atexit.unregister(self._finish)
        if self.partial_path.is_file() and self.partial_path.stat().st_size == 0:
            give_name(self._owned, self.partial_path, None)

    def _check_place(self) -> None:
        try:
            self._guard.check()
        except OSError as error:
            raise OSError(
                f"{self.partial_path}, which the video is written to, was removed, renamed or "
                "replaced during the run. Run again, and leave the folder in place."
            ) from error

    def _raise_error(self) -> None:
        if self._error is None:
            return
        kept = self.partial_path.exists()
        raise OSError(
            f"the video {self.path} could not be written: {self._error}. {remedy(self._error)}"
            + (f" What was written so far is in {self.partial_path}." if kept else "")
        ) from self._error

    def _encode(self) -> None:
        """The thread: encode what the queue brings until None; after an error, discard it."""
        encoder: _Encoder | None = None
        frames = self._queue.get()
        try:
            while frames is not None:
                pixels = _on_arrival(frames, self._scale)
                if encoder is None:
                    encoder = self._new_encoder(pixels.shape[1:3])
                for image in pixels:
                    encoder.add(image)
                frames = self._queue.get()
            if encoder is not None:
                encoder.close()
        except Exception as error:
            self._error = error if isinstance(error, OSError) else OSError(str(error))
            if encoder is not None:
                with contextlib.suppress(Exception):
                    encoder.close()
            # A write() may be waiting for a place in the queue, and close() is yet to come.
            while frames is not None:
                frames = self._queue.get()

    def _new_encoder(self, shape: tuple[int, int]) -> "_Encoder":
        return _Encoder(self.partial_path, shape, self._fps, self._crf, self._preset)


class _Encoder:
    """mediapy's writer, with uniform errors."""

    def __init__(
        self, path: Path, shape: tuple[int, int], fps: float, crf: int, preset: str
    ) -> None:
        # ffmpeg takes a relative name for an option (-x) or a protocol (10:30, pipe:1).
        self._writer: Any = _import_mediapy().VideoWriter(
            path.absolute(),
            shape,
            codec="libx264",
            fps=fps,
            crf=crf,
            encoded_format="yuv420p",
            ffmpeg_args=("-preset", preset, *FFMPEG_ARGS),
        )
        self._writer.__enter__()

    def add(self, image: np.ndarray) -> None:
        """Write one frame, ``[height, width, 3]`` uint8."""
        try:
            self._writer.add_image(image)
        except OSError as error:
            # ffmpeg has ended; closing it gives the reason.
            self.close()
            raise OSError("ffmpeg ended before its input did") from error

    def close(self) -> None:
        """Wait for ffmpeg to complete the file, or say why it could not."""
        try:
            try:
                self._writer.close()
            except OSError:
                # Bytes that ffmpeg did not take could not be flushed. The pipe is closed all the
                # same, and mediapy asks for the exit status when it is called again.
                self._writer.close()
        except RuntimeError as error:
            complaints = str(error).removeprefix(f"Error writing '{self._writer.path}': ")
            raise OSError(_first_complaint(complaints)) from error


def to_pixels(chunk: Tensor) -> Tensor:
    """A chunk as the pixels of a video.

    Args:
        chunk: ``[F, 3, H, W]`` or ``[B, F, 3, H, W]``, any floating type; -1 is black, 1 is full.

    Returns:
        ``[F, H, B * W, 3]`` uint8 on the chunk's device: ``(v + 1) * 127.5`` of the clamped value
        in float32, rounded to the nearest integer, ties to the even one.

    Raises:
        ValueError: another number of dimensions, or of colour channels.
        TypeError: not a floating type.
    """
    if chunk.ndim not in (4, 5) or chunk.shape[-3] != 3:
        raise ValueError(
            f"a chunk must be [F, 3, H, W] or [B, F, 3, H, W], got {list(chunk.shape)}."
        )
    if not chunk.is_floating_point():
        raise TypeError(f"a chunk must hold floating-point values in [-1, 1], got {chunk.dtype}.")
    values = chunk.detach().to(torch.float32, copy=True)
    pixels = values.clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
    samples = pixels if pixels.ndim == 5 else pixels[None]
    batch, frames, channels, height, width = samples.shape
    return samples.permute(1, 3, 0, 4, 2).reshape(frames, height, batch * width, channels)


def _on_arrival(frames: Frames, scale: int) -> np.ndarray:
    """The frames as ``[F, height, width, 3]``, enlarged, height and width even."""
    on_host, arrived = frames
    if arrived is not None:
        arrived.synchronize()
    pixels = on_host.numpy()
    if scale > 1:
        pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return pixels


def _first_complaint(complaints: str) -> str:
    """The first line of what ffmpeg wrote, without the part of ffmpeg that wrote it."""
    lines = complaints.strip().splitlines()
    if not lines:
        return "ffmpeg was stopped (a limit on file size or memory, or a signal)"
    return lines[0].rpartition("] ")[2].rstrip(".")


def _import_mediapy() -> Any:
    """mediapy, told to use imageio-ffmpeg's program.

    Imported late: it brings matplotlib and IPython along, some 0.7 s that only a video needs.
    """
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return mediapy
