"""What a client measures: arrivals, jitter, key-to-photon times."""

import time
from collections.abc import Sequence
from typing import Any

MAX_VALUES = 100_000
MAX_RECEIPT = 64
"""Key-to-photon times in one receipt."""


class ClientFigures:
    """Figures of one session, over all its sockets."""

    def __init__(self) -> None:
        """Begin without any."""
        self.pictures = 0
        self.first_sha256: str | None = None
        """Of the first picture's pixels, or of its bytes where they are not decoded."""
        self.dropped = 0
        """Pictures between those that arrived, of the same epoch."""
        self.intervals_ms: list[float] = []
        """Between arrivals."""
        self.key_to_photon_ms: list[float] = []
        """From sending an event to its first picture, decoded."""
        self._fps = 0.0
        self._last: tuple[int, int, float] | None = None
        self._first_at: float | None = None
        self._sent: dict[str, float] = {}
        self._answers: list[tuple[int, str]] = []
        self._untold: list[float] = []

    def begin(self, fps: float) -> None:
        """A session has begun, or continues."""
        self._fps = fps

    def reconnected(self) -> None:
        """Intervals do not reach over a lost socket."""
        self._last = None

    def sent(self, event_id: str) -> None:
        """An event leaves now."""
        self._sent[event_id] = time.monotonic()

    def forget(self, event_id: str) -> None:
        """It was refused."""
        self._sent.pop(event_id, None)

    def applied(self, event_ids: Sequence[str], frame: int) -> None:
        """These events act from a frame on."""
        self._answers += [(frame, id) for id in event_ids]

    def arrived(self, frame: int, epoch: int, at: float, shown_at: float) -> None:
        """A picture has arrived, and was decoded."""
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
        """What the next receipt says beside its frame."""
        told, self._untold = self._untold[:MAX_RECEIPT], self._untold[MAX_RECEIPT:]
        return {"key_to_photon_ms": told}

    def report(self) -> dict[str, Any]:
        """All figures: counts, frames per second, percentiles in milliseconds."""
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
    """The 50th, 95th, 99th and the largest; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{share}": ordered[-(-share * len(ordered) // 100) - 1] for share in (50, 95, 99)}
    return {name: round(value, 3) for name, value in (found | {"max": ordered[-1]}).items()}
