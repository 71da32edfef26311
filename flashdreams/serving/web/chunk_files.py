"""A chunk's pictures as one HTTP response."""

import base64
import io
import json
from typing import Any, Literal

import numpy as np
from fastapi.responses import Response

from flashdreams.serving.interface import Chunk
from flashdreams.serving.web.codec import EncoderName, H264Encoder, JpegEncoder

ChunkFormat = Literal["mp4", "npy", "jpeg"]
STEP_HEADER = "X-Flashdreams-Step"
"""Header with the step's figures as JSON, if the body is a file."""


def chunk_answer(
    chunk: Chunk, step: dict[str, Any], format: ChunkFormat, fps: float, encoder: EncoderName
) -> Response:
    """Encode a chunk; blocks.

    Args:
        chunk: chunk from the host.
        step: figures of the step, JSON values.
        format: ``"mp4"`` H.264; ``"npy"`` the uint8 array ``[F, height, width, 3]`` in NumPy's
            file format; ``"jpeg"`` JSON with a ``data:`` URL for each picture.
        fps: frame rate of the video.
        encoder: H.264 encoder.

    Raises:
        ValueError: there is no such encoder, or the size is odd.
    """
    frames = chunk.frames.numpy()
    headers = {STEP_HEADER: json.dumps(step)}
    if format == "jpeg":
        content = json.dumps({"step": step, "pictures": [_data_url(frame) for frame in frames]})
        return Response(content, media_type="application/json", headers=headers)
    if format == "npy":
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(frames), allow_pickle=False)
        return Response(file.getvalue(), media_type="application/x-npy", headers=headers)
    height, width = frames.shape[1:3]
    h264 = H264Encoder(width, height, fps, encoder)
    encoded = (h264.encode(frame, key=False) for frame in frames)
    body = b"".join(h264.wrap(data, key=key) for data, key in encoded)
    return Response(body, media_type="video/mp4", headers=headers)


def _data_url(frame: np.ndarray) -> str:
    data, _ = JpegEncoder().encode(frame, key=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
