"""Fragmented MP4 with one picture per fragment, and parsing of its boxes.

PyAV writes the first boxes of a file. The fragments are written here, because a muxer writes a
fragment only when it receives the next picture, which would delay every picture by one.

Source: ISO/IEC 14496-12 (``moof``, ``mdat``) and 14496-15 (``avcC``).
"""

import re
import struct
from collections.abc import Iterator

TIMESCALE = 90_000
"""Units of time in a second."""

_START_CODE = re.compile(rb"\x00{2,3}\x01")
_BASE_IS_MOOF, _HAS_TFHD_FLAGS = 0x020000, 0x000020
_HAS_OFFSET, _HAS_DURATION, _HAS_SIZE = 0x000001, 0x000100, 0x000200
_MOOF = struct.Struct(">I4s I4sII I4s I4sIII I4sIQ I4sII3I")
"""``moof`` with ``mfhd`` and, in ``traf``, ``tfhd``, ``tfdt`` and ``trun`` of one sample: sizes,
kinds, versions with flags, and fields."""
_KEY, _NOT_KEY = 0x02000000, 0x01010000
"""Sample flags: key picture; picture that depends on others (not a sync sample)."""


def avcc_sample(annex_b: bytes) -> bytes:
    """Convert NAL units with start codes to NAL units with length prefixes, as in MP4."""
    units = (unit for unit in _START_CODE.split(annex_b) if unit)
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def fragment(sample: bytes, *, number: int, time: int, duration: int, key: bool) -> bytes:
    """One picture as ``moof`` and ``mdat``.

    Args:
        sample: sample of the only track, as in ``mdat``.
        number: number of the fragment, from 1.
        time: time of the picture, in units of the track.
        duration: in the same units.
        key: whether decoding can start here.
    """
    flags = _KEY if key else _NOT_KEY
    offset = _MOOF.size + 8
    moof = _MOOF.pack(
        *(_MOOF.size, b"moof"),
        *(16, b"mfhd", 0, number),
        *(_MOOF.size - 24, b"traf"),
        *(20, b"tfhd", _BASE_IS_MOOF | _HAS_TFHD_FLAGS, 1, flags),
        *(20, b"tfdt", 1 << 24, time),
        *(28, b"trun", _HAS_OFFSET | _HAS_DURATION | _HAS_SIZE, 1),
        *(offset, duration, len(sample)),
    )
    return moof + struct.pack(">I4s", 8 + len(sample), b"mdat") + sample


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of each box.

    Raises:
        ValueError: the bytes are truncated or are not boxes.
    """
    end = len(data) if end is None else end
    while start < end:
        if end - start < 8:
            raise ValueError(f"{end - start} bytes are too few for a box of MP4.")
        size, kind = struct.unpack_from(">I4s", data, start)
        if not 8 <= size <= end - start:
            raise ValueError(f"A box {kind!r} of MP4 says {size} bytes of {end - start}.")
        yield kind, start + 8, start + size
        start += size


def find_box(data: bytes, *path: bytes) -> bytes:
    """Content of the first box of a path, such as ``b"moov", b"trak"``.

    Raises:
        ValueError: there is none.
    """
    start, end = 0, len(data)
    for wanted in path:
        found = next((place for kind, *place in boxes(data, start, end) if kind == wanted), None)
        if found is None:
            raise ValueError(f"No box {wanted!r} in the MP4.")
        start, end = found
    return data[start:end]


def avcc_of(init: bytes) -> bytes:
    """Content of ``avcC`` (the decoder's configuration) from ``ftyp`` and ``moov``.

    Raises:
        ValueError: there is none.
    """
    entry = find_box(init, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    (size,) = struct.unpack_from(">I", entry, 8)  # after version, flags and number of entries
    visual = entry[16 + 78 : 8 + size]  # after the fields of a VisualSampleEntry
    return find_box(visual, b"avcC")
