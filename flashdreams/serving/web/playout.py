"""Due times of pictures."""


class Playout:
    """The clock of a video: picture n is due n / fps after the first one.

    A picture that is late restarts the count, unless it is late by less than ``slack`` of a frame
    interval; then the next one is on time again. Times are those of ``time.monotonic``, in
    seconds.
    """

    def __init__(self, fps: float, slack: float = 0.5) -> None:
        """Start with a picture that is due at once.

        Args:
            fps: frames per second, above 0.
            slack: fraction of a frame interval.
        """
        self.period = 1 / fps
        self.slack = slack
        self._start: float | None = None
        self._count = 0

    def due(self) -> float | None:
        """When the next picture is due; None: as soon as it arrives."""
        return None if self._start is None else self._start + self._count * self.period

    def wait(self, now: float) -> float:
        """Seconds until the next picture is due, at least 0."""
        due = self.due()
        return 0.0 if due is None else max(0.0, due - now)

    def show(self, now: float) -> float:
        """Count a picture that is sent now.

        Returns:
            How late it is in seconds; 0 if it restarts the count.
        """
        due = self.due()
        if due is None or now - due > self.slack * self.period:
            self._start, self._count = now, 1
            return 0.0
        self._count += 1
        return now - due

    def restart(self) -> None:
        """Restart the count: the next picture is due at once."""
        self._start = None
