"""Work beside the caller's stream, with streams that are recorded."""

import gc
import weakref

import torch

from flashdreams.runtime.streams import SideStream
from tests.streams import RecordedCuda, recorded_side


class State:
    """Something that can be referred to weakly."""


def test_work_comes_after_the_mark_and_before_the_join():
    cuda = RecordedCuda()
    side = recorded_side(cuda)
    cuda.run("before")
    side.mark()
    cuda.run("beside")
    with side.work(State()):
        cuda.run("work")
    cuda.run("still beside")
    side.join()
    cuda.run("after")
    before, beside, work, still, after = range(5)
    assert cuda.on_main == [True, True, False, True, True]
    assert cuda.precedes(before, work) and cuda.precedes(work, after)
    for other in (beside, still):
        assert not cuda.precedes(other, work) and not cuda.precedes(work, other)


def test_work_without_a_mark_comes_after_all():
    cuda = RecordedCuda()
    side = recorded_side(cuda)
    cuda.run("before")
    with side.work(State()):
        cuda.run("work")
    assert cuda.precedes(0, 1)


def test_pieces_of_work_follow_one_another_and_one_join_is_for_all():
    cuda = RecordedCuda()
    side = recorded_side(cuda)
    for _ in range(2):
        side.mark()
        with side.work(State()):
            cuda.run("work")
    side.join()
    cuda.run("after")
    assert cuda.before[1] == {0} and cuda.before[2] == {0, 1}


def test_what_is_worked_on_is_kept_until_the_join():
    side = recorded_side(RecordedCuda())
    states = [State(), State()]
    seen = [weakref.ref(state) for state in states]
    while states:
        with side.work(states.pop()):
            pass
    gc.collect()
    assert all(ref() is not None for ref in seen)
    side.join()
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_work_that_fails_is_joined_too():
    cuda = RecordedCuda()
    side = recorded_side(cuda)
    try:
        with side.work(State()):
            cuda.run("work")
            raise RuntimeError
    except RuntimeError:
        side.join()
    cuda.run("after")
    assert cuda.on_main == [False, True] and cuda.precedes(0, 1)


def test_a_cpu_has_no_side():
    cuda = RecordedCuda()
    side = SideStream(torch.device("cpu"), cuda)
    state = State()
    side.mark()
    with side.work(state):
        cuda.run("work")
    seen = weakref.ref(state)
    del state
    gc.collect()
    assert cuda.on_main == [True] and seen() is None
    side.join()
