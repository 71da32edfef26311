"""A tiny stand-in for the Hugging Face Hub: one repository, served from a folder over HTTP."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fetch_as_told(message: str, endpoint: str, cache: Path) -> str:
    """Type the command of a message about missing weights, in an environment with another hub.

    Returns:
        The command.
    """
    told = re.search(r"Download it with: (.+)", message)
    assert told is not None, message
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        ["bash", "-c", told[1]],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, **own, "PATH": programs},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return told[1]


@contextmanager
def serve_repository(repo: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``folder`` as ``repo``; yields the endpoint and the list of requests seen so far."""
    seen: list[str] = []
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            seen.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            if path.startswith(f"/{repo}/resolve/"):
                name = path.removeprefix(f"/{repo}/resolve/").partition("/")[2]
                self.send(files[name].read_bytes() if name in files else None, body=body)
            elif path.startswith(f"/api/models/{repo}/tree/"):
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                    for n, p in files.items()
                ]
                self.send(json.dumps(tree).encode(), body=body)
            elif path.startswith(f"/api/models/{repo}"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings}
                self.send(json.dumps(info).encode(), body=body)
            else:
                self.send(None, body=body)

        def send(self, content: bytes | None, *, body: bool) -> None:
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
