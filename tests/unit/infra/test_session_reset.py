"""What a reset does to commands that wait."""

import pytest

from flashdreams.infra.session import Command, SessionEnded
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_run_log import level, new_session

LATER = 9
"""A pixel frame beyond the first AR step."""


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline().setup(device="cpu")


def levels(session, steps):
    """What the controller made of its commands."""
    return [session.step().control for _ in range(steps)]


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        # Negative control: without a reset the command is applied in its time.
        ([level(0.5, at_frame=LATER)], [0.0, 0.5]),
        ([level(0.5, at_frame=LATER), Command(kind="reset")], [0.0, 0.0]),
        ([Command(kind="reset"), level(0.5, at_frame=LATER)], [0.0, 0.5]),
        ([level(0.25), Command(kind="reset"), level(0.5, at_frame=LATER)], [0.0, 0.5]),
        # A reset that waits itself takes along what comes after its own frame.
        ([level(0.5, at_frame=3 * LATER), Command(kind="reset", at_frame=LATER)], [0.0, 0.0]),
    ],
)
def test_commands_of_the_old_rollout_go_with_it(pipeline, commands, expected):
    session = new_session(pipeline)
    for command in commands:
        session.submit(command)
    found = levels(session, 20)
    assert (found[0], found[-1]) == tuple(expected)
    session.release()


def test_an_end_after_a_reset_counts_from_the_new_beginning(pipeline):
    session = new_session(pipeline)
    session.submit(Command(kind="reset", at_frame=LATER))
    session.submit(Command(kind="end", at_frame=LATER))
    with pytest.raises(SessionEnded):
        levels(session, 20)
    frames = [pipeline.pixel_frames(index) for index in range(20)]
    before = next(i for i, chunk in enumerate(frames) if chunk.stop > LATER)
    assert session.turns == 2 * before
