"""Commands and AR steps that fail, and sessions that continue after them."""

import pytest
import torch

from flashdreams.infra.run_log import turn_row
from flashdreams.infra.session import Command, SessionEnded
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_run_log import level, new_session, run
from tests.unit.infra.test_state import advance, prompt


@pytest.fixture
def pipeline():
    return tiny_pipeline().setup(device="cpu")


def kept(kind, name="a", **options):
    return Command(kind=kind, values={"name": name}, **options)


def fail_once(monkeypatch, part, error):
    """Let the next call of a component fail after its work."""
    forward = part.forward

    def failing(*args, **kwargs):
        forward(*args, **kwargs)
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(part, "forward", failing)


def test_frames_after_a_rewind_are_those_of_the_rollout_that_goes_on(pipeline):
    session = new_session(pipeline)
    frames = [pipeline.pixel_frames(index) for index in range(6)]
    run(session, 5, {1: [kept("fork")]})
    for command in (kept("rewind"), level(0.5, at_frame=frames[3].start)):
        session.submit(command)
    assert [session.step().control for _ in range(4)] == [0.0, 0.0, 0.5, 0.5]


def test_a_command_that_fails_is_lost_alone(pipeline):
    session, told = new_session(pipeline), []
    session.on_turn = lambda number, turn: told.extend((number, c.kind) for c in turn.commands)
    session.step()
    text = torch.zeros(3, *prompt(0).shape[1:])
    for command in (level(0.7), Command(kind="prompt", tensors={"text": text}), kept("fork")):
        session.submit(command)
    with pytest.raises(ValueError, match="has 1 prompts, the update 3"):
        session.step()
    assert session.step().control == 0.7 and "a" in session.forks
    assert told == [(1, "control"), (1, "fork")] and session.turns == 2
    assert [command.kind for _, command in session.log] == ["control", "fork"]


@pytest.mark.parametrize("wrong", [{"at_frame": "3"}, {"at_frame": 1.5}, {"id": 3}])
def test_a_command_with_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be a"):
        Command(kind="reset", **wrong)


def test_a_command_is_what_it_was_when_it_was_submitted(pipeline):
    session, values = new_session(pipeline), {"level": 0.25}
    session.submit(Command(kind="control", values=values))
    values["level"] = "loud"
    assert session.step().control == 0.25


def test_an_input_that_the_encoder_refuses_does_not_steer_twice(pipeline, monkeypatch):
    session, other = new_session(pipeline), new_session(pipeline)
    expected = run(other, 3, {1: [level(0.5)]})
    session.step()
    session.submit(level(0.5))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.encoder, "forward", lambda *a, **k: int("x"))
        with pytest.raises(ValueError):
            session.step()
    assert session.cache.controller.value == 0.0 and session.turns == 1
    assert all(torch.equal(a, b) for a, b in zip(run(session, 2), expected[1:], strict=True))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_step_that_fails_midway_is_not_continued(pipeline, monkeypatch, part):
    """Made again, it would see a chunk or a control twice."""
    session, expected = new_session(pipeline), run(new_session(pipeline), 4, {})
    run(session, 2, {1: [kept("fork")]})
    fail_once(monkeypatch, getattr(pipeline, part), MemoryError("full"))
    with pytest.raises(MemoryError):
        session.step()
    for call in (session.step, lambda: session.cache.fork(1), session.cache.state_dict):
        with pytest.raises(ValueError, match="after 2 AR steps of this rollout has failed midway"):
            call()
    session.submit(kept("rewind"))
    assert all(torch.equal(a, b) for a, b in zip(run(session, 3), expected[1:], strict=True))


def test_a_clean_pass_that_fails_midway_is_not_continued(pipeline, monkeypatch):
    cache = pipeline.initialize_cache(text=prompt(0))
    advance(pipeline, cache, 0, 1)
    pipeline.generate(1, cache, 0.1)
    fail_once(monkeypatch, pipeline.diffusion_model.transformer, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pipeline.finalize(1, cache)
    with pytest.raises(ValueError, match="failed midway"):
        pipeline.finalize(1, cache)


def test_a_rewind_takes_the_newest_state_of_a_name(pipeline, tmp_path):
    """A log names a save a fork: a replay has no folder."""
    session, rows = new_session(pipeline, folder=tmp_path), []
    session.on_turn = lambda number, turn: rows.append(turn_row(number, 0, turn.commands))
    run(session, 5, {1: [kept("fork")], 3: [kept("save")], 4: [kept("save")]})
    session.submit(kept("rewind"))
    assert session.step().autoregressive_index == 3
    kinds = [[command["kind"] for command in row["commands"]] for row in rows]
    assert kinds == [[], ["fork"], [], ["fork"], [], ["rewind"], []]


def test_an_end_frees_the_forks(pipeline):
    session = new_session(pipeline)
    run(session, 1, {0: [kept("fork")]})
    fork = session.forks["a"]
    session.submit(Command(kind="end"))
    with pytest.raises(SessionEnded):
        session.step()
    assert fork.diffusion.released and not session.forks
