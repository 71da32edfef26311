"""Prometheus metrics."""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flashdreams.serving.interface import Host
from flashdreams.serving.web.gate import Gate, Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STAGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LATENCIES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
_JITTER = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_FRACTION = "Frames generated per second, as a fraction of the display rate."
RECENT = 1024
"""Number of recent key-to-photon times in the quantiles."""


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(self, gate: Gate) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flashdreams_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Any, *labels: str) -> Histogram:
            name = f"flashdreams_{name}_seconds"
            return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

        self._steps = counter("ar_steps", "AR steps whose frames have arrived on the host.")
        # looking up a label takes as long as everything else
        self.frames = cache(counter("frames", "Frames by fate.", "fate").labels)
        self._bytes = counter("media_bytes", "Bytes of video sent over WebSockets.")
        self.messages = cache(counter("messages", "Messages from clients.", "type").labels)
        self.errors = cache(counter("errors", "Error messages to clients.", "code").labels)
        stages = histogram("stage", "Time of an AR step by stage.", _STAGES, "stage")
        self._stages = cache(stages.labels)
        self.encode = histogram("encode", "Time to encode a frame.", _JITTER)
        self._late = histogram(
            "frame_lateness", "Time between when a frame was due and when it was sent.", _JITTER
        )
        self.answers = histogram(
            "control_to_send", "Time from an event to its first frame sent.", _LATENCIES
        )
        self._photons = histogram(
            "key_to_photon", "Time from an event to its first frame shown.", _LATENCIES
        )
        self._client_drops = counter("client_dropped_frames", "Frames that clients dropped.")
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.sockets = Gauge(
            "flashdreams_sockets", "Open WebSockets and peer connections.", registry=self.registry
        )
        self.registry.register(_Loop(gate, self._recent))

    def chunk(self, stage_ms: Mapping[str, float]) -> None:
        """Count an AR step whose pictures have arrived."""
        self._steps.inc()
        for stage, milliseconds in stage_ms.items():
            self._stages(stage).observe(milliseconds / 1e3)

    def sent(self, size: int, late_s: float) -> None:
        """Count a sent picture."""
        self.frames("sent").inc()
        self._bytes.inc(size)
        self._late.observe(max(0.0, late_s))

    def shown(self, latencies_ms: list[float], dropped: int) -> None:
        """Record a client's receipt."""
        for milliseconds in latencies_ms:
            self._photons.observe(milliseconds / 1e3)
        self._recent.extend(milliseconds / 1e3 for milliseconds in latencies_ms)
        self._client_drops.inc(dropped)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Loop(Collector):
    """Metrics that are read from the host when they are collected."""

    def __init__(self, gate: Gate, recent: deque[float]) -> None:
        self._gate, self._recent = gate, recent

    def collect(self) -> Iterator[GaugeMetricFamily]:
        recent = self._recent.copy()
        text = "Quantiles of the last key-to-photon times reported by clients."
        name = "flashdreams_key_to_photon_recent_seconds"
        quantiles = GaugeMetricFamily(name, text, labels=["quantile"])
        for share in (0.5, 0.99) if recent else ():
            quantiles.add_metric([str(share)], np.quantile(recent, share, method="inverted_cdf"))
        yield quantiles
        phase = GaugeMetricFamily("flashdreams_phase", "1 for the current phase.", labels=["phase"])
        for name in get_args(Phase):
            phase.add_metric([name], float(name == self._gate.phase))
        yield phase
        host = self._gate.host
        if host is not None:
            yield from self._gauges(host)

    def _gauges(self, host: Host) -> Iterator[GaugeMetricFamily]:
        figures = host.figures()
        fps = figures.frames_per_second
        for name, text, value in (
            ("sessions", "Sessions with a place.", figures.sessions),
            ("places", "Places for sessions.", figures.places),
            ("queue_length", "Queued sessions.", figures.queued),
            ("parked_sessions", "Sessions without a place.", figures.parked),
            ("parked_bytes", "Host memory of those.", figures.parked_bytes),
            ("frames_per_second", "Frames generated per second, over the last seconds.", fps),
            ("real_time_fraction", _FRACTION, fps / host.offer.fps),
            ("host_bytes", "Memory of the process.", figures.host_bytes),
            ("device_bytes", "Memory of the device.", figures.device_bytes),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"flashdreams_{name}", text, value)
