"""Who is let in: tokens, origins, names; and what images are taken."""

import base64
import http.client
import io
import json
import urllib.request

import httpx
import pytest
import torch
from websockets.exceptions import InvalidStatus

from flashdreams.serving.interface import Refused
from flashdreams.serving.web.guard import TokenBucket, allows_host, allows_origin
from flashdreams.serving.web.images import image_of
from flashdreams.serving.web.settings import WebSettings
from tests.unit.serving.fake_host import FakeHost, offer
from tests.unit.serving.plain_client import PlainClient, web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")

TOKEN = "a token/with=odd&signs"


def test_a_server_that_others_can_reach_needs_a_token() -> None:
    with pytest.raises(ValueError, match="--token"):
        WebSettings(host="0.0.0.0")
    for host in ("127.0.0.1", "::1", "localhost"):
        WebSettings(host=host)
    WebSettings(host="0.0.0.0", token="secret")


def test_without_the_token_nothing_but_the_probes_is_answered() -> None:
    with web(FakeHost(), token=TOKEN) as server:
        for path in ("", "page/main.js", "v1/models", "v1/schema", "metrics", "openapi.json"):
            assert httpx.get(server.url + path).status_code == 401, path
            wrong = {"Authorization": "Bearer wrong"}
            assert httpx.get(server.url + path, headers=wrong).status_code == 401
        assert httpx.post(server.url + "v1/sessions", json={}).status_code == 401
        assert httpx.get(server.url + "healthz").status_code == 200
        assert httpx.get(server.url + "readyz").status_code == 200
        with PlainClient(server) as client:
            assert client.until("error")["code"] == "unauthorized"
            assert client.close_code() == 1008


def test_the_token_is_known_as_bearer_query_or_cookie() -> None:
    with web(FakeHost(), token=TOKEN) as server:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(server.url + "v1/models", headers=headers).status_code == 200
        with httpx.Client() as browser:
            page = browser.get(server.url, params={"token": TOKEN, "seed": 3})
            assert page.status_code == 303 and page.headers["location"] == "/?seed=3"
            cookie = page.headers["set-cookie"]
            assert "HttpOnly" in cookie and "SameSite=strict" in cookie
            assert browser.get(server.url + "v1/models").status_code == 200
            sent = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        query = str(httpx.QueryParams({"token": TOKEN}))
        for options in (
            {"additional_headers": headers},
            {"query": f"?{query}"},
            {"additional_headers": {"Cookie": sent}},
        ):
            with PlainClient(server, **options) as client:
                client.start(num_frames=1)


def test_pages_of_other_origins_may_not_connect() -> None:
    with web(FakeHost(), allowed_origins=("https://friend.example",)) as server:
        for origin in ("https://evil.example", "null", f"http://evil.example:{server.port}"):
            with pytest.raises(InvalidStatus, match="403"):
                PlainClient(server, origin=origin)
            answer = httpx.post(server.url + "v1/sessions", json={}, headers={"Origin": origin})
            assert answer.status_code == 403
        for origin in ("https://friend.example", server.url.rstrip("/")):
            with PlainClient(server, origin=origin) as client:
                client.start(num_frames=1)


def test_names_that_are_none_are_not_allowed() -> None:
    settings = WebSettings()
    for name, value in ((b"host", b"[::1"), (b"host", b"[evil]"), (b"host", b"")):
        assert not allows_host({"headers": [(name, value)]}, settings)
    assert allows_host({"headers": [(b"host", b"[::1]:8000")]}, settings)
    for origin in (b"http://[::1", b"http://[evil]"):
        scope = {"headers": [(b"host", b"::1"), (b"origin", origin)]}
        assert not allows_origin(scope, settings)


def test_a_loopback_server_answers_to_no_strange_name() -> None:
    """A stranger's name that is made to point to this machine."""
    with web(FakeHost(), allowed_hosts=("proxy.example",)) as server:
        for name, status in (("evil.example", 421), ("proxy.example", 200), ("localhost", 200)):
            headers = {"Host": f"{name}:{server.port}"}
            assert httpx.get(server.url + "v1/models", headers=headers).status_code == status
        answer = httpx.get(server.url + "v1/models", headers={"Host": "["})  # no address at all
        assert answer.status_code == 421
        with pytest.raises(InvalidStatus, match="403"):
            PlainClient(server, name="evil.example", origin=f"http://evil.example:{server.port}")
        with PlainClient(server, name="proxy.example") as client:
            client.start(num_frames=1)


def test_answers_say_that_browsers_are_to_trust_them_little() -> None:
    with web(FakeHost()) as server:
        headers = httpx.get(server.url + "v1/models").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "server" not in headers


def test_a_token_bucket_lets_pass_what_it_says() -> None:
    now = [0.0]
    bucket = TokenBucket(10.0, now=lambda: now[0])
    assert [bucket.take() for _ in range(20)] == 20 * [0.0], "two seconds' worth at once"
    assert bucket.take() == pytest.approx(0.1)
    now[0] = 0.2
    assert bucket.take() == 0.0
    assert bucket.take() == pytest.approx(0.1)


def image_url(width: int = 96, height: int = 96, colour: tuple = (255, 0, 0)) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_an_uploaded_image_is_scaled_to_the_server_and_reaches_the_loop() -> None:
    host = FakeHost()
    with web(host) as server, PlainClient(server) as client:
        client.start(image_reference={"image_url": image_url()})
        (opening,) = host.openings
        assert opening.image is not None
        assert opening.image.shape == (1, 3, 48, 64) and opening.image.dtype == torch.float32
        expected = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 48, 64)
        assert torch.equal(opening.image, expected)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "data:image/png;base64,####",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "https://example.org/picture.png",
        "http://127.0.0.1/picture.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "https://[",
    ],
)
def test_what_is_no_image_is_refused(url: str) -> None:
    host = FakeHost()
    with web(host) as server, PlainClient(server) as client:
        client.send("session.start", image_reference={"image_url": url})
        error = client.until("error")
        assert error["code"] == "not_allowed"
        assert "passwd" not in error["message"] and not host.openings


def test_images_with_too_many_pixels_or_bytes_are_not_decoded() -> None:
    with web(FakeHost(), max_upload_bytes=2**16) as server:
        for url in (image_url(5000, 5000), f"data:image/png;base64,{'A' * 2**17}"):
            with PlainClient(server) as client:
                client.send("session.start", image_reference={"image_url": url})
                assert client.until("error")["code"] == "not_allowed"


def test_an_image_whose_server_speaks_no_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise http.client.BadStatusLine("SSH-2.0")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    settings = WebSettings(image_hosts=("example.org",))
    with pytest.raises(Refused, match=r"cannot be downloaded from example\.org"):
        image_of("https://example.org/a.png", offer(), settings)


def test_a_model_without_a_first_image_takes_none() -> None:
    with web(FakeHost(takes_image=False)) as server, PlainClient(server) as client:
        client.send("session.start", image_reference={"image_url": image_url()})
        assert client.until("error")["code"] == "not_allowed"


def test_an_error_shows_no_more_than_a_piece_of_what_was_sent() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.socket.send(json.dumps({"type": "session.start", "seed": "x" * 10_000}))
        assert len(client.until("error")["message"]) < 400
