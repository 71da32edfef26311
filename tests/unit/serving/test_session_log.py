"""Every served session writes a log that a run can be made from again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashdreams.run import main
from flashdreams.serving.interface import Opening
from flashdreams.serving.restart import SessionFolder
from flashdreams.serving.session_log import SessionLogs
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
    assert '{"snapshot": 3}' in log.read_text()


@pytest.mark.parametrize(("logged", "goes_on"), [(3, True), (2, False)])
def test_log_with_a_gap_is_not_continued(tmp_path, logged, goes_on):
    logs = SessionLogs(SimpleNamespace(config=SimpleNamespace(runner_name="x")), tmp_path, 1)
    session = SimpleNamespace(name="s", turns=3)
    lines = [{"step": number} for number in range(logged)]
    logs.path("s").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs.resume(session)
    assert hasattr(session, "on_turn") == goes_on
    logs.close("s")
    logs.flush()


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


def test_logs_are_whole_before_another_server_takes_the_sessions(tmp_path, monkeypatch):
    done = []
    for kind, name in ((SessionLogs, "close"), (SessionLogs, "flush"), (SessionFolder, "give_up")):
        whole = getattr(kind, name)
        note = lambda *given, name=name, whole=whole: (done.append(name), whole(*given))  # noqa: E731
        monkeypatch.setattr(kind, name, note)
    with served(toy_runner(tmp_path)) as server:
        Visit(server.host).ask(1)
    assert done[-3:] == ["close", "flush", "give_up"]


def test_old_log_that_cannot_be_deleted_harms_no_session(tmp_path, monkeypatch, caplog):
    def fail(path, missing_ok=False):
        raise PermissionError("not yours")

    with served(toy_runner(tmp_path), max_logs=1) as server:
        first = Visit(server.host)
        first.ask(1)
        first.close()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail)
            assert len(Visit(server.host).ask(2)) == 2
        assert "An old log stays" in caplog.text
