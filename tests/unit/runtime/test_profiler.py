"""Stage times, on the clock and with events that pass late."""

import time
from typing import Any

import pytest
import torch

from flashdreams.runtime import profiler
from flashdreams.runtime.profiler import StageTimer
from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, profiler)


def test_stages_land_in_the_record_of_their_step(clock: Clock) -> None:
    timer = StageTimer("cpu")
    for index in range(2):
        with timer.step(index):
            with timer.stage("encode"):
                clock.move(0.001)
            with timer.stage("diffuse"):
                clock.move(0.020)
            with timer.stage("decode"):
                clock.move(0.005)
            clock.move(0.002)
        clock.move(0.030)
        if index == 0:
            with timer.stage("finalize"):
                clock.move(0.010)
        timer.note(frames=12)
    first, second = timer.flush()
    assert [r["autoregressive_index"] for r in timer.records] == [0, 1]
    stages = {"encode_ms": 1.0, "diffuse_ms": 20.0, "decode_ms": 5.0}
    # The 30 ms between the step and finalize are the caller's.
    expected = [
        {"autoregressive_index": 0, **stages, "finalize_ms": 10.0, "total_ms": 38.0, "frames": 12},
        {"autoregressive_index": 1, **stages, "finalize_ms": 0.0, "total_ms": 28.0, "frames": 12},
    ]
    assert [first, second] == [pytest.approx(record, abs=1e-6) for record in expected]
    assert all(type(value) in (int, float) for value in first.values())


def test_a_stage_entered_twice_adds_up(clock: Clock) -> None:
    timer = StageTimer("cpu")
    with timer.step(0):
        for _ in range(2):
            with timer.stage("guide"):
                clock.move(0.005)
    assert timer.records[0]["guide_ms"] == pytest.approx(10.0, abs=1e-6)


def test_a_stage_that_raises_is_timed_and_ends_its_step() -> None:
    timer = StageTimer("cpu")
    with pytest.raises(RuntimeError, match="broken"), timer.step(0), timer.stage("diffuse"):
        raise RuntimeError("broken")
    with timer.step(1):
        pass
    assert timer.records[0]["diffuse_ms"] > 0


def test_steps_out_of_order_are_refused() -> None:
    timer = StageTimer("cpu")
    with pytest.raises(ValueError, match="'encode' is outside an AR step"):
        timer.stage("encode")
    with timer.step(4), pytest.raises(ValueError, match="AR step 5 begins while AR step 4"):
        timer.step(5)


def test_timing_a_step_reads_the_clock_at_its_ends_alone(clock: Clock) -> None:
    timer = StageTimer("cpu")
    with timer.step(0):
        for name in profiler.STAGES:
            with timer.stage(name):
                pass
    assert clock.reads == 2 * (1 + len(profiler.STAGES))


class FakeEvent:
    """A CUDA event whose time is that of a counter, and which passes when the test says so."""

    now_ms = 0.0
    passed_ms = -1.0
    made = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self, stream: Any) -> None:
        FakeEvent.now_ms += 1.0
        self.at_ms = FakeEvent.now_ms

    def query(self) -> bool:
        return self.at_ms <= FakeEvent.passed_ms

    def synchronize(self) -> None:
        FakeEvent.waits += 1
        FakeEvent.passed_ms = max(FakeEvent.passed_ms, self.at_ms)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.query()
        return end.at_ms - self.at_ms


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    FakeEvent.now_ms, FakeEvent.passed_ms, FakeEvent.made, FakeEvent.waits = 0.0, -1.0, 0, 0
    return FakeEvent


def run_steps(timer: StageTimer, first: int, count: int, events: type[FakeEvent] | None) -> None:
    for index in range(first, first + count):
        with timer.step(index), timer.stage("diffuse"):
            pass
        with timer.stage("finalize"):
            pass
        if events is not None:
            events.passed_ms = events.now_ms


def test_events_are_read_late_and_never_waited_for(fake_cuda: type[FakeEvent]) -> None:
    timer = StageTimer("cuda")
    run_steps(timer, 0, 3, None)
    assert all(record["total_ms"] == 0.0 for record in timer.records)
    fake_cuda.passed_ms = 10.0
    run_steps(timer, 3, 1, None)
    # Begin and end of step 0 were events 1 and 4, of its stages 2, 3 and 5, 6; step 1 began at 7.
    expected = {"autoregressive_index": 0, "diffuse_ms": 1.0, "finalize_ms": 1.0, "total_ms": 4.0}
    assert expected.items() <= timer.records[0].items()
    assert timer.records[1]["total_ms"] == 3.0
    assert timer.records[2]["total_ms"] == 0.0
    assert fake_cuda.waits == 0
    timer.flush()
    assert [record["total_ms"] for record in timer.records] == [4.0] * 4
    assert fake_cuda.waits > 0


def test_events_are_reused(fake_cuda: type[FakeEvent]) -> None:
    timer = StageTimer("cuda")
    run_steps(timer, 0, 2, fake_cuda)
    made = fake_cuda.made
    run_steps(timer, 2, 50, fake_cuda)
    assert fake_cuda.made == made
    timer.flush()
    assert [record["total_ms"] for record in timer.records] == [4.0] * 52


def test_a_record_is_complete_once_its_events_have_passed(fake_cuda: type[FakeEvent]) -> None:
    timer = StageTimer("cuda")
    run_steps(timer, 0, 2, None)
    assert not timer.has_all_times(timer.records[0])
    fake_cuda.passed_ms = 6.0
    assert [timer.has_all_times(record) for record in timer.records] == [True, False]
    assert timer.records[0]["total_ms"] == 4.0 and fake_cuda.waits == 0


def test_a_timer_keeps_the_last_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "MAX_RECORDS", 3)
    timer = StageTimer("cpu")
    run_steps(timer, 0, 5, None)
    assert [record["autoregressive_index"] for record in timer.flush()] == [2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_are_the_device_s() -> None:
    timer = StageTimer("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    for index in range(3):
        with timer.step(index), timer.stage("diffuse"):
            for _ in range(20):
                a @ a
    begin = time.perf_counter()
    timer.flush()
    waited_ms = (time.perf_counter() - begin) * 1e3
    assert all(record["diffuse_ms"] > 1 for record in timer.records)
    assert waited_ms > 1
