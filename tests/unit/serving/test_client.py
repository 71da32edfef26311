"""The client of the package, against a loop without a model and against the toy world."""

import asyncio
import io
import json
import time
from pathlib import Path

import pytest

from flashdreams.serving.client import LiveClient, SessionError
from flashdreams.serving.client_command import main
from flashdreams.serving.client_figures import ClientFigures, percentiles
from flashdreams.serving.pictures import PictureDecoder
from flashdreams.serving.replay import parse_line, read_log
from flashdreams.serving.web.server import WebServer
from flashdreams.serving.web.settings import WebSettings
from tests.live import served
from tests.unit.serving.fake_host import FakeHost, frame_of
from tests.unit.serving.plain_client import shown_frames, web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")

PATIENCE_S = 60.0


def run(story) -> None:
    asyncio.run(asyncio.wait_for(story, PATIENCE_S))


async def frames_of(client: LiveClient, count: int) -> list[int]:
    """The numbers of the next pictures; their pixels say the same."""
    found = []
    async for picture in client.pictures():
        assert picture.pixels is not None
        assert frame_of(float(picture.pixels.mean())) == picture.frame % 32
        found.append(picture.frame)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("format", ["m4s", "jpeg"])
def test_pictures_come_decoded_and_in_order(format: str) -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            await client.start(format=format, num_frames=20)
            assert await frames_of(client, 20) == list(range(20))
            assert [picture async for picture in client.pictures()] == []
            assert client.done is not None and not client.done["stopped"]
            report = client.figures.report()
            assert (report["pictures"], report["dropped"]) == (20, 0)

    with web(FakeHost()) as server:
        run(story(server.url))


def test_events_are_measured_and_told_to_the_server() -> None:
    async def story(server: WebServer) -> None:
        async with LiveClient(server.url) as client:
            await client.start()
            for _ in range(5):
                await client.control({"keys": "w"})
                await frames_of(client, 8)
            await client.prompt("a storm")
            await client.camera("velocity", (0.0, 0.0, 0.1))
            await frames_of(client, 40)
            assert client.figures.report()["events"] == 7
            assert client.status["key_to_photon_p50_ms"] is not None

    with web(FakeHost()) as server:
        run(story(server))


def test_a_lost_socket_is_taken_up_without_a_gap() -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            await client.start()
            before = await frames_of(client, 6)
            await client.drop()
            begin = await client.resume()
            assert begin["resumed"]
            rest = await frames_of(client, 12)
            assert rest[0] <= before[-1] + 5 and rest == list(range(rest[0], rest[0] + 12))
            assert client.figures.report()["dropped"] == 0

    with web(FakeHost()) as server:
        run(story(server.url))


def test_kept_states_are_gone_back_to_and_refusals_raise() -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            await client.start()
            assert (await client.keep("save", "here"))["saved"] == ["here"]
            await client.keep("rewind", "here")
            await client.keep("reset", seed=2)
            with pytest.raises(SessionError, match="interaction_failed"):
                await client.keep("rewind", "nowhere")
            await frames_of(client, 4)
            assert (await client.stop())["stopped"]

    with web(FakeHost()) as server:
        run(story(server.url))


def test_nobody_waits_for_a_session_that_is_over() -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            assert [picture async for picture in client.pictures()] == []
            with pytest.raises(ConnectionError, match="none has begun"):
                await client.stop()
            with pytest.raises(ConnectionError, match="start"):
                await client.resume()
            await client.start(num_frames=4)
            assert await frames_of(client, 4) == list(range(4))
            for _ in range(2):
                assert [picture async for picture in client.pictures()] == []
            assert await client.stop() == client.done
            with pytest.raises(ConnectionError, match="over"):
                await client.keep("save", "late")
            await client.start(num_frames=3)
            assert client.done is None, "of the session before"
            assert await frames_of(client, 3) == list(range(3))

    with web(FakeHost()) as server:
        run(story(server.url))


def test_whoever_waits_hears_that_the_client_has_left() -> None:
    async def story(host: FakeHost, url: str) -> None:
        async with LiveClient(url) as client:
            await client.start()
            await frames_of(client, 1)
            host.command = lambda *arguments, **values: None  # type: ignore[method-assign, assignment]
            kept = asyncio.create_task(client.keep("save", "here"))
            seen = asyncio.create_task(frames_of(client, 1000))
            await asyncio.sleep(0.05)
            await client.close()
            with pytest.raises(ConnectionError):
                await kept
            assert len(await seen) < 1000

    host = FakeHost()
    with web(host) as server:
        run(story(host, server.url))


def test_picture_that_cannot_be_decoded_is_the_error_of_whoever_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            with monkeypatch.context() as patch:
                patch.setattr(PictureDecoder, "decode", lambda *data: 1 / 0)
                await client.start()
                with pytest.raises(ZeroDivisionError):
                    await frames_of(client, 1)
            with pytest.raises(ZeroDivisionError):
                await client.keep("save", "here")

    with web(FakeHost()) as server:
        run(story(server.url))


def test_the_command_leaves_in_time_though_no_more_pictures_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "pause.jsonl"
    log.write_text('{"t": 0, "type": "session.pause"}\n')
    with web(FakeHost()) as server:
        began = time.monotonic()
        assert main([server.url, "--seconds", "0.3", "--log", str(log), "--json"]) == 0
        assert time.monotonic() - began < 20
    assert json.loads(capsys.readouterr().out)["pictures"] >= 1


def test_a_refused_start_raises() -> None:
    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            with pytest.raises(SessionError, match="not_allowed"):
                await client.start(width=7)

    with web(FakeHost()) as server:
        run(story(server.url))


def test_the_command_records_replays_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, film = tmp_path / "keys.jsonl", tmp_path / "out" / "film.mp4"
    log.write_text('{"t": 0.1, "keys": "w"}\n\n{"t": 0.05, "type": "session.pause"}\n')
    log.write_text(log.read_text().replace("pause", "ping"))
    with web(FakeHost(), token="secret") as server:
        words = [server.url, "--token", "secret", "--num-frames", "40", "--json"]
        assert main([*words, "--log", str(log), "--record", str(film)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["pictures"], report["events"]) == (40, 1)
        assert shown_frames([film.read_bytes()]) == [i % 32 for i in range(40)]
        assert main([server.url]) == 1, "without the token"
        assert "unauthorized" in capsys.readouterr().err
    assert main([server.url]) == 2, "nobody listens any more"
    assert "flashdreams-serve" in capsys.readouterr().err


def test_nothing_is_recorded_for_a_place_that_takes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "keys.jsonl"
    log.write_text('{"t": 1, "keys": "w"}\n')
    for words, message in (
        (["--record", "/dev/null"], "--record /dev/null cannot be written: it exists and is not"),
        (["--log", "/dev/zero"], "--log /dev/zero cannot be read: it is larger than"),
        (["\x1b[2J://"], "is not the address of a server"),
        (["http://127.0.0.1:abc"], "is not the address of a server, such as http://127.0.0.1:8000"),
    ):
        assert main([*words]) == 2, words
        said = capsys.readouterr().err
        assert message in said and "\x1b" not in said
    assert main(["--seconds", "nan"]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_a_wrong_line_of_a_log_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text('{"t": 1, "keys": "w"}\n{"keys": "w"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_log(file)
    with pytest.raises(ValueError, match="seconds"):
        parse_line('{"t": -1}', "here")
    assert parse_line('{"t": 1, "keys": "w"}', "here").message["values"] == {"keys": "w"}


def test_gaps_are_counted_within_an_epoch_only() -> None:
    figures = ClientFigures()
    figures.begin(10.0)
    for frame, epoch in ((0, 0), (1, 0), (4, 0), (9, 1), (10, 1)):
        figures.arrived(frame, epoch, frame / 10, frame / 10)
    report = figures.report()
    assert report["dropped"] == 2
    assert report["interval_ms"]["p50"] == pytest.approx(100)
    assert percentiles([]) is None
    assert percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}


def test_the_toy_world_is_walked_lost_and_taken_up_again(runner, folder: Path) -> None:
    """The whole way: loop, web side, client. The film of the first socket is a file."""
    import av

    async def story(url: str) -> None:
        async with LiveClient(url) as client:
            begin = await client.start(keep=True)
            assert "keys" in begin["controls"]["properties"]
            await client.control({"keys": "w"})
            seen = [picture.frame async for picture in limited(client, 12)]
            assert seen == list(range(12))
            with av.open(io.BytesIO(bytes(client.binary))) as film:
                assert sum(1 for _ in film.decode(video=0)) >= 12
            await client.drop()
            await client.resume()
            again = [picture.frame async for picture in limited(client, 12)]
            assert again == list(range(again[0], again[0] + 12))
            await client.keep("save", "here")
            await client.keep("rewind", "here")
            await client.control({"keys": ""})
            epochs = {picture.epoch async for picture in limited(client, 12)}
            assert max(epochs) == 1 and client.figures.report()["events"] == 2
            await client.stop()

    with served(runner, state_dir=folder) as server:
        web_side = WebServer(WebSettings(port=0))
        web_side.start()
        web_side.serve(server.host)
        try:
            run(story(web_side.url))
        finally:
            web_side.stop()


async def limited(client: LiveClient, count: int):
    """The next pictures, so many."""
    async for picture in client.pictures():
        yield picture
        count -= 1
        if count == 0:
            return
