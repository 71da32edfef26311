"""What a run leaves on disk while it is in progress and at its end, and what it keeps in memory."""

import json
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdreams.infra import recorder as module
from flashdreams.infra.recorder import MAX_COPIES, RunRecorder
from flashdreams.parallel.environment import Environment
from flashdreams.runtime import latents, stats
from flashdreams.runtime.latents import read_latent_parts
from flashdreams.runtime.profiler import MAX_RECORDS, StageTimer
from flashdreams.runtime.stats import sha256_of
from tests.full_disk import fill_disk, needs_full_device


@dataclass
class FakeConfig:
    output_dir: Path
    runner_name: str = "toy"
    seed: int = 0
    save_latents: bool = False
    hash_frames: bool = False


@dataclass
class Degrees:
    tp: int = 1


class FakeCache:
    """A rollout whose latent is the number of its step."""

    def __init__(self) -> None:
        self.timer = StageTimer("cpu")
        self.latent: Tensor | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.timer.records


class Run:
    """Fake steps in the place of a pipeline, watched by a recorder."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        mesh = SimpleNamespace(degrees=Degrees(), meter=SimpleNamespace(counts={}))
        pipeline = SimpleNamespace(
            guard=lambda *_: nullcontext(),
            stats=lambda: {},
            fingerprint=lambda: {},
            config=FakeConfig(folder),
        )
        environment = Environment(0, 0, 1, torch.device("cpu"))
        config: Any = FakeConfig(folder, **fields)
        self.recorder = RunRecorder(config, environment, mesh, pipeline)  # type: ignore[arg-type]
        self.folder = folder

    def steps(self, cache: FakeCache, first: int, count: int) -> None:
        for index in range(first, first + count):
            with cache.timer.step(index):
                cache.latent = torch.full((1, 2, 1, 2, 2), float(index))
            self.recorder.observe(cache, torch.full((1, 4, 3, 2, 2), float(index)))  # type: ignore[arg-type]
            with cache.timer.stage("finalize"):
                pass

    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "stats_toy.partial.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def records(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "stats_toy.json").read_text())["records"]

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def slow_hash(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hashing that continues only when the event is set."""
    gate = threading.Event()

    def wait(tensor: Tensor) -> str:
        gate.wait(10)
        return sha256_of(tensor)

    monkeypatch.setattr(module, "sha256_of", wait)
    return gate


def test_a_long_run_keeps_nothing_on_the_host(tmp_path: Path) -> None:
    run, cache = Run(tmp_path, save_latents=True, hash_frames=True), FakeCache()
    for index in range(3000):
        run.steps(cache, index, 1)
        assert len(run.recorder._copies) <= MAX_COPIES
        assert len(run.recorder._steps) <= MAX_COPIES + 1
        assert len(run.recorder._rollouts) == 1
    assert run.recorder.steps == 3000 and run.recorder.frames_per_second > 0
    assert len(cache.records) == MAX_RECORDS
    assert cache.records[-1]["autoregressive_index"] == 2999
    run.recorder.close()
    assert [r["autoregressive_index"] for r in run.records()] == list(range(3000))
    assert load_file(tmp_path / "latents_toy.safetensors")["latents"].shape[2] == 3000


def test_many_rollouts_are_forgotten_once_they_are_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(200):
        run.steps(FakeCache(), 0, 2)
        assert len(run.recorder._rollouts) <= MAX_COPIES + 1
    run.recorder.close()
    found = [(r["rollout"], r["autoregressive_index"]) for r in run.records()]
    assert found == [(rollout, index) for rollout in range(200) for index in range(2)]


def test_rollouts_may_take_turns(tmp_path: Path) -> None:
    run, caches = Run(tmp_path), [FakeCache(), FakeCache()]
    for index in range(3):
        for cache in caches:
            run.steps(cache, index, 1)
    run.recorder.close()
    for rollout in range(2):
        found = [r["autoregressive_index"] for r in run.records() if r["rollout"] == rollout]
        assert found == [0, 1, 2]


def test_records_are_on_disk_when_the_next_step_has_begun(tmp_path: Path) -> None:
    run, cache = Run(tmp_path, save_latents=True), FakeCache()
    run.steps(cache, 0, 3)
    cache.timer.note(psnr_db=20.0)
    run.recorder._thread.shutdown()  # its work is done after that
    run.recorder._write_records()
    header, *records = run.lines()
    assert header["runner_name"] == "toy" and header["first_frame_latency_ms"] > 0
    assert [r["autoregressive_index"] for r in records] == [0, 1]
    assert read_latent_parts(tmp_path / "latents_toy.partial.npy").shape == (1, 2, 3, 2, 2)
    run.recorder.close()
    assert run.records()[:2] == records and run.records()[2]["psnr_db"] == 20.0
    assert run.names() == {"stats_toy.json", "latents_toy.safetensors", "log_toy.jsonl"}


def test_a_step_that_was_broken_off_has_no_record(tmp_path: Path) -> None:
    run, cache = Run(tmp_path), FakeCache()
    run.steps(cache, 0, 2)
    with pytest.raises(KeyboardInterrupt), cache.timer.step(2):
        raise KeyboardInterrupt
    run.recorder.close()
    assert [r["autoregressive_index"] for r in run.records()] == [0, 1]


@pytest.mark.parametrize("hash_frames", [False, True])
def test_frames_are_hashed_on_request(hash_frames: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, hash_frames=hash_frames)
    run.steps(FakeCache(), 0, 2)
    run.recorder.close()
    for index, record in enumerate(run.records()):
        latent, frames = torch.full((8,), float(index)), torch.full((48,), float(index))
        assert record["latent_sha256"] == sha256_of(latent)
        assert record.get("frames_sha256") == (sha256_of(frames) if hash_frames else None)


def test_the_loop_waits_for_the_oldest_copy(tmp_path: Path, slow_hash: threading.Event) -> None:
    run, cache = Run(tmp_path), FakeCache()
    run.steps(cache, 0, MAX_COPIES)
    beyond = threading.Thread(target=run.steps, args=(cache, MAX_COPIES, 1))
    beyond.start()
    beyond.join(0.1)
    assert beyond.is_alive() and run.recorder.steps == MAX_COPIES
    slow_hash.set()
    beyond.join(10)
    assert run.recorder.steps == MAX_COPIES + 1
    run.recorder.close()
    assert len(run.records()) == MAX_COPIES + 1


def test_a_run_that_hangs_leaves_its_stats(tmp_path: Path) -> None:
    """What `end_now` does, beside a main thread that holds the lock for ever."""
    run = Run(tmp_path)
    run.steps(FakeCache(), 0, 5)
    for copy in list(run.recorder._copies):
        copy.result()
    run.recorder._write_records()
    with run.recorder._lock:
        ending = threading.Thread(target=run.recorder.abort)
        ending.start()
        ending.join(20)
    assert not ending.is_alive()
    assert len(run.records()) == 5, "also without the lock, what is complete is written"
    run.recorder.abort()
    assert len(run.records()) == 5 and run.names() == {"stats_toy.json", "log_toy.jsonl"}


def test_an_aborted_run_leaves_all_of_its_steps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(FakeCache(), 0, 5)
    run.recorder.abort()
    assert len(run.records()) == 5 and run.names() == {"stats_toy.json", "log_toy.jsonl"}


@needs_full_device
def test_an_aborted_run_says_that_its_stats_are_lost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as disk:
        fill_disk(disk, stats, "stats_toy.partial.jsonl")
        run = Run(tmp_path)
        run.steps(FakeCache(), 0, 3)
        run.recorder.abort()
    assert "stats_toy.json could not be written: No space left on device" in caplog.text
    run = Run(tmp_path / "later")
    run.steps(FakeCache(), 0, 3)
    monkeypatch.setattr(stats, "write_whole", lambda path: (path / "no folder").open("xb"))
    run.recorder.abort()
    run.recorder.abort()  # at exit
    assert capsys.readouterr().err.count("stats_toy.json could not be written: No such file") == 1


def test_a_run_without_a_step_leaves_the_stats_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "stats_toy.json").write_text("earlier")
    Run(tmp_path).recorder.abort()
    assert (tmp_path / "stats_toy.json").read_text() == "earlier"


def has_content(path: Path) -> bool:
    """Whether its writer, which may be another thread, has opened it and gone on."""
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("lost", ["stats_toy.partial.jsonl", "latents_toy.partial.npy"])
def test_a_file_that_vanishes_is_noticed_at_the_next_step(
    lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, cache = Run(tmp_path, save_latents=True), FakeCache()
    index = 0
    while not has_content(tmp_path / lost) and index < 1000:
        run.steps(cache, index, 1)
        index += 1
    (tmp_path / lost).unlink()
    run.steps(cache, index, 3)
    with pytest.raises(OSError, match="was removed, renamed or replaced during the run"):
        run.recorder.close()
    assert len(caplog.records) == 1


def test_links_under_partial_names_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_text("precious")
    for name in ("stats_toy.partial.jsonl", "latents_toy.partial.npy"):
        (tmp_path / name).symlink_to(victim)
    run = Run(tmp_path, save_latents=True)
    run.steps(FakeCache(), 0, 3)
    run.recorder.close()
    assert victim.read_text() == "precious" and len(run.records()) == 3


@needs_full_device
@pytest.mark.parametrize("name", ["stats_toy.partial.jsonl", "latents_toy.partial.npy"])
def test_a_full_disk_is_one_line_at_the_end(
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_disk(monkeypatch, stats if "stats" in name else latents, name)
    (tmp_path / "stats_toy.json").write_text("of an earlier run")
    run = Run(tmp_path, save_latents=True)
    run.steps(FakeCache(), 0, 20)
    with pytest.raises(OSError) as error:
        run.recorder.close()
    final = name.split(".")[0]
    assert str(tmp_path / final) in str(error.value)
    assert "could not be written: No space left on device. Free some space" in str(error.value)
    assert "\n" not in str(error.value) and len(caplog.records) == 1
    if final == "stats_toy":
        assert (tmp_path / "stats_toy.json").read_text() == "of an earlier run"
    else:
        assert len(run.records()) == 20, "the stats do not suffer from the latents"


def test_a_figure_that_json_cannot_hold_is_said_at_the_end(tmp_path: Path) -> None:
    run, cache = Run(tmp_path), FakeCache()
    run.steps(cache, 0, 2)
    cache.timer.note(psnr_db=float("nan"))
    run.steps(cache, 2, 2)
    with pytest.raises(ValueError, match=r"records\[1\]\.psnr_db is nan"):
        run.recorder.close()
    assert run.names() == {"stats_toy.partial.jsonl", "log_toy.jsonl"}
    assert [r["autoregressive_index"] for r in run.lines()[1:]] == [0]
