"""Who has the next turn, and when."""

from types import SimpleNamespace

import pytest

from flashdreams.serving.turns import choose


def candidate(session, unshown_s, step_s=0.1, last_turn=0.0):
    return unshown_s, SimpleNamespace(id=session, step_s=step_s, last_turn=last_turn)


def test_the_session_that_runs_dry_first_is_next():
    session, _ = choose([candidate("late", 0.5), candidate("soon", 0.2)], 0.0)
    assert session.id == "soon"


def test_step_begins_no_earlier_than_needed():
    assert choose([candidate("a", 0.5)], 0.05)[1] == pytest.approx(0.5 - 0.1 - 0.05)
    assert choose([candidate("a", 0.12)], 0.05)[1] == 0
    assert choose([], 0.05) is None


def test_steps_before_others_leave_them_time():
    both = [candidate("a", 0.5, step_s=0.1), candidate("b", 0.52, step_s=0.3)]
    assert choose(both, 0.0)[1] == pytest.approx(0.52 - 0.3 - 0.1)
    apart = [candidate("a", 0.5, step_s=0.1), candidate("b", 2.0, step_s=0.3)]
    assert choose(apart, 0.0)[1] == pytest.approx(0.4)


def test_sessions_that_are_dry_take_turns():
    turns = {"a": 3.0, "b": 1.0, "c": 2.0}
    order = []
    for now in range(4, 10):
        session, wait_s = choose(
            [candidate(name, 0.0, last_turn=at) for name, at in turns.items()], 0.0
        )
        assert wait_s == 0
        turns[session.id] = float(now)
        order.append(session.id)
    assert order == ["b", "c", "a", "b", "c", "a"]
