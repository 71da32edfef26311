"""Decoding of a live session's video, picture by picture."""

import io
from typing import Any, Literal

import numpy as np

from flashdreams.serving.fragments import avcc_of, find_box


class PictureDecoder:
    """Decodes the binary frames of one socket, without delay."""

    def __init__(self, format: Literal["m4s", "jpeg"]) -> None:
        """Create a decoder for one video format."""
        self.format = format
        self._context: Any = None

    def decode(self, data: bytes) -> np.ndarray:
        """The picture of a binary frame, ``[height, width, 3]`` uint8, RGB.

        Raises:
            ValueError: it is not a picture, or refers to one that is missing.
        """
        if self.format == "jpeg":
            from PIL import Image

            return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB"))
        import av

        if self._context is None:
            self._context = av.CodecContext.create("h264", "r")
            self._context.extradata = avcc_of(data)
            self._context.thread_count = 1
            self._context.flags |= av.codec.context.Flags.low_delay
        frames = self._context.decode(av.Packet(find_box(data, b"mdat")))
        if len(frames) != 1:
            raise ValueError(f"A binary frame of {len(data)} bytes gave {len(frames)} pictures.")
        # by default it starts one thread per core for each picture
        pixels: np.ndarray = frames[0].to_ndarray(format="rgb24", threads=1)
        return pixels
