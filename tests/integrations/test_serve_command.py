"""``flashdreams-serve`` as a process of its own: start, sessions, SIGTERM, restart, ranks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashdreams import serve
from tests.live import PATIENCE_S

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "flashdreams.serve"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "1", "-m", "flashdreams.serve"]  # fmt: skip


class Served:
    """A server process and the address that it printed."""

    def __init__(self, folder: Path, program: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        words = ["toy-world", "--port", "0", "--output-dir", str(folder), "--max-sessions", "2"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*program, *words, "--snapshot-every", "0.2"],
                stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        self.url = self.ready(1 + self.text.count("READY"))

    @property
    def text(self) -> str:
        return self.log.read_text()

    def ready(self, times: int) -> str:
        """Wait for a READY line; returns its address."""
        limit = time.monotonic() + 2 * PATIENCE_S
        while len(found := re.findall(r"READY (\S+) ", self.text)) < times:
            assert time.monotonic() < limit and self.process.poll() is None, self.text
            time.sleep(0.1)
        return found[-1]

    def step(self, session: str, **body: object):
        answer = httpx.post(
            f"{self.url}v1/sessions/{session}/step",
            json=body,
            timeout=PATIENCE_S,
        )
        answer.raise_for_status()
        return answer

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def started(folder: Path, program: list[str] = RUN) -> Iterator[Served]:
    server = Served(folder, program)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def open_session(server: Served) -> str:
    answer = httpx.post(f"{server.url}v1/sessions", json={"seed": 1}, timeout=PATIENCE_S)
    answer.raise_for_status()
    return answer.json()["id"]


def frames(server: Served, session: str, steps: int) -> list[bytes]:
    return [server.step(session, control={"keys": "w"}, format="npy").content for _ in range(steps)]


@pytest.mark.slow
def test_server_is_asked_to_end_and_its_successor_goes_on(tmp_path):
    with started(tmp_path / "whole") as server:
        whole = frames(server, open_session(server), 6)
    with started(tmp_path / "parts") as server:
        session = open_session(server)
        assert frames(server, session, 3) == whole[:3]
        assert server.end() == 0 and "saved" not in server.text, server.text
    with started(tmp_path / "parts") as server:
        assert "2 places, 1 saved session to resume\n" in server.text
        assert frames(server, session, 3) == whole[3:]
        assert "Traceback" not in server.text


@pytest.mark.slow
def test_ranks_serve_rest_and_come_back_when_one_is_killed(tmp_path):
    with started(tmp_path, TORCHRUN) as server:
        session = open_session(server)
        frames(server, session, 3)
        time.sleep(3)  # they rest, and a snapshot is written
        frames(server, session, 2)
        time.sleep(1)
        os.kill(rank_of(server, 1), signal.SIGKILL)
        server.url = server.ready(2)
        assert len(frames(server, session, 2)) == 2
        assert "killed by signal 9" in server.text


def rank_of(server: Served, rank: int) -> int:
    """The process of a rank that torchrun has started."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for child in children.split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"RANK=%d" % rank in variables:
            return int(child)
    raise AssertionError(f"rank {rank} is not there: {server.text}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toy-wolrd"], "Did you mean 'toy-world'"),
        (["toy-world", "--max-sesions", "2"], "Unrecognized options: --max-sesions"),
        (["toy-world", "--max-sessions", "0"], "--max-sessions 0"),
        (["toy-world", "--host", "0.0.0.0"], "token"),
        (["toy-world", "--replay", "log"], "flashdreams-run --replay"),
        (
            ["matrix-game-2-tiny-random", "--actions", "None", "--action-path", "a.npz"],
            "steered by its client",
        ),
        ([], "--help for the list, e.g. flashdreams-serve toy-world."),
    ],
)
def test_wrong_command_line_ends_with_one_line(words, said, capsys):
    assert serve.main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out and "Traceback" not in captured.err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else object())
    assert serve.main(["toy-world"]) == 2
    assert "pip install 'flashdreams[serve]'" in capsys.readouterr().err


def test_help_lists_the_flags_of_the_server(capsys):
    assert serve.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--port", "--max-sessions", "--state-dir", "--token"))


def test_second_interrupt_while_the_web_server_stops_is_no_traceback(monkeypatch, capsys):
    class Stubborn:
        url = "http://127.0.0.1:1/"

        def __init__(self, settings): ...

        def start(self): ...

        def stop(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("flashdreams.serving.web.server.WebServer", Stubborn)
    monkeypatch.setattr(serve, "_load_and_run", lambda *given: serve.DONE)
    options, config = serve.read_command_line(["toy-world"])
    assert serve._serve(options, config, debug=False) == 130
    assert capsys.readouterr().err.endswith("flashdreams-serve: interrupted\n")
