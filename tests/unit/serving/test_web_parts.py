"""Clock, events, encoders, fragments, queues: each alone."""

import asyncio
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdreams.serving.fragments import avcc_of, boxes, find_box, fragment
from flashdreams.serving.interface import Chunk
from flashdreams.serving.pictures import PictureDecoder
from flashdreams.serving.protocol import Pong, VideoChunk
from flashdreams.serving.web.codec import Format, H264Encoder, new_encoder
from flashdreams.serving.web.events import EventLog
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.gate import Gate, for_clients
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.outlet import Outgoing, Outlet, TooSlow
from flashdreams.serving.web.playout import Playout
from flashdreams.serving.web.requests import Requests
from flashdreams.serving.web.settings import WebSettings
from flashdreams.serving.web.stepper import Ended, Stepper
from tests.unit.serving.fake_host import offer

pytest.importorskip("av", reason="pip install 'flashdreams[serve]'")


def test_pictures_are_due_on_the_grid_of_the_first_one() -> None:
    clock = Playout(10.0)
    assert clock.wait(5.0) == 0.0, "the first one at once"
    assert clock.show(5.0) == 0.0
    for count, late in ((1, 0.0), (2, 0.03), (3, 0.0)):
        assert clock.due() == pytest.approx(5.0 + 0.1 * count)
        assert clock.show(5.0 + 0.1 * count + late) == pytest.approx(late)
    assert clock.wait(5.35) == pytest.approx(0.05)


def test_a_picture_that_stalls_begins_a_new_count() -> None:
    clock = Playout(10.0)
    clock.show(5.0)
    assert clock.show(5.3) == 0.0
    assert clock.due() == pytest.approx(5.4)
    clock.restart()
    assert clock.wait(5.31) == 0.0


def test_a_prompt_is_over_at_once_and_a_velocity_when_it_is_replaced() -> None:
    log = EventLog()
    first = log.accept("a", {"camera": None, "prompt": 1})
    assert first is not None
    assert log.accept("a", {"camera": None}) is None, "seen before"
    nothing = log.apply([first["prompt"]])
    assert (nothing.applied, nothing.completed) == ((), ()), "the camera is still to come"
    chunk = log.apply([first["camera"]])
    assert (chunk.applied, chunk.active, chunk.completed) == (("a",), ("a",), ())
    second = log.accept("b", {"camera": 2})
    assert second is not None
    chunk = log.apply([second["camera"]])
    assert (chunk.applied, chunk.active, chunk.completed) == (("b",), ("b",), ("a",))
    chunk = log.apply([])
    assert (chunk.active, chunk.completed) == (("b",), ("b",))
    assert log.apply([]).active == ()


def test_identifiers_of_others_are_let_pass() -> None:
    log = EventLog()
    assert log.apply(["of a server before this one"]).applied == ()
    assert log.finish("of a server before this one") is None
    assert log.finish(None) is None


def test_events_are_forgotten_in_the_end() -> None:
    log = EventLog()
    for number in range(10_000):
        log.accept(f"e{number}", {"control": None})
    assert len(log._waiting) <= 4096 and len(log._seen) <= 4096


def moving(count: int, height: int, width: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    large = base.repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(np.roll(large, 2 * i, 1)) for i in range(count)]


@pytest.mark.parametrize(("height", "width", "fps"), [(64, 64, 16.0), (48, 80, 24000 / 1001)])
def test_every_picture_is_a_fragment_and_all_together_are_a_file(
    height: int, width: int, fps: float
) -> None:
    import av

    encoder, pictures = H264Encoder(width, height, fps, "libx264"), moving(12, height, width)
    encoded = [encoder.encode(pixels, key=i == 6) for i, pixels in enumerate(pictures)]
    assert [key for _, key in encoded] == [i in (0, 6) for i in range(12)]
    parts = [encoder.wrap(data, key=key) for data, key in encoded]
    kinds = [[kind for kind, _, _ in boxes(part)] for part in parts]
    assert kinds == [[b"ftyp", b"moov", b"moof", b"mdat"], *11 * [[b"moof", b"mdat"]]]
    assert encoder.codec == f"avc1.{avcc_of(parts[0])[1:4].hex()}"
    with av.open(io.BytesIO(b"".join(parts))) as file:
        frames = list(file.decode(video=0))
        times = [float(frame.pts * frame.time_base) for frame in frames]
    assert times == pytest.approx([i / fps for i in range(12)], abs=1e-4)
    decoder = PictureDecoder("m4s")
    for frame, part, pixels in zip(frames, parts, pictures, strict=True):
        seen = frame.to_ndarray(format="rgb24")
        assert np.array_equal(decoder.decode(part), seen), "picture by picture as in the file"
        error = np.abs(seen.astype(int) - pixels.astype(int)).mean()
        assert error < 12, "H.264 at crf 20 with halved colours, of 255"


def test_decoding_begins_at_a_key_picture_only() -> None:
    """Negative control of the key flags."""
    encoder, pictures = H264Encoder(64, 64, 16.0, "libx264"), moving(4, 64, 64)
    encoded = [encoder.encode(pixels, key=False) for pixels in pictures]
    parts = [encoder.wrap(data, key=key) for data, key in encoded]
    with pytest.raises(Exception, match=r"gave 0 pictures|Invalid data"):
        PictureDecoder("m4s").decode(encoder.init + parts[2])


def test_pictures_that_are_left_out_leave_no_gap_in_the_times() -> None:
    import av

    encoder, pictures = H264Encoder(64, 64, 16.0, "libx264"), moving(6, 64, 64)
    encoded = [encoder.encode(pixels, key=i == 4) for i, pixels in enumerate(pictures)]
    kept = [*encoded[:2], *encoded[4:]]
    data = b"".join(encoder.wrap(picture, key=key) for picture, key in kept)
    with av.open(io.BytesIO(data)) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    assert times == pytest.approx([i / 16 for i in range(4)])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
@pytest.mark.parametrize("format", ["m4s", "webrtc"])
def test_small_pictures_are_encoded_in_one_thread(format: Format) -> None:
    """PyAV would convert colours with a thread for each core, which the loop wants for itself."""
    import av

    before = threads()
    encoder = new_encoder(format, 64, 64, 16.0, "libx264")
    encoder.encode(moving(1, 64, 64)[0], key=True)
    assert threads() <= before
    frame = av.VideoFrame.from_ndarray(moving(1, 64, 64)[0], format="rgb24")
    frame.reformat(format="yuv420p")  # negative control: as PyAV does it by itself
    assert threads() > before or os.cpu_count() == 1


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_odd_sizes_and_unknown_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match="JPEG only"):
        new_encoder("m4s", 63, 64, 16.0)
    with pytest.raises(ValueError, match="h264_nvenc"):
        new_encoder("m4s", 64, 64, 16.0, "h264_nvenc")
    assert new_encoder("jpeg", 63, 65, 16.0).codec is None


def test_boxes_that_are_cut_are_noticed() -> None:
    data = fragment(b"sample", number=1, time=0, duration=1, key=True)
    assert find_box(data, b"mdat") == b"sample"
    for wrong in (data[:-1], data + b"x", b"\x00\x00\x00\x02moof"):
        with pytest.raises(ValueError, match="MP4"):
            list(boxes(wrong))


def test_no_place_on_this_machine_reaches_a_client() -> None:
    text = "cannot read /srv/models/a.pt, C:\\weights\\b.pt or ~/c/d: 3/4 done, see https://x.org/y"
    shown = for_clients(text)
    assert shown == "cannot read (a file), (a file) or (a file): 3/4 done, see https://x.org/y"
    assert len(for_clients("x" * 10_000)) == 600


class FakeSocket:
    def __init__(self) -> None:
        self.sent: list[str | bytes] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send_text(self, data: str) -> None:
        await self.open.wait()
        self.sent.append(data)

    async def send_picture(self, message: VideoChunk, picture: bytes) -> None:
        await self.send_text(message.model_dump_json())
        self.sent.append(picture)


def new_outlet(socket: FakeSocket, slow_s: float = 5.0) -> Outlet:
    outlet = Outlet(socket, "r", WebSettings(slow_s=slow_s), Metrics(Gate()))  # type: ignore[arg-type]
    outlet.encoder = new_encoder("jpeg", 8, 8, 10.0)
    return outlet


def chunk_message(frame: int) -> VideoChunk:
    return VideoChunk(
        request_id="r",
        transport_chunk_index=0,
        generation_chunk_index=0,
        num_frames=1,
        byte_length=0,
        first_frame=frame,
    )


def test_a_purge_leaves_out_pictures_and_no_message() -> None:
    async def run() -> list[str | bytes]:
        socket = FakeSocket()
        outlet = new_outlet(socket)
        socket.open.clear()
        sending = asyncio.create_task(outlet.run())
        outlet.post(Pong())
        await asyncio.sleep(0)
        outlet.post_picture(Outgoing(chunk_message(0), b"old", 0.0))
        outlet.post_picture(Outgoing(chunk_message(1), b"old", 0.0))
        assert outlet.behind(100), "two pictures wait"
        outlet.purge()
        outlet.post(Pong())
        outlet.post_picture(Outgoing(chunk_message(2), b"new", 0.0))
        outlet.finish()
        await asyncio.sleep(0)
        assert not outlet.behind(100)
        socket.open.set()
        await sending
        return socket.sent

    sent = asyncio.run(run())
    assert [item for item in sent if isinstance(item, bytes)] == [b"new"]
    assert sum("session.pong" in str(item) for item in sent) == 2


def test_a_socket_that_takes_nothing_is_too_slow() -> None:
    async def run() -> None:
        socket = FakeSocket()
        socket.open.clear()
        outlet = new_outlet(socket, slow_s=0.05)
        outlet.post(Pong())
        await outlet.run()

    with pytest.raises(TooSlow):
        asyncio.run(run())


def test_a_client_that_sends_receipts_gets_no_more_than_it_shows() -> None:
    async def run() -> None:
        socket = FakeSocket()
        outlet = new_outlet(socket)
        for frame in range(5):
            outlet.post_picture(Outgoing(chunk_message(frame), b"x", 0.0))
        outlet.finish()
        await outlet.run()
        assert not outlet.behind(4), "it sends no receipts"
        outlet.shown(0)
        assert outlet.unshown == 4 and outlet.behind(4)
        outlet.shown(3)
        assert not outlet.behind(4)

    asyncio.run(run())


def new_feed(**settings: object) -> Feed:
    gate = Gate()
    return Feed(offer(fps=10.0), WebSettings(**settings), Metrics(gate))  # type: ignore[arg-type]


def chunk(first: int, count: int, epoch: int = 0, applied: tuple[str, ...] = ()) -> Chunk:
    frames = torch.zeros(count, 8, 8, 3, dtype=torch.uint8, device="cpu")
    return Chunk(
        session="s", index=0, epoch=epoch, first_frame=first, frames=frames, applied=applied
    )


def test_a_feed_says_how_long_its_pictures_last() -> None:
    feed = new_feed()
    assert feed.unshown_seconds() == 0.0
    feed.on_chunk(chunk(0, 4))
    assert feed.unshown_seconds() == pytest.approx(0.4)
    feed.hurry()
    assert feed.unshown_seconds() == 0.0, "a reset waits for no picture"
    feed.on_chunk(chunk(4, 4, epoch=1))
    assert feed.unshown_seconds() == pytest.approx(0.4), "the older ones are left out"


def test_older_pictures_that_would_delay_an_answer_are_left_out() -> None:
    for waiting, left in ((1, 5), (3, 4)):  # 0.1 s and 0.3 s, of which 0.1 s may be waited
        feed = new_feed(stale_s=0.15)
        ids = feed.accept("e", {"control": None})
        assert ids is not None
        feed.on_chunk(chunk(0, waiting))
        feed.on_chunk(chunk(waiting, 4, applied=(ids["control"],)))
        assert feed.unshown_seconds() == pytest.approx(left * 0.1)
        feed = new_feed(stale_s=0.15)
        feed.on_chunk(chunk(0, waiting))
        feed.on_chunk(chunk(waiting, 4))
        assert feed.unshown_seconds() == pytest.approx((waiting + 4) * 0.1), "no event, none"


@pytest.mark.parametrize("answers", [True, False])
def test_a_picture_that_is_encoded_when_an_answer_outdates_it_is_left_out(answers: bool) -> None:
    async def run() -> bool:
        feed, outlet = new_feed(stale_s=0.15), new_outlet(FakeSocket())
        feed.connect(outlet)
        ids = feed.accept("e", {"control": None})
        assert ids is not None
        feed.on_chunk(chunk(0, 4))
        picture = feed.take(outlet)
        assert picture is not None
        outlet.take_key()  # as the encoder's thread does before it encodes
        feed.on_chunk(chunk(4, 4, applied=(ids["control"],) if answers else ()))
        assert outlet.take_key() == answers, "the next one refers to no picture that is left out"
        return feed.send(picture, b"x", True, outlet)

    assert asyncio.run(run()) == (not answers)


def test_a_feed_keeps_pictures_within_its_bounds() -> None:
    async def run(**settings: object) -> int:
        feed = new_feed(**settings)
        outlet = new_outlet(FakeSocket())
        feed.connect(outlet)
        feed.on_chunk(chunk(0, 300))
        for _ in range(300):
            feed._playout.restart()
            picture = feed.take(outlet)
            assert picture is not None
            assert feed.send(picture, b"", True, outlet)
        return len(feed._kept)

    assert asyncio.run(run(keep_s=5.0)) == 50
    assert asyncio.run(run(keep_bytes=10 * 8 * 8 * 3)) == 10


def test_news_of_events_go_with_the_next_picture_that_leaves() -> None:
    """Also where all pictures of their own chunk were left out."""

    async def run() -> list[str | bytes]:
        socket = FakeSocket()
        feed, outlet = new_feed(), new_outlet(socket)
        feed.connect(outlet)
        ids = feed.accept("e", {"control": None})
        assert ids is not None
        feed.on_chunk(chunk(0, 4, applied=(ids["control"],)))
        feed.on_chunk(chunk(4, 4, epoch=1))
        picture = feed.take(outlet)
        assert picture is not None and picture.frame == 4
        assert feed.send(picture, b"x", True, outlet)
        outlet.finish()
        await outlet.run()
        return socket.sent

    queued, applied, metadata, data = asyncio.run(run())
    assert "session.interaction.queued" in str(queued)
    assert '"event_ids":["e"]' in str(applied) and '"first_frame":4' in str(applied)
    assert '"started_event_ids":["e"]' in str(metadata) and data == b"x"


def test_a_picture_that_is_encoded_while_its_socket_goes_is_for_the_next_socket() -> None:
    async def run() -> None:
        feed, first, second = new_feed(), new_outlet(FakeSocket()), new_outlet(FakeSocket())
        feed.connect(first)
        feed.on_chunk(chunk(0, 2))
        picture = feed.take(first)
        assert picture is not None
        feed.disconnect(first)
        assert not feed.send(picture, b"x", True, first)
        feed.connect(second)
        assert feed.go_back(0) == 0, "it waits again"
        picture = feed.take(second)
        assert picture is not None and picture.frame == 0
        feed.on_chunk(chunk(2, 1, epoch=1))
        assert not feed.send(picture, b"x", True, second), "but not after a reset"
        assert feed.go_back(0) == 2

    asyncio.run(run())


def test_every_socket_is_told_the_place_in_the_queue() -> None:
    async def run() -> list[list[str | bytes]]:
        feed, sent = new_feed(), []
        for _ in range(2):
            socket = FakeSocket()
            outlet = new_outlet(socket)
            feed.connect(outlet)
            feed.on_state("waiting", 2)
            feed.on_state("waiting", 2)
            outlet.finish()
            await outlet.run()
            sent.append(socket.sent)
        return sent

    for texts in asyncio.run(run()):
        (queued,) = texts
        assert '"position":2' in str(queued)


def test_a_step_tells_of_the_last_commands_and_refusals_only() -> None:
    async def run() -> Stepper:
        stepper = Stepper(WebSettings(), Metrics(Gate()))
        for number in range(100):
            stepper.on_kept("save", f"s{number}", None)
            stepper.on_refused(None, f"r{number}")
        await asyncio.sleep(0)
        return stepper

    stepper = asyncio.run(run())
    assert len(stepper.kept) == len(stepper.refused) == 64
    assert stepper.kept[-1]["name"] == "s99"


def test_a_step_that_is_asked_for_again_wakes_the_loop_and_its_end_is_no_error() -> None:
    async def run() -> tuple[int, list[object]]:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        stepper, wakes = Stepper(WebSettings(), Metrics(Gate())), []
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await stepper.next_chunk(lambda: wakes.append(1), 0.01)
        stepper.on_state("running")
        stepper.on_state("paused")  # the loop was busy for longer than a session may be idle
        stepper.on_end(None, stopped=True)
        await asyncio.sleep(0)
        with pytest.raises(Ended):
            await stepper.next_chunk(lambda: None, 0.01)
        del stepper  # asyncio complains of an error that nobody has seen
        return len(wakes), errors

    assert asyncio.run(run()) == (3, [])


def test_requests_that_a_lost_socket_leaves_undone_may_be_sent_again() -> None:
    async def run() -> list[object]:
        feed = new_feed()
        requests = Requests(None, "s", feed)  # type: ignore[arg-type]
        for name in ("a", "b"):
            ids = feed.accept(name, {"prompt": 1})
            assert ids is not None
            requests._later(ids["prompt"], lambda event_id: None)
        work = asyncio.create_task(requests.work())
        await asyncio.sleep(0)  # the first one has begun
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return [feed.accept(name, {"prompt": 1}) for name in ("a", "b")]

    begun, withdrawn = asyncio.run(run())
    assert begun is None and withdrawn is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_sockets", 0), ("start_s", float("nan")), ("slow_s", 0.0), ("keep_bytes", -1),
     ("messages_per_s", float("inf")), ("idle_s", -1.0), ("waiting_pictures", 0)],
)  # fmt: skip
def test_limits_that_let_no_client_in_are_refused(name: str, value: float) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"--{flag} {value}: must be at (least|most)"):
        WebSettings(**{name: value})


@pytest.mark.parametrize("origin", ["example.org", "*", "https://example.org/page"])
def test_what_no_browser_sends_as_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match=r"is no origin; write one as https://example\.org"):
        WebSettings(allowed_origins=(origin,))
    assert WebSettings(allowed_origins=("https://example.org:8443",)).allowed_origins
