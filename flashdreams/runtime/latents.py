"""Latents on disk: parts while a run is in progress, one safetensors file at its end."""

from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from flashdreams.runtime.array_file import load_array
from flashdreams.runtime.files import OutputGuard, give_name, open_partial, write_whole
from flashdreams.runtime.parts import safetensors_header
from flashdreams.runtime.text import quoted

BLOCK_BYTES = 2**24
"""Most that is copied at once from the partial to the final file."""


class LatentWriter:
    """Appends chunks of latents to ``<name>.partial.npy``, and makes ``<name>.safetensors`` of it.

    The partial file is a NumPy array ``[T, B, C, H, W]``, float32. Its header is rewritten after
    each chunk, so the file can be read at any time, also after the process was killed: see
    :func:`read_latent_parts`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial.npy")
        self._file: BinaryIO | None = None
        self._guard: OutputGuard
        self._shape: tuple[int, ...] = ()

    @property
    def latent_frames(self) -> int:
        """Latent frames written so far."""
        return self._shape[0] if self._shape else 0

    def append(self, latent: Tensor) -> None:
        """Write one chunk.

        Args:
            latent: ``[B, C, T, H, W]`` on the host; only T may differ between chunks.

        Raises:
            ValueError: a chunk of another B, C, H or W.
            OSError: it cannot be written.
        """
        frames = latent.detach().float().permute(2, 0, 1, 3, 4).contiguous().numpy()
        if self._file is None:
            self._file, self.partial_path, self.path = open_partial(self.path, ".partial.npy")
            self._guard = OutputGuard(self.partial_path)
            self._shape = (0, *frames.shape[1:])
            self._write_header()
        if frames.shape[1:] != self._shape[1:]:
            raise ValueError(
                f"The latent [B, C, H, W] = {list(frames.shape[1:])} does not fit into {self.path} "
                f"after ones of {list(self._shape[1:])}: all latents of a file have the same size."
            )
        self._guard.check()
        self._file.write(frames.astype("<f4", copy=False).data)
        self._file.flush()  # before the header, which must not promise more than there is
        self._shape = (self._shape[0] + len(frames), *self._shape[1:])
        self._write_header()

    def resume(self, latent_frames: int) -> None:
        """Continue after the first latent frames of the partial file; later ones are deleted.

        Raises:
            ValueError: it has fewer, or is not such a file.
            OSError: it cannot be read or written.
        """
        stored = np.load(self.partial_path, mmap_mode="r")
        if len(stored) < latent_frames:
            raise ValueError(f"{self.partial_path} has fewer than {latent_frames} latent frames.")
        end = stored.offset + latent_frames * stored[:1].nbytes
        shape = stored.shape
        del stored
        self._file = self.partial_path.open("r+b")
        self._guard = OutputGuard(self.partial_path)
        self._file.truncate(end)
        self._shape = (latent_frames, *shape[1:])
        self._write_header()

    def finish(self) -> None:
        """Write the final file, tensor ``latents`` ``[B, C, T, H, W]``, and remove the partial one.

        Raises:
            OSError: it cannot be written; the partial file is left.
        """
        try:  # the parts stay open, and so this writer's, until the end
            with write_whole(self.path) as file:
                _write_safetensors(file, np.load(self.partial_path, mmap_mode="r"))
            assert self._file is not None
            give_name(self._file, self.partial_path, None)
        finally:
            self.close()

    def close(self) -> None:
        """Close the partial file and leave it."""
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take is lost, and reported before
                self._file.close()

    def _write_header(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        # NumPy leaves space for more digits of the first size, so the header's length is constant.
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f4", "fortran_order": False, "shape": self._shape}
        )
        self._file.seek(0, 2)
        self._file.flush()


def read_latent_parts(path: str | Path) -> Tensor:
    """Read the latents of a run that was killed, from its ``latents_<slug>.partial.npy``.

    Returns:
        ``[B, C, T, H, W]``, float32, all chunks that were complete; a view of the mapped file,
        which is read where the tensor is used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    try:
        frames = load_array(path, most_bytes=None)
        if frames.ndim != 5 or frames.dtype != np.float32:
            raise ValueError(f"it holds {frames.dtype} {quoted(list(frames.shape))}")
    except ValueError as error:
        raise ValueError(f"{path} is not a file of latents: {error}.") from error
    return torch.from_numpy(frames).permute(1, 2, 0, 3, 4)


def _write_safetensors(file: BinaryIO, frames: np.ndarray) -> None:
    """Write ``[T, B, C, H, W]`` as ``[B, C, T, H, W]``, a block at a time."""
    length, batch, channels, height, width = frames.shape
    shape = (batch, channels, length, height, width)
    file.write(safetensors_header({"latents": ("F32", shape, frames.nbytes)}))
    at_once = max(1, BLOCK_BYTES // (4 * height * width))
    for entry, channel, first in product(range(batch), range(channels), range(0, length, at_once)):
        block = frames[first : first + at_once, entry, channel]
        file.write(np.ascontiguousarray(block).data)
