"""Encoders of live pictures: H.264 by PyAV, JPEG by Pillow."""

import io
import logging
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch

from flashdreams.serving.fragments import TIMESCALE, avcc_of, avcc_sample, fragment

Format = Literal["m4s", "jpeg", "webrtc"]
EncoderName = Literal["auto", "libx264", "h264_nvenc"]

NO_KEYS = 2**30
"""Maximum distance of key pictures, in pictures, without requests for one."""
ONE_THREAD_PIXELS = 640 * 480
JPEG_QUALITY = 85
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "ultrafast", "tune": "zerolatency", "crf": "20", "forced-idr": "1"},
    "h264_nvenc": {
        **{"preset": "p2", "tune": "ull", "rc": "vbr", "cq": "22", "forced-idr": "1"},
        **{"zerolatency": "1", "delay": "0", "bf": "0"},
    },
}

logger = logging.getLogger(__name__)


class Encoder(ABC):
    """Encodes the pictures of one client in order, and wraps them for its transport."""

    format: Format
    codec: str | None
    """Codec name for browsers; None if each picture is a file."""

    @abstractmethod
    def encode(self, pixels: np.ndarray, *, key: bool) -> tuple[Any, bool]:
        """Encode a picture.

        Args:
            pixels: ``[height, width, 3]`` uint8, RGB.
            key: whether decoding must be able to start here.

        Returns:
            The encoded picture, and whether decoding can start here.
        """

    def wrap(self, picture: Any, *, key: bool) -> Any:
        """Wrap a picture of ``encode`` for the transport; dropped pictures are not wrapped.

        May be called from another thread than ``encode``. By default it is sent as it is.
        """
        return picture


class JpegEncoder(Encoder):
    """Encodes every picture as a JPEG file."""

    format: Format = "jpeg"
    codec = None

    def encode(self, pixels: np.ndarray, *, key: bool) -> tuple[bytes, bool]:
        """See `Encoder`."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue(), True


class PlanesEncoder(Encoder):
    """Converts pictures to YUV 4:2:0 planes for a media track, which encodes them itself.

    Colours follow BT.601, which WebRTC receivers assume.
    """

    format: Format = "webrtc"
    codec = None

    def __init__(self, width: int, height: int) -> None:
        """Create an encoder for one size.

        Args:
            width: in pixels, even.
            height: in pixels, even.

        Raises:
            ValueError: an odd size.
        """
        if width % 2 or height % 2:
            text = f"WebRTC needs even sizes; {width}x{height} is served over WebSockets only."
            raise ValueError(text)
        from av.video.reformatter import VideoReformatter

        self._to_yuv: Any = VideoReformatter()  # its stubs do not declare names of colour spaces
        self._threads = _threads(width, height)

    def encode(self, pixels: np.ndarray, *, key: bool) -> tuple[Any, bool]:
        """A ``VideoFrame`` of PyAV; the receiver requests key pictures from the track."""
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        options = {"format": "yuv420p", "dst_colorspace": "ITU601", "threads": self._threads}
        return self._to_yuv.reformat(frame, **options), False


class H264Encoder(Encoder):
    """Fragmented MP4 with gapless timestamps; ``ftyp`` and ``moov`` precede the first picture.

    It has no frame delay: every call of ``encode`` returns the picture passed to it.
    """

    format: Format = "m4s"

    def __init__(self, width: int, height: int, fps: float, name: EncoderName = "auto") -> None:
        """Open an encoder.

        Args:
            width: in pixels, even.
            height: in pixels, even.
            fps: frames per second.
            name: encoder name in PyAV; see `WebSettings.encoder`.

        Raises:
            ValueError: an odd size, or the encoder cannot be opened.
        """
        if width % 2 or height % 2:
            raise ValueError(f"H.264 needs even sizes; {width}x{height} is served as JPEG only.")
        from av.video.reformatter import VideoReformatter

        self.fps = fps
        self._to_yuv = VideoReformatter()
        self._threads = _threads(width, height)
        self._stream, self.init = _open(width, height, fps, name)
        self.codec = f"avc1.{avcc_of(self.init)[1:4].hex()}"
        self._encoded = 0
        self._wrapped = 0

    def encode(self, pixels: np.ndarray, *, key: bool) -> tuple[bytes, bool]:
        """See `Encoder`."""
        import av
        from av.video.frame import PictureType
        from av.video.reformatter import Colorspace

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = self._to_yuv.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=self._threads
        )
        frame.pts, frame.time_base = self._time(self._encoded), Fraction(1, TIMESCALE)
        frame.pict_type = PictureType.I if key or not self._encoded else PictureType.NONE
        packets = self._stream.encode(frame)
        self._encoded += 1
        if len(packets) != 1:
            raise RuntimeError(f"{self._stream.name} gave {len(packets)} pictures for one.")
        return avcc_sample(bytes(packets[0])), packets[0].is_keyframe

    def wrap(self, picture: bytes, *, key: bool) -> bytes:
        """One fragment; the first one follows ``ftyp`` and ``moov``."""
        time, self._wrapped = self._time(self._wrapped), self._wrapped + 1
        duration = self._time(self._wrapped) - time
        data = fragment(picture, number=self._wrapped, time=time, duration=duration, key=key)
        return self.init + data if self._wrapped == 1 else data

    def _time(self, count: int) -> int:
        return round(count * TIMESCALE / self.fps)


def new_encoder(
    format: Format, width: int, height: int, fps: float, name: EncoderName = "auto"
) -> Encoder:
    """An encoder for one client.

    Raises:
        ValueError: it cannot encode pictures of this size, or is not available.
    """
    if format == "webrtc":
        return PlanesEncoder(width, height)
    return JpegEncoder() if format == "jpeg" else H264Encoder(width, height, fps, name)


def _threads(width: int, height: int) -> int:
    """Threads of an encoder and of its colour conversion; PyAV's default is one per core."""
    return 1 if width * height <= ONE_THREAD_PIXELS else 2


def _open(width: int, height: int, fps: float, name: EncoderName) -> tuple[Any, bytes]:
    """A PyAV stream with an open encoder, and ``ftyp`` and ``moov``."""
    from av.error import FFmpegError

    names: tuple[str, ...] = (name,)
    if name == "auto":
        names = ("h264_nvenc", "libx264") if torch.cuda.is_available() else ("libx264",)
    for candidate in names:
        try:
            return _open_named(width, height, fps, candidate)
        except (FFmpegError, ValueError) as error:
            logger.info("encoder %s cannot be opened here: %s", candidate, error)
    raise ValueError(f"None of the encoders {', '.join(names)} can be opened here.")


def _open_named(width: int, height: int, fps: float, name: str) -> tuple[Any, bytes]:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    file = io.BytesIO()
    flags = {
        "movflags": "empty_moov+default_base_moof+frag_custom",
        "video_track_timescale": str(TIMESCALE),
    }
    container = av.open(file, "w", format="mp4", options=flags)
    rate = Fraction(fps).limit_denominator(1001)
    stream: Any = container.add_stream(name, rate=rate, options=dict(_OPTIONS[name]))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = Fraction(1, TIMESCALE)
    context = stream.codec_context
    context.gop_size = NO_KEYS
    context.thread_count = _threads(width, height)
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.color_range = ColorRange.MPEG
    container.start_encoding()
    return stream, file.getvalue()
