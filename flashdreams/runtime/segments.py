"""A video in segments that end at snapshots, joined without re-encoding."""

import subprocess
from pathlib import Path

from torch import Tensor

from flashdreams.runtime.files import open_owned
from flashdreams.runtime.video import ClosedAtEnd, VideoWriter


class SegmentedVideo(ClosedAtEnd):
    """Writes ``<folder>/<first AR step>.mp4`` one after the other, and joins them at the end.

    Each segment is complete once the next one has begun, so a killed run loses only the
    current one. As a context manager it closes at the end, and aborts if the body raises.
    """

    def __init__(self, path: Path, folder: Path, *, fps: float, scale: int) -> None:
        """Write nothing yet.

        Args:
            path: final name of the video, ending in ``.mp4``.
            folder: of the segments.
            fps: frames per second.
            scale: whole factor by which pixels are enlarged.
        """
        self.path, self.folder = path, folder
        self._fps, self._scale = fps, scale
        self._segment: VideoWriter | None = None

    def begin(self, first: int) -> None:
        """Start, or continue, with the frames of an AR step.

        Segments from there on and unfinished ones are deleted.
        """
        for file in self.folder.glob("*.mp4") if self.folder.is_dir() else ():
            if file.name.endswith(".partial.mp4") or int(file.stem) >= first:
                file.unlink()
        self._segment = self._new(first)

    def write(self, chunk: Tensor) -> None:
        """Append a chunk; see `VideoWriter.write`."""
        if self._segment is None:
            self.begin(0)
        assert self._segment is not None
        self._segment.write(chunk)

    def cut(self, first: int) -> None:
        """End the segment; the next one begins with an AR step.

        Raises:
            OSError: the segment could not be written.
        """
        if self._segment is not None:
            self._segment.close()
        self._segment = self._new(first)

    def close(self) -> None:
        """End the last segment and make one video of all of them.

        Raises:
            OSError: a segment or the video could not be written; the segments are left.
        """
        if self._segment is not None:
            self._segment.close()
        segments = sorted(self.folder.glob("*.mp4"))
        if segments:
            join_videos(segments, self.path)

    def abort(self) -> None:
        """End the segment and leave it under its partial name."""
        if self._segment is not None:
            self._segment.abort()

    def _new(self, first: int) -> VideoWriter:
        path = self.folder / f"{first:08d}.mp4"
        return VideoWriter(path, fps=self._fps, scale=self._scale)


def join_videos(segments: list[Path], path: Path) -> None:
    """Concatenate videos of one codec, size and rate without changing their packets.

    Args:
        segments: the videos, in their order, all in one folder.
        path: the video, which gets its name when it is complete.

    Raises:
        OSError: it could not be written.
    """
    import imageio_ffmpeg

    # Absolute: ffmpeg reads 10:30/x as a protocol and -x as an option.
    folder, partial = segments[0].parent.absolute(), path.absolute()
    listing, partial = folder / "segments.txt", partial.with_name(f"{path.stem}.partial.mp4")
    listing.write_text("".join(f"file '{segment.name}'\n" for segment in segments))
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"),
        *("-f", "concat", "-i", str(listing), "-c", "copy", str(partial)),
    ]
    with open_owned(partial):  # a link that has the name is not followed
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(
            f"the video {path} could not be joined from its {len(segments)} segments: "
            f"{reason[0] if reason else 'ffmpeg was stopped by a signal'}. They are in {folder}."
        )
    listing.unlink()
    partial.replace(path)
