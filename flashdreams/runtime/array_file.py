"""Arrays of numbers from ``.npy`` files, checked before they are read."""

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flashdreams.runtime.text import check_regular, quoted

MAX_ARRAY_BYTES = 2**26
"""Most bytes of an array that an option names: 500,000 camera poses in float64."""

MAX_HEADER_BYTES = 10_000
"""Most bytes of a header, as in NumPy."""


def load_array(path: str | Path, most_bytes: int | None = MAX_ARRAY_BYTES) -> np.ndarray:
    """Read the numbers of a ``.npy`` file; its header must agree with the file's size.

    Args:
        path: the file.
        most_bytes: most bytes that the array may have; None: no limit, the array is then mapped
            (copy on write) instead of read, and bytes may follow that its header does not count.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a ``.npy`` file of numbers, damaged, cut short or too large; says only what
            is wrong, for the caller to name the file.
    """
    path = Path(path)
    check_regular(path)
    with path.open("rb") as file:
        shape, dtype = _read_header(file)
        promised = math.prod(shape) * dtype.itemsize
        present = os.fstat(file.fileno()).st_size - file.tell()
        if promised > present or (promised < present and most_bytes is not None):
            raise ValueError(
                f"it is damaged: its header promises {promised} bytes for the shape "
                f"{quoted(list(shape))}, the file has {present}"
            )
        if most_bytes is not None and promised > most_bytes:
            raise ValueError(f"its array has {promised} bytes; at most {most_bytes} are read")
    try:
        if most_bytes is None and promised:
            return np.load(path, mmap_mode="c", allow_pickle=False)
        return np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # damaged files raise all kinds of errors
        raise ValueError("it is not a .npy file of numbers") from error


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype; the file is then at its first number."""
    try:
        version = np.lib.format.read_magic(file)
        # The longest header is 64 KiB in 1.0 and 4 GiB later on: look before it is read.
        if version > (1, 0) and int.from_bytes(file.read(4), "little") > MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        file.seek(8)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # 3.0 differs from 2.0 in the encoding of field names, which numbers do not have
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except OSError:
        raise
    except Exception as error:  # NumPy evaluates the header as Python: any error may come of it
        raise ValueError("it is not a .npy file of numbers") from error
    sizes_fit = all(type(size) is int and 0 <= size < 2**48 for size in shape)
    if dtype.kind not in "fiub" or dtype.itemsize == 0 or len(shape) > 16 or not sizes_fit:
        raise ValueError("it is not a .npy file of numbers")
    return shape, dtype
