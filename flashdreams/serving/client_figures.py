"""Measurements of a client: arrivals, jitter, key-to-photon times."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_VALUES = 100_000
MAX_RECEIPT = 64
"""Maximum number of key-to-photon times in one receipt."""


class ClientFigures:
    """Measurements of one session, across reconnects."""

    def __init__(self) -> None:
        """Start with no measurements."""
        self.pictures = 0
        self.first_sha256: str | None = None
        """Hash of the first picture's pixels, or of its bytes if pictures are not decoded."""
        self.dropped = 0
        """Missing pictures between received ones of the same epoch."""
        self.intervals_ms: list[float] = []
        """Times between arrivals."""
        self.key_to_photon_ms: list[float] = []
        """Times from sending an event until its first picture is decoded."""
        self._fps = 0.0
        self._last: tuple[int, int, float] | None = None
        self._first_at: float | None = None
        self._sent: dict[str, float] = {}
        self._answers: list[tuple[int, str]] = []
        self._untold: list[float] = []

    def begin(self, fps: float) -> None:
        """Record that a session has started or resumed."""
        self._fps = fps

    def reconnected(self) -> None:
        """Start a new interval, so that none spans a lost socket."""
        self._last = None

    def sent(self, event_id: str) -> None:
        """Record that an event is sent now."""
        self._sent[event_id] = time.monotonic()

    def forget(self, event_id: str) -> None:
        """Drop an event that was refused."""
        self._sent.pop(event_id, None)

    def applied(self, event_ids: Sequence[str], frame: int) -> None:
        """Record the first frame on which events act."""
        self._answers += [(frame, id) for id in event_ids]

    def arrived(self, frame: int, epoch: int, at: float, shown_at: float) -> None:
        """Record a picture that has arrived and was decoded."""
        self.pictures += 1
        self._first_at = at if self._first_at is None else self._first_at
        if self._last is not None and len(self.intervals_ms) < MAX_VALUES:
            last_frame, last_epoch, last_at = self._last
            self.intervals_ms.append(1e3 * (at - last_at))
            if epoch == last_epoch:
                self.dropped += max(0, frame - last_frame - 1)
        self._last = frame, epoch, at
        due = [id for first, id in self._answers if frame >= first]
        self._answers = [(first, id) for first, id in self._answers if frame < first]
        for id in due:
            sent = self._sent.pop(id, None)
            if sent is not None and len(self.key_to_photon_ms) < MAX_VALUES:
                self.key_to_photon_ms.append(1e3 * (shown_at - sent))
                self._untold.append(self.key_to_photon_ms[-1])

    def receipt(self) -> dict[str, Any]:
        """Fields of the next receipt, apart from its frame."""
        told, self._untold = self._untold[:MAX_RECEIPT], self._untold[MAX_RECEIPT:]
        return {"key_to_photon_ms": told}

    def report(self) -> dict[str, Any]:
        """All measurements: counts, frames per second, percentiles in milliseconds."""
        seconds = 0.0
        if self._last is not None and self._first_at is not None:
            seconds = self._last[2] - self._first_at
        period = 1e3 / self._fps if self._fps else 0.0
        jitter = [abs(interval - period) for interval in self.intervals_ms]
        return {
            "pictures": self.pictures,
            "seconds": round(seconds, 3),
            "fps": round((self.pictures - 1) / seconds, 3) if seconds else 0.0,
            "dropped": self.dropped,
            "interval_ms": percentiles(self.intervals_ms),
            "jitter_ms": percentiles(jitter),
            "key_to_photon_ms": percentiles(self.key_to_photon_ms),
            "first_sha256": self.first_sha256,
            "events": len(self.key_to_photon_ms),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The 50th, 95th and 99th percentile and the maximum; None if there are no values."""
    if not values:
        return None
    shares = (50, 95, 99, 100)
    found = np.percentile(values, shares, method="inverted_cdf")
    names = (*(f"p{share}" for share in shares[:3]), "max")
    return {name: round(float(value), 3) for name, value in zip(names, found, strict=True)}
