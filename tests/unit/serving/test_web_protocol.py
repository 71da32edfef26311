"""The protocol, field by field, with a client that was written from its description."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from flashdreams.serving.protocol import VideoChunk, schema
from flashdreams.serving.web.accounts import Accounts
from flashdreams.serving.web.conversation import Conversation
from flashdreams.serving.web.gate import Gate
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.settings import WebSettings
from tests.unit.serving.fake_host import FakeHost
from tests.unit.serving.plain_client import PlainClient, shown_frames, web

pytest.importorskip("fastapi", reason="pip install 'flashdreams[serve]'")

CAMERA = {"mode": "target", "data": {"translation": [0, 0, 1], "rotation": [0, 0, 0, 1]}}


def test_a_session_runs_to_its_number_of_frames_and_its_frames_are_one_file() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        start = client.start(num_frames=30, a_field_of_later=1, extra_params={"x": 1}, seed=None)
        assert start["format"] == "m4s" and start["codec"].startswith("avc1.42")
        assert start["config"]["num_frames"] == 30 and start["config"]["model"] == "fake"
        assert start["config"]["seed"] == 7 and start["config"]["prompt"] == "a cave"
        done = client.until("session.done")
        assert (done["chunks"], done["stopped"]) == (30, False)
        assert done["request_id"] == start["request_id"]
        pictures = client.of_type("video.chunk_metadata")
        assert [p["transport_chunk_index"] for p in pictures] == list(range(30))
        assert [p["first_frame"] for p in pictures] == list(range(30))
        assert [p["generation_chunk_index"] for p in pictures] == [i // 4 for i in range(30)]
        assert {(p["kind"], p["num_frames"], p["epoch"]) for p in pictures} == {("media", 1, 0)}
        assert [p["key"] for p in pictures] == [True] + 29 * [False]
        assert shown_frames(client.media) == list(range(30))
        assert client.close_code() == 1000


def test_the_check_of_shown_frames_sees_a_missing_picture() -> None:
    """Negative control: without one of them the numbers are others."""
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start(num_frames=8)
        client.until("session.done")
        assert shown_frames(client.media[:3] + client.media[4:]) != list(range(8))


def test_jpeg_pictures_are_files_of_their_own() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        assert client.start(num_frames=3, format="jpeg")["codec"] is None
        client.until("session.done")
        assert [data[:3] for data in client.media] == 3 * [b"\xff\xd8\xff"]


def test_a_stop_is_answered_by_done() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        client.pictures(2)
        client.send("session.ping")
        client.send("session.stop")
        done = client.until("session.done")
        assert done["stopped"] and done["chunks"] == len(client.media)
        assert client.of_type("session.pong")
        assert client.close_code() == 1000


class SlowTransport:
    """Gets a stop while its first picture is being sent."""

    format = None

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}
        self.pictures = 0
        self.texts: list[dict[str, Any]] = []
        self._incoming = asyncio.Queue[str]()
        self._incoming.put_nowait('{"type": "session.start", "format": "jpeg"}')

    async def receive(self) -> str:
        return await self._incoming.get()

    async def send_text(self, data: str) -> None:
        self.texts.append(json.loads(data))

    async def send_picture(self, message: VideoChunk, picture: bytes) -> None:
        self._incoming.put_nowait('{"type": "session.stop"}')
        await asyncio.sleep(0.05)
        self.pictures += 1

    async def close(self, code: int) -> None: ...


def test_done_counts_the_picture_that_was_on_its_way() -> None:
    async def run(host: FakeHost) -> SlowTransport:
        transport, settings = SlowTransport(), WebSettings()
        gate = Gate(host)
        await Conversation(transport, Accounts(gate, settings, Metrics(gate))).run()
        return transport

    host = FakeHost()
    try:
        transport = asyncio.run(run(host))
    finally:
        host.stop()
    done = transport.texts[-1]
    assert (done["type"], done["chunks"]) == ("session.done", transport.pictures)
    assert transport.pictures == 1


@pytest.mark.parametrize(
    "field",
    [
        {"width": 65},
        {"height": 1},
        {"fps": 24},
        {"model": "another"},
        {"num_inference_steps": 50},
        {"guidance_scale": 7.5},
        {"format": "webm"},
    ],
)
def test_other_values_than_served_are_refused_with_the_allowed_ones(field: dict) -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.send("session.start", **field)
        error = client.until("error")
        (name,) = field
        assert error["code"] == "not_allowed" and name in error["message"]
        assert name in error["allowed"] and error["allowed"][name] != field[name]
        assert client.close_code() == 1008


def test_the_served_values_may_be_named() -> None:
    """Negative control of the refusals."""
    served = {"width": 64, "height": 48, "fps": 50, "model": "fake", "num_inference_steps": 4}
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start(**served, format="m4s", prompt="a wood", seed=3)
        assert ("open", "a wood", 3) in server_calls(server)


def server_calls(server) -> list:
    host = server.gate.host
    assert isinstance(host, FakeHost)
    return host.calls


def test_a_prompt_and_a_camera_come_together_and_are_told_of_in_both_phases() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        client.pictures(1)
        event = {"prompt": "a storm", "multi_modal_data": {"camera": CAMERA}}
        client.send(
            "session.interaction",
            interaction={"event_id": "e1", "event": event, "transition_chunks": 2},
        )
        queued = client.until("session.interaction.queued")
        assert queued["event_id"] == "e1"
        applied = client.until("session.interaction.applied")
        assert applied["event_ids"] == ["e1"]
        picture = client.until("video.chunk_metadata")
        assert picture["started_event_ids"] == ["e1"]
        assert picture["first_frame"] == applied["first_frame"]
        assert picture["generation_chunk_index"] == applied["generation_chunk_index"]
        of_chunks = [picture, *client.pictures(11)]
        index = [p["generation_chunk_index"] - picture["generation_chunk_index"] for p in of_chunks]
        active = {i for i, p in zip(index, of_chunks, strict=True) if "e1" in p["active_event_ids"]}
        over = [
            i for i, p in zip(index, of_chunks, strict=True) if "e1" in p["completed_event_ids"]
        ]
        assert (active, over) == ({0, 1}, [1]), "two chunks of transition"
        calls = server_calls(server)
        assert ("prompt", "a storm") in calls
        (control,) = (call[1]["camera"] for call in calls if call[0] == "control")
        assert control["mode"] == "target" and control["transition_chunks"] == 2


def test_a_control_holds_until_the_next_one() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        for name, keys in (("a", "w"), ("b", "")):
            client.send("session.control", event_id=name, values={"keys": keys})
            client.until("session.interaction.applied", event_ids=[name])
        first = client.until("video.chunk_metadata")
        assert first["started_event_ids"] == first["active_event_ids"] == ["b"]
        rest = [first, *client.pictures(8)]
        assert [p["completed_event_ids"] for p in rest if p["completed_event_ids"]] == [["a"]]


def test_a_second_event_of_the_same_name_is_not_carried_out() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        for _ in range(2):
            client.send("session.control", event_id="a", values={"keys": "w"})
            client.until("session.interaction.queued", event_id="a")
        client.pictures(8)
        assert sum(call[0] == "control" for call in server_calls(server)) == 1


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        ({"prompts_change": False}, {"event": {"prompt": "x"}}),
        ({}, {"event": {"prompt": "refuse"}}),
        ({}, {"event": {}}),
        ({"controls": {"properties": {}}}, {"event": {"multi_modal_data": {"camera": CAMERA}}}),
    ],
)
def test_an_event_that_fails_leaves_the_stream(offer: dict, message: dict) -> None:
    with web(FakeHost(**offer)) as server, PlainClient(server) as client:
        client.start()
        client.send("session.interaction", interaction={"event_id": "e9", **message})
        error = client.until("error")
        assert (error["code"], error["event_id"]) == ("interaction_failed", "e9")
        client.pictures(6)


def test_refused_controls_leave_the_stream_and_may_be_sent_again() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        client.send("session.control", event_id="e", values={"jump": 1})
        assert client.until("error")["code"] == "interaction_failed"
        client.send("session.control", event_id="e", values={"keys": "w"})
        client.until("session.interaction.applied", event_ids=["e"])


def test_save_rewind_and_reset_answer_when_carried_out_and_raise_the_epoch() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        start = client.start()
        assert start["commands"] == ["save", "fork", "rewind", "reset"] and start["saved"] == []
        client.send("session.save", name="here", event_id="s1")
        kept = client.until("session.kept")
        assert (kept["command"], kept["name"], kept["event_id"]) == ("save", "here", "s1")
        assert kept["saved"] == ["here"]
        client.send("session.rewind", name="here")
        assert client.until("session.kept", command="rewind")["event_id"] is None
        client.send("session.reset", seed=4, event_id="r1")
        client.until("session.kept", command="reset")
        after = client.until("video.chunk_metadata")
        assert (after["epoch"], after["generation_chunk_index"], after["key"]) == (2, 0, True)
        client.send("session.rewind", name="nowhere", event_id="x")
        assert client.until("error")["event_id"] == "x"


def test_nothing_older_is_shown_after_a_reset() -> None:
    with web(FakeHost(chunk_frames=16)) as server, PlainClient(server) as client:
        client.start()
        for _ in range(3):
            client.pictures(3)
            client.send("session.reset")
            client.until("session.kept")
        client.pictures(3)
        kept = [i for i, m in enumerate(client.messages) if m["type"] == "session.kept"]
        for epoch, place in enumerate(kept, start=1):
            later = [m for m in client.messages[place:] if m["type"] == "video.chunk_metadata"]
            assert {m["epoch"] >= epoch for m in later} == {True}
        frames = [m["first_frame"] for m in client.of_type("video.chunk_metadata")]
        assert frames == sorted(frames), "the counter continues over resets"
        greys = shown_frames(client.media)
        assert greys == [frame % 32 for frame in frames], "what was left out breaks no picture"


def test_a_pause_stops_the_pictures_and_ends() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        client.send("session.pause")
        client.until("session.status")
        made = server.gate.host.chunks
        client.until("session.status")
        assert server.gate.host.chunks == made
        client.send("session.pause", paused=False)
        client.pictures(8)


def test_a_third_client_waits_for_its_turn_and_a_fourth_is_sent_away() -> None:
    with (
        web(FakeHost(places=2, queue=1)) as server,
        PlainClient(server) as a,
        PlainClient(server) as b,
        PlainClient(server) as c,
    ):
        a.start()
        b.start()
        c.send("session.start")
        assert c.until("video.queued")["position"] == 1
        with PlainClient(server) as d:
            d.send("session.start")
            assert d.until("error")["code"] == "queue_full"
            assert d.close_code() == 1013
        c.send("session.ping")
        c.until("session.pong")
        a.send("session.stop")
        c.until("video.start")
        c.pictures(2)
        assert not c.of_type("session.done")


def test_status_tells_what_receipts_have_told() -> None:
    with web(FakeHost()) as server, PlainClient(server) as client:
        client.start()
        last = client.pictures(4)[-1]
        client.send("session.shown", frame=last["first_frame"], key_to_photon_ms=[40.0, 60.0, 80.0])
        client.until("session.status", key_to_photon_p50_ms=60.0)
        status = client.messages[-1]
        assert 60 < status["key_to_photon_p99_ms"] <= 80
        assert status["state"] == "running" and status["chunk_ms"] == {"network": 10.0}


def test_the_check_against_the_schema_notices_a_wrong_message() -> None:
    """Negative control."""
    validator = jsonschema.Draft202012Validator(schema()["server"])
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"type": "session.done", "chunks": "many"})


def test_all_messages_of_the_description_are_in_the_schema() -> None:
    text = json.dumps(schema())
    for name in (
        *("session.start", "session.interaction", "session.ping", "session.pong", "session.stop"),
        *("video.start", "video.chunk_metadata", "session.interaction.queued", "session.done"),
        *("session.control", "session.save", "session.fork", "session.rewind", "session.resume"),
        *("session.interaction.applied", "session.kept", "session.shown", "error"),
    ):
        assert f'"{name}"' in text
