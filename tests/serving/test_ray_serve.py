"""Two servers placed by Ray Serve: a session comes back to its server, and continues at another."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashdreams.serving.client import LiveClient, SessionError
from flashdreams.serving.fleet.members import find_folder, read_members

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray.serve", reason="pip install 'flashdreams[ray]'")

ROOT = Path(__file__).parents[2]
START_S = 150.0
"""On two cores that other work shares; else it takes some 25 s."""
RESUME_S = 40.0
WORDS = ["toy-world", "--min-replicas", "2", "--max-replicas", "2", "--cpus", "0.1"]
SERVERS = ["--relay-cpus", "0.1", "--", "--snapshot-every", "0.5"]


def until(holds: Callable[[], object], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.2)


def number(url: str, name: str) -> float:
    """A figure of all servers."""
    with contextlib.suppress(httpx.HTTPError):
        for line in httpx.get(f"{url}/metrics", timeout=5).text.splitlines():
            if line.startswith(f"flashdreams_fleet_{name} "):
                return float(line.split()[1])
    return 0.0


@contextlib.contextmanager
def started(state: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "launch" / "ray_serve.py"), *WORDS]
    own = ["--state-dir", str(state), "--port", str(port)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *own, *SERVERS],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **quiet},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: number(url, "servers") == 2 or process.poll() is not None, START_S)
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def server_process(name: str) -> int:
    """The process of a server, by its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"flashdreams.serve" in words and name.encode() in words:
                return int(path.parent.name)
    raise AssertionError(f"no server {name}")


async def take(client: LiveClient, count: int) -> int:
    """Wait for pictures; returns the frame of the last one."""
    frame = -1
    async for picture in client.pictures():
        frame, count = picture.frame, count - 1
        if not count:
            break
    return frame


async def come_back(client: LiveClient) -> None:
    """Take the session up, as often as it needs while servers change."""
    limit = time.monotonic() + RESUME_S
    while True:
        try:
            await client.resume()
            return
        except (SessionError, ConnectionError, OSError) as error:
            code = getattr(error, "code", "")
            assert code in ("", "draining", "not_ready") and time.monotonic() < limit, error
        await asyncio.sleep(0.5)


async def live_through(url: str, state: Path) -> None:
    async with LiveClient(url) as client:
        await client.start(seed=3)
        token = client.begin["token"]
        first = next(m.name for m in read_members(state) if token.startswith(f"{m.name}-"))
        await client.control({"keys": "w"})
        await take(client, 12)
        until(lambda: list((state / first / token).glob("state-*")), 20)
        await client.drop()
        await come_back(client)
        assert client.begin["resumed"] and await take(client, 8) > 12
        assert find_folder(state, token) == first
        os.kill(server_process(first), signal.SIGKILL)
        killed = time.monotonic()
        with contextlib.suppress(SessionError, ConnectionError):
            await asyncio.wait_for(take(client, 10_000), 20)
        await come_back(client)
        last = client.begin["first_frame"]
        assert await take(client, 1) >= last >= 12
        print(f"continues {time.monotonic() - killed:.1f} s after its server was killed")
        assert await take(client, 12) > last
        second = find_folder(state, token)
        assert second not in (None, first)
        await client.stop()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_session_comes_back_to_its_server_and_goes_on_at_another(tmp_path):
    log, state = tmp_path / "log", tmp_path / "state"
    with started(state, log) as url:
        try:
            asyncio.run(live_through(url, state))
        except BaseException:
            print(log.read_text()[-8000:])
            raise
