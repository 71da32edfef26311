"""The cursor of a window against a list that is written slot by slot."""

import warnings

import pytest
import torch

from flashdreams.attention import cache as cache_module
from flashdreams.attention.cursor import Cursor

CPU = torch.device("cpu")
TOKENS = 3
COMBINATIONS = [
    (0, 1, 1), (0, 5, 2), (0, 6, 3), (1, 3, 1), (1, 5, 2), (2, 3, 3), (3, 4, 2), (4, 3, 3),
    (5, 2, 1),
]  # fmt: skip
"""Sink, window, chunk: the chunk divides them, and it does not."""
STEPS = 15

combinations = pytest.mark.parametrize(("sink", "window", "chunk"), COMBINATIONS)


class Slots:
    """Which frame is where, by the rule: a free slot, or that of the oldest frame not in the sink.

    ``mistake`` makes it forget the sink or evict the newest, as negative controls.
    """

    def __init__(self, sink: int, window: int, mistake: str = "") -> None:
        self.sink = 0 if mistake == "no sink" else sink
        self.size = sink + window
        self.choose = max if mistake == "newest" else min
        self.frames: list[int] = []

    def add(self, first: int, count: int) -> list[int]:
        """Take on frames; the slots that they are in."""
        for frame in range(first, first + count):
            if len(self.frames) < self.size:
                self.frames.append(frame)
            else:
                evicted = self.choose(self.frames[self.sink :])
                self.frames[self.frames.index(evicted)] = frame
        return [self.frames.index(frame) for frame in range(first, first + count)]


def tokens_of(slots: list[int]) -> list[int]:
    return [TOKENS * slot + token for slot in slots for token in range(TOKENS)]


def stepped(sink: int, window: int, chunk: int, steps: int) -> Cursor:
    cursor = Cursor(sink, window, TOKENS)
    for _ in range(steps):
        cursor.begin_step(chunk, CPU)
        cursor.advance()
    return cursor


def position(cursor: Cursor) -> dict[str, object]:
    """All that a cursor says of itself, except for the slots of a chunk."""
    return {
        "frames": cursor.frames,
        "start": cursor.start,
        "end": cursor.end,
        "evicted": cursor.evicted,
        "past": cursor.past_frames(),
        "full": cursor.is_full,
        "visible": cursor.visible_tokens,
    }


def compare(sink: int, window: int, chunk: int, plain: Slots) -> None:
    cursor = Cursor(sink, window, TOKENS)
    for step in range(STEPS):
        start, end = step * chunk, (step + 1) * chunk
        cursor.begin_step(chunk, CPU)
        slots = plain.add(start, chunk)
        assert cursor.frames == plain.frames
        assert cursor.slots.tolist() == tokens_of(slots)
        assert cursor.visible_tokens == TOKENS * len(plain.frames)
        assert cursor.is_full == (len(plain.frames) == sink + window)
        assert cursor.evicted == end - len(plain.frames)
        assert cursor.past_frames() == sorted(f for f in plain.frames if f < start)
        assert (cursor.start, cursor.end) == (start, end)
        cursor.advance()
        assert cursor.frames == plain.frames
        assert cursor.past_frames() == sorted(plain.frames)
    assert cursor.evicted > 0


@combinations
def test_frames_are_where_a_plain_list_has_them(sink, window, chunk):
    compare(sink, window, chunk, Slots(sink, window))


@pytest.mark.parametrize("mistake", ["no sink", "newest"])
def test_another_rule_of_eviction_is_seen(mistake):
    """Negative control."""
    with pytest.raises(AssertionError):
        compare(2, 3, 1, Slots(2, 3, mistake))


@combinations
def test_a_step_that_is_begun_again_overwrites_itself(sink, window, chunk):
    for steps in range(STEPS):
        once, twice = (stepped(sink, window, chunk, steps) for _ in range(2))
        once.begin_step(chunk, CPU)
        for _ in range(2):
            twice.begin_step(chunk, CPU)
        assert position(once) == position(twice) and torch.equal(once.slots, twice.slots)
        twice.advance()
        twice.begin_step(chunk, CPU)  # negative control: the step that comes next
        assert position(once) != position(twice)


@combinations
def test_a_reset_stands_where_steps_lead(sink, window, chunk):
    used = stepped(sink, window, chunk, 3)
    used.begin_step(chunk, CPU)
    for steps in range(STEPS):
        expected = stepped(sink, window, chunk, steps)
        used.reset(steps * chunk)
        assert position(used) == position(expected)
        for cursor in (used, expected):
            cursor.begin_step(chunk, CPU)
        assert position(used) == position(expected) and torch.equal(used.slots, expected.slots)
        used.reset(steps * chunk + 1)  # negative control: one frame further
        assert position(used) != position(stepped(sink, window, chunk, steps))
    used.reset()
    assert position(used) == position(Cursor(sink, window, TOKENS))


@combinations
def test_frames_that_are_computed_anew_take_the_slots_from_the_first_on(sink, window, chunk):
    cursor = stepped(sink, window, chunk, STEPS)
    cursor.begin_step(chunk, CPU)
    before, slots = position(cursor), cursor.slots.tolist()
    assert cursor.is_full
    done = 0
    while done < cursor.capacity_t:
        count = min(chunk, cursor.capacity_t - done)
        cursor.begin_rewrite_chunk(count, CPU)
        assert cursor.slots.tolist() == tokens_of(list(range(done, done + count)))
        done += count
        assert cursor.visible_tokens == TOKENS * done and not cursor.is_full
        assert (cursor.frames, cursor.past_frames()) == (before["frames"], before["past"])
    assert position(cursor) != before  # negative control: nothing has returned yet
    cursor.end_rewrite()
    assert position(cursor) == before and cursor.slots.tolist() == slots


@combinations
def test_between_steps_there_is_no_chunk_to_return_to(sink, window, chunk):
    cursor, expected = (stepped(sink, window, chunk, STEPS) for _ in range(2))
    cursor.begin_rewrite_chunk(cursor.capacity_t, CPU)
    cursor.end_rewrite()
    assert position(cursor) == position(expected)
    for each in (cursor, expected):
        each.begin_step(chunk, CPU)
    assert torch.equal(cursor.slots, expected.slots)


def test_slots_keep_their_storage():
    cursor = Cursor(2, 5, TOKENS)
    cursor.begin_step(3, CPU)
    slots, places = cursor.slots, set()
    for _ in range(6):
        cursor.begin_step(3, CPU)
        places.add(cursor.slots.data_ptr())
        cursor.begin_rewrite_chunk(3, CPU)
        cursor.begin_rewrite_chunk(4, CPU)
        places.discard(cursor.slots.data_ptr())  # negative control: of another length, so elsewhere
        cursor.end_rewrite()
        places.add(cursor.slots.data_ptr())
        cursor.advance()
    cursor.reset()
    cursor.begin_step(3, CPU)
    assert places == {cursor.slots.data_ptr()} == {slots.data_ptr()}
    other = cursor.clone()
    other.begin_step(3, CPU)
    assert other.slots.data_ptr() != slots.data_ptr()


def test_a_clone_goes_on_apart_from_its_source():
    cursor = stepped(2, 5, 3, 4)
    other, before = cursor.clone(), position(cursor)
    assert position(other) == before
    other.begin_step(3, CPU)
    assert position(cursor) == before != position(other)


def test_a_chunk_longer_than_the_window_is_refused_and_changes_nothing():
    cursor = stepped(2, 3, 3, 4)
    before = position(cursor)
    with pytest.raises(ValueError, match="chunk of 4 latent frames does not fit window_size_t=3"):
        cursor.begin_step(4, CPU)
    assert position(cursor) == before


def test_the_old_name_and_its_calls_warn_and_work():
    with pytest.warns(
        DeprecationWarning, match=r"cursor\.Cursor now; the old name will be removed"
    ):
        cursor = cache_module.CacheCursor(2, 5, TOKENS)
    expected = stepped(2, 5, 3, 4)
    for _ in range(4):
        with pytest.warns(DeprecationWarning, match=r"CacheCursor\.place is Cursor\.begin_step"):
            cursor.place(3, CPU)
        cursor.advance()
    assert position(cursor) == position(expected)
    for each in (cursor, expected):
        each.begin_step(3, CPU)
    with pytest.warns(DeprecationWarning, match=r"rewriting is Cursor\.end_rewrite"):  # noqa: SIM117
        with cursor.rewriting():
            for first in (0, 3):
                with pytest.warns(DeprecationWarning, match=r"place_next is Cursor\.begin_rewrite"):
                    cursor.place_next(3, CPU)
                assert cursor.slots.tolist() == tokens_of([first, first + 1, first + 2])
    assert position(cursor) == position(expected) and torch.equal(cursor.slots, expected.slots)
    again = type(cursor)(2, 5, TOKENS)
    again.load_state_dict(cursor.state_dict())
    assert position(again) == position(stepped(2, 5, 3, 4))


def test_the_new_calls_do_not_warn():
    """Negative control."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cursor = stepped(2, 5, 3, 4)
        cursor.begin_rewrite_chunk(3, CPU)
        cursor.end_rewrite()
