"""The log of a run, and sessions that are saved, forked, rewound and replayed."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdreams.infra.controller import Controller
from flashdreams.infra.run_log import (
    LogError,
    Replay,
    ReplayError,
    RunLog,
    command_from_json,
    command_to_json,
    largest_difference,
    read_log,
    sample_of,
)
from flashdreams.infra.session import Command, Session
from flashdreams.parallel.plan import state
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_state import prompt

HEADER = {
    "config": "", "inputs": {"seed": 0}, "method": {"window": 3},
    "fingerprint": {"strict": False, "degrees": 1, "threads": 1},
}  # fmt: skip


@dataclass
class Level:
    value: float = state("host", default=0.0)


class Slider(Controller):
    """A number that holds until the next event."""

    def accepts(self):
        return {"type": "object"}

    def check(self, values):
        float(values["level"])

    def new_state(self):
        return Level()

    def advance(self, state, events, frames):
        for event in events:
            state.value = event.values["level"]
        return state.value


def level(value, **options):
    return Command(kind="control", values={"level": value}, **options)


def new_session(pipeline, **options):
    return Session(pipeline, {"text": prompt(0)}, seed=3, controller=Slider(), **options)


def run(session, steps, told=None):
    latents = []
    for number in range(session.turns, session.turns + steps):
        for command in (told or {}).get(number, []):
            session.submit(command)
        latents.append(session.step().cache.latent.clone())
    return latents


def test_commands_come_back_from_json():
    for command in (
        level(0.5, at_frame=7),
        Command(kind="prompt", tensors={"text": prompt(4)}),
        Command(kind="rewind", values={"name": "a"}),
    ):
        back = command_from_json(json.loads(json.dumps(command_to_json(command))))
        assert (back.kind, back.at_frame, back.values) == (
            command.kind,
            command.at_frame,
            command.values,
        )
        assert all(torch.equal(x, command.tensors[n]) for n, x in back.tensors.items())
        assert back.tensors.keys() == command.tensors.keys()


def test_samples_say_how_far_latents_are_apart():
    x = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(0))
    assert largest_difference(sample_of(x), sample_of(x)) == 0
    assert largest_difference(sample_of(x), sample_of(x + 0.25)) == pytest.approx(0.25, abs=1e-5)
    assert largest_difference(sample_of(x), sample_of(x[:, :, :1, :1])) is None


def written(path, steps=4):
    log = RunLog(path, lambda: HEADER)
    for number in range(steps):
        if number == 1:
            rows = [command_to_json(level(0.5))]
            log.append({"turn": 1, "autoregressive_index": 1, "commands": rows})
        latent = torch.full((8,), float(number))
        log.append({"step": number, "latent_sha256": f"{number}", "sample": sample_of(latent)})
    return log


def test_a_log_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    written(path).close()
    path.write_bytes(path.read_bytes()[:-20])
    log = read_log(path)
    assert list(log.steps) == [0, 1, 2] and [c.values for c in log.turns[1]] == [{"level": 0.5}]


def test_a_resumed_log_has_nothing_past_its_snapshot(tmp_path):
    path = tmp_path / "log.jsonl"
    written(path).close()
    path.write_bytes(path.read_bytes() + b'{"turn": 1, "comma')
    log = RunLog(path, lambda: {})
    log.resume(1)
    log.append({"step": 1, "latent_sha256": "new", "sample": sample_of(torch.zeros(8))})
    log.close()
    found = read_log(path)
    assert not found.turns and [s["latent_sha256"] for s in found.steps.values()] == ["0", "new"]


def test_a_resumed_log_has_the_commands_of_its_snapshot_and_no_later_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    log = written(path, steps=1)
    for name in ("before", "after"):
        rewind = command_to_json(Command(kind="rewind", values={"name": name}))
        between = {"autoregressive_index": 1, "commands": [rewind], "between_steps": True}
        log.append({"turn": 1} | between)
        if name == "before":
            log.append({"snapshot": 1})
    log.close()
    assert [c.values["name"] for c in read_log(path).turns[1]] == ["before", "after"]
    log = RunLog(path, dict)
    assert log.resume(1) == 1
    log.close()
    assert [c.values["name"] for c in read_log(path).turns[1]] == ["before"]


@pytest.mark.parametrize("text", [b"", b"{}\n", b"[1]\n", b'{"format": 9}\n', b"\xff\n"])
def test_what_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_bytes(text)
    with pytest.raises(LogError):
        read_log(path)
    with pytest.raises(LogError, match="cannot be read"):
        read_log(tmp_path / "absent")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1].pop("latent_sha256"),
        lambda rows: rows[1].update(step="0"),
        lambda rows: rows[2].update(turn=None),
        lambda rows: rows[0].update(method=[1]),
        lambda rows: rows[0].update(opening=[1]),
        lambda rows: rows.append(["step"]),
        lambda rows: rows.clear(),
        lambda rows: rows[0].pop("format"),
    ],
)
def test_a_log_whose_lines_make_no_sense_is_refused_before_anything_runs(tmp_path, change):
    path = tmp_path / "log.jsonl"
    written(path).close()
    assert len(read_log(path).steps) == 4
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LogError, match=r"is not a log of a run \(.*(line|cannot be)"):
        read_log(path)


def test_a_log_without_an_end_is_not_read():
    with pytest.raises(LogError, match="not a regular file"):
        read_log(Path("/dev/zero"))


def test_a_link_under_the_name_of_a_log_is_not_followed(tmp_path):
    other, path = tmp_path / "other", tmp_path / "log.jsonl"
    other.write_text("precious")
    path.symlink_to(other)
    written(path).close()
    assert other.read_text() == "precious" and len(read_log(path).steps) == 4


def replayed(changed=(), steps=3):
    latents = {n: torch.full((8,), float(n)) for n in range(steps)}
    rows = {
        n: {"step": n, "latent_sha256": str(n), "sample": sample_of(x)} for n, x in latents.items()
    }
    replay = Replay(HEADER, {}, rows)
    for n, x in latents.items():
        other = n in changed
        sample = sample_of(x + 0.5 * other)
        replay.compare({"step": n, "latent_sha256": f"{n}{'x' * other}", "sample": sample})
    return replay


def like(**changes):
    return {**HEADER, "fingerprint": {**HEADER["fingerprint"], **changes}}


def test_a_replay_says_what_it_reached():
    assert "3 of 3" in replayed().verdict(HEADER)
    with pytest.raises(
        ReplayError, match=r"2 of 3 .*differs is 1.*values is 0\.5.*had to be equal"
    ):
        replayed({1}).verdict(HEADER)
    said = replayed({1}).verdict(like(threads=2))
    assert "largest difference of sampled latent values is 0.5" in said
    assert "threads: 1 there, 2 here" in said
    assert "seed: 0 there, 4 here" in replayed({1}).verdict({**HEADER, "inputs": {"seed": 4}})


def test_strict_replays_must_match_on_any_number_of_ranks():
    replay = replayed({2})
    replay.header = like(strict=True)
    with pytest.raises(ReplayError):
        replay.verdict(like(strict=True, degrees=4))
    assert "degrees" in replayed({2}).verdict(like(degrees=4))


def test_a_session_is_rewound_to_a_fork_and_to_a_snapshot(tmp_path):
    pipeline = tiny_pipeline().setup(device="cpu")
    session = new_session(pipeline, folder=tmp_path)
    told = {
        1: [level(0.7)],
        2: [Command(kind=kind, values={"name": kind}) for kind in ("save", "fork")],
        4: [Command(kind="rewind", values={"name": "fork"})],
        6: [Command(kind="rewind", values={"name": "save"}), level(0.1)],
    }
    latents = run(session, 8, told)
    assert session.turns == 8 and session.cache.next_index == 4
    for first, again in ((2, 4), (3, 5)):
        assert torch.equal(latents[first], latents[again])
    assert not torch.equal(latents[2], latents[6])  # negative control: it was steered elsewhere


def test_names_of_what_is_kept_are_checked(tmp_path):
    session = new_session(tiny_pipeline().setup(device="cpu"))
    for values in ({}, {"name": "../x"}, {"name": 3}):
        with pytest.raises(ValueError, match="A fork needs values"):
            session.submit(Command(kind="fork", values=values))
    with pytest.raises(ValueError, match="no folder for snapshots"):
        session.submit(Command(kind="save", values={"name": "a"}))
    session.submit(Command(kind="rewind", values={"name": "nothing"}))
    with pytest.raises(ValueError, match="no kept state 'nothing'"):
        session.step()


def test_a_session_goes_on_where_nothing_can_be_kept(tmp_path, caplog):
    session = new_session(tiny_pipeline().setup(device="cpu"), folder=tmp_path)
    (tmp_path / "a").mkdir()
    session.submit(Command(kind="save", values={"name": "a"}))
    assert session.step().autoregressive_index == 0
    assert "already exists" in caplog.text and "The session continues." in caplog.text


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_replay_of_any_session_has_its_latents(tmp_path_factory, data):
    """Controls, prompts, forks and rewinds at random moments, through the lines of a log."""
    kinds = st.sampled_from(["control", "prompt", "fork", "rewind", "reset"])
    told = {0: [Command(kind="fork", values={"name": "a"})]}
    for number in range(1, 7):
        for kind in data.draw(st.lists(kinds, max_size=2)):
            values = {
                "control": {"level": data.draw(st.floats(0, 1, width=32))},
                "prompt": {}, "reset": {},
            }.get(kind, {"name": "a"})  # fmt: skip
            tensors = {"text": prompt(number)} if kind == "prompt" else {}
            told.setdefault(number, []).append(Command(kind=kind, values=values, tensors=tensors))
    pipeline = tiny_pipeline().setup(device="cpu")
    session = new_session(pipeline)
    log = RunLog(tmp_path_factory.mktemp("log") / "log.jsonl", lambda: HEADER)
    session.on_turn = lambda number, turn: log.append(
        {"turn": number, "commands": [command_to_json(c) for c in turn.commands]}
    )
    latents = run(session, 7, told)
    log.close()
    again = run(new_session(pipeline), 7, read_log(log.path).turns)
    assert all(torch.equal(a, b) for a, b in zip(latents, again, strict=True))
