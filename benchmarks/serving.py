"""Live sessions through the real client: latency, jitter, sessions against fps, cost of serving.

The server and its loop run in this process, each client in a separate process. Clients replay a
control log and measure the time from sending an event until the first picture of the responding
chunk is decoded. The cost of serving is the time of an AR step with one reading client, without
pacing, compared with a bare loop over the same pipeline; both take turns in this process and must
return the same frames. ``processor_ms`` is the CPU time of this process per AR step, over all
threads; on a shared CPU it is more meaningful than wall time.

``python benchmarks/serving.py toy-world --json out.json``
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import command
import report
import torch

from flashdreams.infra.session import Session
from flashdreams.parallel.messages import MessageChannel
from flashdreams.registry import discover
from flashdreams.runtime.stats import sha256_of
from flashdreams.runtime.video import to_pixels
from flashdreams.serving.interface import Chunk, Host, Listener, Opening
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.server import Server
from flashdreams.serving.web.server import WebServer
from flashdreams.serving.web.settings import WebSettings

COLUMNS = (
    "case",
    "variant",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "fps",
    "dropped",
    "processor_ms",
    "bar_ms",
)
FIELDS = ("fps", "dropped")
LOG = Path(__file__).parent / "logs" / "walk.jsonl"
LONG_STEP_MS = 100.0
"""From this step time on serving may cost 5 %, below it 2 ms."""
UNPACED_FPS = 1000.0
CLIENT_S = 120.0


def load(slug: str, folder: Path) -> Any:
    """A method, set up as ``flashdreams-serve`` does.

    Args:
        slug: of the method.
        folder: for what it writes.

    Raises:
        ValueError: it cannot be served.
    """
    from flashdreams.serving.server import check_served

    config: Any = discover().resolve(slug)
    check_served(config)
    return replace(config.for_serving(), output_dir=folder).setup()


@dataclass
class Tap:
    """The chunks of the session that was opened last, on their way to the web server."""

    chunks: list[Chunk] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    """CPU time of this process, over all threads, when each chunk arrived."""


@contextmanager
def tapped(host: Host, fps: float | None) -> Iterator[Tap]:
    """Record what a host delivers.

    Args:
        host: of the sessions.
        fps: frame rate that it offers; None: its own.
    """
    tap, open_session = Tap(), host.open

    def open_tapped(opening: Opening, listener: Listener) -> str:
        tap.chunks, tap.processor_s = [], []
        deliver = listener.on_chunk

        def on_chunk(chunk: Chunk) -> None:
            tap.chunks.append(chunk)
            tap.processor_s.append(time.process_time())
            deliver(chunk)

        listener.on_chunk = on_chunk  # type: ignore[method-assign]
        return open_session(opening, listener)

    offer = host.offer if fps is None else replace(host.offer, fps=fps)
    with mock.patch.multiple(host, open=open_tapped, offer=offer):
        yield tap


@contextmanager
def served(server: Server, fps: float | None = None) -> Iterator[tuple[WebServer, Tap]]:
    """The web server for a server whose loop runs concurrently.

    Args:
        server: the server whose loop runs.
        fps: playback frame rate; None: that of the method.
    """
    assert server.host is not None
    web = WebServer(WebSettings(port=0))
    web.start()
    try:
        with tapped(server.host, fps) as tap:
            web.serve(server.host)
            yield web, tap
    finally:
        web.stop()


def visit(web: WebServer, *words: str) -> subprocess.Popen[str]:
    """A client in a separate process."""
    program = [sys.executable, "-m", "flashdreams.serving.client_command", web.url, "--json"]
    return subprocess.Popen([*program, *words], stdout=subprocess.PIPE, text=True)


def figures_of(client: subprocess.Popen[str]) -> dict[str, Any]:
    """Measurements of a client.

    Raises:
        RuntimeError: the client failed.
    """
    text, _ = client.communicate(timeout=CLIENT_S)
    if client.returncode:
        raise RuntimeError(f"A client has ended with code {client.returncode}.")
    found: dict[str, Any] = json.loads(text)
    return found


def measure_sessions(server: Server, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Several concurrent sessions replay the control log at the method's frame rate."""
    rows = []
    for count in counts:
        with served(server) as (web, _):
            words = ("--seconds", str(seconds), "--log", str(LOG))
            found = [figures_of(client) for client in [visit(web, *words) for _ in range(count)]]
        case = f"{count} session{'s' * (count > 1)}"
        for variant, figure in (("key to photon", "key_to_photon_ms"), ("jitter", "jitter_ms")):
            rows.append(_row(case, variant, found, figure))
    return rows


def _row(case: str, variant: str, found: list[dict[str, Any]], field: str) -> dict[str, Any]:
    worst = {
        share: max(figures[field][share] for figures in found if figures[field])
        for share in ("p50", "p95", "p99", "max")
    }
    return {
        "case": case,
        "variant": variant,
        "repeats": sum(figures["events" if "key" in field else "pictures"] for figures in found),
        **{f"{share}_ms": value for share, value in worst.items()},
        "fps": statistics.fmean(figures["fps"] for figures in found),
        "dropped": sum(figures["dropped"] for figures in found),
        "output_sha256": found[0]["first_sha256"],
    }


def measure_cost(runner: Any, server: Server, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Time of an AR step, bare and served in turns; each side starts one rollout per round.

    Raises:
        RuntimeError: the two sides return different frames.
    """
    times: dict[str, list[float]] = {"bare loop": [], "served": []}
    processor_ms: dict[str, list[float]] = {"bare loop": [], "served": []}
    shas: dict[str, str] = {}
    sides: dict[str, Callable[[], tuple[list[float], list[float], torch.Tensor]]] = {
        "bare loop": lambda: bare_steps(runner, server, steps),
        "served": lambda: served_steps(server, steps),
    }
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found, processor, frames = sides[name]()
            times[name] += found[len(found) // 5 :]
            processor_ms[name] += processor[len(found) // 5 :]
            shas[name] = sha256_of(frames)
    if shas["bare loop"] != shas["served"]:
        raise RuntimeError("The bare loop and the server do not put out the same frames.")
    timing = {name: report.timing_fields(sorted(found)) for name, found in times.items()}
    bare = timing["bare loop"]["p50_ms"]
    cost = timing["served"]["p50_ms"] - bare
    bar = 0.05 * bare if bare >= LONG_STEP_MS else 2.0
    return [
        {
            "case": "AR step, unpaced",
            "variant": name,
            **fields,
            "fps": server.host.offer.chunk_frames * 1e3 / fields["p50_ms"],  # type: ignore[union-attr]
            "dropped": 0,
            "output_sha256": shas[name],
            "processor_ms": statistics.fmean(processor_ms[name]),
            "cost_ms": cost if name == "served" else 0.0,
            "bar_ms": bar,
            "within_bar": name != "served" or cost <= bar,
        }
        for name, fields in timing.items()
    ]


def bare_steps(
    runner: Any, server: Server, steps: int
) -> tuple[list[float], list[float], torch.Tensor]:
    """AR steps without a server: wall and CPU time in milliseconds, and the last frames."""
    session = Session(
        runner.pipeline,
        server.engine.conditions,
        seed=server.engine.default_seed,
        controller=runner.controller(),
        channel=MessageChannel(runner.environment.store),
    )
    at, processor = [time.monotonic()], [time.process_time()]
    frames = torch.empty(0, device="cpu", dtype=torch.uint8)
    for _ in range(steps):
        chunk = session.step().chunk
        assert chunk is not None
        frames = to_pixels(chunk).cpu()
        at.append(time.monotonic())
        processor.append(time.process_time())
    session.release()
    return _between(at), _between(processor), frames


def served_steps(server: Server, steps: int) -> tuple[list[float], list[float], torch.Tensor]:
    """The same between served chunks, with one reading client."""
    assert server.host is not None
    with served(server, UNPACED_FPS) as (web, tap):
        frames = steps * server.host.offer.chunk_frames
        figures_of(visit(web, "--num-frames", str(frames), "--seconds", str(CLIENT_S)))
        at = [chunk.finished_at for chunk in tap.chunks]
        return _between(at), _between(tap.processor_s), tap.chunks[-1].frames


def _between(seconds: list[float]) -> list[float]:
    return [1e3 * (after - before) for before, after in pairwise(seconds)]


def measure(slug: str, options: argparse.Namespace) -> tuple[torch.device, list[dict[str, Any]]]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        runner = load(slug, Path(folder))
        server = Server(runner, ServingLimits(snapshot_every=0.0))
        loop = threading.Thread(target=server.run, name="loop", daemon=True)
        loop.start()
        try:
            rows = measure_cost(runner, server, options.steps, options.repeats or 3)
            rows += measure_sessions(server, options.sessions, options.seconds)
        finally:
            server.drain()
            loop.join()
        return runner.device, rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("slug", nargs="?", default="toy-world")
    parser.add_argument("--sessions", type=command.count, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each session")
    parser.add_argument("--steps", type=command.count, default=120, help="AR steps of a round")
    options = command.parse(parser, arguments)
    device, rows = measure(options.slug, options)
    log = sum(1 for line in LOG.read_text("utf-8").splitlines() if line)
    config: Mapping[str, Any] = {
        "slug": options.slug,
        "sessions": options.sessions,
        "seconds": options.seconds,
        "steps": options.steps,
        "log": LOG.name,
        "log_events": log,
    }
    found = report.new_report("serving", device, config, rows, options.git_commit, FIELDS)
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
