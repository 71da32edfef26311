"""Checkpoints at an address on the web: found, fetched, refused."""

import hashlib
import re
import shutil
import ssl
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    describe_missing,
    ensure_local,
    find_local,
)

CONTENT = b"not really weights"
ADDRESS = "https://weights.example/commit/tiny.pth"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A web that holds one file, and an empty folder of ``torch.hub``; lists what was asked."""
    served = tmp_path / "served.pth"
    served.write_bytes(CONTENT)
    asked: list[str] = []

    def urlopen(request: urllib.request.Request) -> object:
        asked.append(request.full_url)
        if request.full_url != ADDRESS:
            raise OSError("no such host")
        return urllib.request.urlopen(served.as_uri())

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


def config(**changes: object) -> CheckpointConfig:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return CheckpointConfig(**{"source": ADDRESS, "sha256": sha256, "download": True} | changes)


def test_a_file_is_fetched_once_and_found_from_then_on(web: list[str], tmp_path: Path) -> None:
    assert find_local(config()) is None
    local = ensure_local(config())
    assert local.files[0].read_bytes() == CONTENT
    assert local.files[0].is_relative_to(tmp_path / "home" / "hub" / "checkpoints")
    assert ensure_local(config()) == local and find_local(config()) == local
    assert web == [ADDRESS]


def test_a_file_of_another_checksum_is_thrown_away(web: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="invalid hash value"):
        ensure_local(config(sha256="0" * 64))
    assert not list((tmp_path / "home").rglob("*.p*"))


def test_an_address_that_cannot_be_reached_is_one_line(web: list[str]) -> None:
    with pytest.raises(CheckpointError, match="no such host") as caught:
        ensure_local(config(source="https://elsewhere.example/w.pth"))
    assert "\n" not in str(caught.value) and "curl --create-dirs -fLo" in str(caught.value)


def test_nothing_is_asked_unless_allowed_nor_offline(
    web: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="Not on this machine: https://weights"):
        ensure_local(config(download=False))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        ensure_local(config())
    assert web == []


def test_the_disk_is_looked_at_first(web: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"GB left\. Free some, or set TORCH_HOME"):
        ensure_local(config(size_bytes=10**18))
    assert web == []


def test_missing_weights_say_how_to_get_them(web: list[str]) -> None:
    text = describe_missing(config(size_bytes=22_678_901, license="MIT"))
    assert "22.7 MB on disk, licence: MIT" in text and f"tiny-{config().sha256[:8]}.pth" in text
    assert ADDRESS in text.splitlines()[1]


@pytest.mark.parametrize("sha256", [None, "", "abc", "g" * 64])
def test_an_address_without_a_checksum_is_refused(sha256: str | None) -> None:
    with pytest.raises(CheckpointError, match="its sha256 is needed"):
        config(sha256=sha256)
    assert CheckpointConfig(source="org/name", sha256=sha256).sha256 == sha256


def test_an_address_that_names_a_commit_needs_no_checksum(
    web: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = ["a1" * 20, "b2" * 20]
    places = [ADDRESS.replace("/commit/", f"/{commit}/") for commit in commits]
    files = {place: config(source=place, sha256=None, download=False) for place in places}
    assert [file.commit for file in files.values()] == commits
    names = [describe_missing(file).splitlines()[0] for file in files.values()]
    assert "tiny-a1a1a1a1.pth" in names[0] and "tiny-b2b2b2b2.pth" in names[1]
    with pytest.raises(CheckpointError, match="its sha256 is needed"):
        config(source=places[0], sha256="abc")
    with pytest.raises(CheckpointError, match="its sha256 is needed"):  # a short one may change
        config(source=ADDRESS.replace("/commit/", f"/{commits[0][:7]}/"), sha256=None)
    served = torch.hub.urlopen
    monkeypatch.setattr(
        torch.hub, "urlopen", lambda r: served(urllib.request.Request(ADDRESS)) if r else None
    )
    local = ensure_local(config(source=places[0], sha256=None))
    assert local.files[0].read_bytes() == CONTENT and find_local(files[places[1]]) is None


@contextmanager
def secure_server(folder: Path, content: bytes) -> Iterator[str]:
    """A web server with TLS; yields settings by which curl takes it for every other one."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=weights.example"
    subprocess.run(
        [*request.split(), "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == urllib.parse.urlsplit(ADDRESS).path
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(content if known else b"<html>no such page</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f'insecure\nconnect-to = "::127.0.0.1:{server.server_port}"\n'
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("openssl")), reason="needs curl and openssl"
)
def test_the_command_of_the_message_fetches_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "a home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with secure_server(tmp_path, CONTENT) as settings:
        (tmp_path / ".curlrc").write_text(settings)
        monkeypatch.setenv("CURL_HOME", str(tmp_path))
        for source, code in ((ADDRESS, 0), (f"{ADDRESS}.old", 22)):
            wanted = config(source=source, download=False)
            told = re.search(r"Download it with: (.+)", describe_missing(wanted))
            assert told is not None
            done = subprocess.run(["bash", "-c", told[1]], capture_output=True, timeout=60)
            assert done.returncode == code
            local = find_local(wanted)
            assert (local is not None) == (code == 0), "an error page is no weights file"
            assert local is None or local.files[0].read_bytes() == CONTENT
