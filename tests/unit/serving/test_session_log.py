"""Every served session writes a log that a run can be made from again."""

import json
from pathlib import Path

import pytest

from flashdreams.run import main
from flashdreams.serving.interface import Opening
from tests.live import Visit, served, toy_runner

PROMPT = "dawn sky, gold floor, blue north wall"


def replayed(log: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["--replay", str(log), "--output-dir", str(folder)])
    said = capsys.readouterr()
    return code, said.out + said.err


def only_log(folder: Path) -> Path:
    (log,) = (folder / "serve_toy-world" / "logs").glob("log_toy-world_*.jsonl")
    return log


def test_replay_reaches_the_hashes_of_a_session_with_its_own_prompt_and_seed(tmp_path, capsys):
    with served(toy_runner(tmp_path)) as server:
        visit = Visit(server.host, Opening(seed=5, prompt=PROMPT))
        visit.keys("w")
        visit.ask(2)
        visit.command("save", name="here")
        visit.keys("l")
        visit.ask(2)
        visit.command("rewind", name="here")
        visit.ask(1)
        visit.command("reset", seed=9)
        visit.ask(2)
        token = visit.id
        visit.close()
    log = only_log(tmp_path)
    steps = sum("step" in json.loads(line) for line in log.read_text().splitlines())
    assert token not in log.read_text() + log.name
    code, said = replayed(log, tmp_path / "again", capsys)
    assert code == 0, said
    assert f"{steps} of {steps} AR steps have the hashes of the log." in said and steps >= 7


def test_replay_of_a_log_with_another_key_is_found_out(tmp_path, capsys):
    """Negative control."""
    with served(toy_runner(tmp_path)) as server:
        visit = Visit(server.host, Opening(seed=5))
        visit.keys("w")
        visit.ask(3)
        visit.close()
    log = only_log(tmp_path)
    log.write_text(log.read_text().replace('{"keys": "w"}', '{"keys": "s"}'))
    code, said = replayed(log, tmp_path / "again", capsys)
    assert code != 0 and "the hashes had to be equal" in said, said


def test_log_goes_on_after_a_restart(tmp_path, capsys):
    runner = toy_runner(tmp_path)
    with served(runner) as server:
        visit = Visit(server.host, Opening(seed=5))
        visit.keys("w")
        visit.ask(3)
        session = visit.id
    with served(runner) as server:
        visit = Visit(server.host, session=session)
        visit.keys("l")
        visit.ask(3)
        visit.close()
    log = only_log(tmp_path)
    code, said = replayed(log, tmp_path / "again", capsys)
    assert code == 0 and "6 of 6 AR steps have the hashes of the log." in said, said


def test_number_of_logs_is_bounded_and_zero_writes_none(tmp_path):
    with served(toy_runner(tmp_path), max_logs=2) as server:
        for seed in range(4):
            visit = Visit(server.host, Opening(seed=seed))
            visit.ask(1)
            visit.close()
    logs = tmp_path / "serve_toy-world" / "logs"
    assert len(list(logs.iterdir())) == 2
    with served(toy_runner(tmp_path / "none"), max_logs=0) as server:
        visit = Visit(server.host)
        visit.ask(1)
        visit.close()
    assert not list((tmp_path / "none").rglob("log_*"))
