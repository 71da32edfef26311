"""Sessions on 1, 2 and 4 ranks: rank zero is told, all ranks do it (float32, 1e-5)."""

import threading
from functools import cache
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from flashdreams.infra.controller import KeyCamera
from flashdreams.infra.session import Command, Session, SessionEnded, key_commands
from flashdreams.runtime.actions import KeyMotion
from tests.harness import run_ranks
from tests.parallel.rollout import relative_error
from tests.parallel.test_text_encoder import LetterEncoder, LetterEncoderConfig, build

MOTION = KeyMotion(move_per_frame=0.3, turn_per_frame_rad=0.2)
STEPS = 6
"""AR steps of two frames; two and a half fill the window."""

RANKS = pytest.mark.parametrize("world_size", [2, 4])


def total(poses, held):
    """A control input that depends on every pose and on the keys of every frame."""
    moved = float((poses[:, :3, 3] @ poses.new_tensor([1.0, 2.0, 3.0])).sum())
    return moved + 0.1 * sum(i * len(keys) for i, keys in enumerate(held))


def open_session(world_size, seed=3, text="sea"):
    camera = KeyCamera(MOTION, total)
    return Session(build(world_size), {"text": [text]}, seed=seed, controller=camera)


def keys(held, at_frame=None, id=""):
    return Command(kind="control", id=id, at_frame=at_frame, values={"keys": held})


def submit(session, commands):
    """Hand in commands where they may be handed in; what was taken, or why it was not."""
    taken = []
    for command in commands if torch.distributed.get_rank() == 0 else ():
        try:
            taken.append(session.submit(command))
        except ValueError as error:
            taken.append(str(error))
    return taken


def play(world_size, plan, seed=3, text="sea", steps=STEPS):
    """A session that is told ``plan[number]`` before its step ``number``."""
    session = open_session(world_size, seed, text)
    before = LetterEncoder.calls
    found = SimpleNamespace(taken=[], latents=[], chunks=[], controls=[], frames=[])
    for number in range(steps):
        found.taken += submit(session, plan.get(number, ()))
        step = session.step()
        assert step.cache is session.cache
        found.latents.append(step.cache.latent.clone())
        found.chunks.append(step.chunk.clone())
        found.controls.append(step.control)
        found.frames.append((step.autoregressive_index, step.frames))
    found.log = [(step, command.kind, dict(command.values)) for step, command in session.log]
    found.encoded = LetterEncoder.calls - before
    return found


def together(world_size, *args):
    """What rank zero has found, after a look whether the others found the same."""
    first, *others = run_ranks(play, world_size, world_size, *args)
    for other in others:
        assert (other.log, other.controls, other.frames) == (
            first.log,
            first.controls,
            first.frames,
        )
        for name in ("latents", "chunks"):
            pairs = zip(getattr(first, name), getattr(other, name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert (other.taken, other.encoded) == ([], 0)
    return first


@cache
def undisturbed():
    return together(1, {})


def agree(found, expected):
    """The same control to the bit, and latents and frames except for the order of sums."""
    assert (found.controls, found.frames) == (expected.controls, expected.frames)
    assert relative_error(found.latents, expected.latents) <= 1e-5
    assert relative_error(found.chunks, expected.chunks) <= 1e-5


@RANKS
def test_keys_of_rank_zero_steer_all_ranks(world_size):
    """Some commands wait for their frame; the last one comes while the session runs."""
    plan = {0: key_commands("w3 wl4 d1"), 5: [keys("s")]}
    found = together(world_size, plan)
    assert [(step, values["keys"]) for step, _, values in found.log] == [
        (0, "w"), (2, "lw"), (4, "d"), (4, ""), (5, "s"),
    ]  # fmt: skip
    agree(found, together(1, plan))
    assert relative_error(found.latents, undisturbed().latents) > 1e-3


@RANKS
def test_commands_that_come_late_act_on_the_next_chunk(world_size):
    late = together(world_size, {3: [keys("wl", at_frame=1)]})
    agree(late, together(1, {0: [keys("wl", at_frame=6)]}))
    assert late.frames[3] == (3, range(6, 8)) and late.log[0][0] == 3
    in_time = together(1, {0: [keys("wl", at_frame=1)]})
    assert relative_error(late.latents, in_time.latents) > 1e-3


@RANKS
def test_a_command_that_comes_twice_acts_once(world_size):
    """The second one says something else, which would show; without identifiers it does."""
    plan = {1: [keys("w", id="a"), keys("d", id="a")], 3: [keys("s", id="a"), keys("l", id="b")]}
    found = together(world_size, plan)
    assert found.taken == [True, False, False, True]
    once = together(1, {1: [keys("w")], 3: [keys("l")]})
    assert found.log == once.log
    agree(found, once)
    anonymous = together(1, {1: [keys("w"), keys("d")], 3: [keys("l")]})
    assert anonymous.taken == [True] * 3
    assert relative_error(anonymous.latents, once.latents) > 1e-3


@RANKS
def test_a_reset_begins_again_with_another_seed(world_size):
    """Frames count from the new beginning, also for commands of the same turn."""
    reset = Command(kind="reset", values={"seed": 2**64 - 1})
    plan = {1: [keys("w")], 3: [keys("d"), reset, keys("l", at_frame=3)]}
    found = together(world_size, plan)
    assert [index for index, _ in found.frames] == [0, 1, 2, 0, 1, 2]
    assert [(step, kind) for step, kind, _ in found.log][-3:] == [
        (3, "control"), (3, "reset"), (1, "control"),
    ]  # fmt: skip
    fresh = together(1, {0: [keys("l", at_frame=3)]}, 2**64 - 1, "sea", 3)
    for name in ("latents", "chunks", "controls", "frames"):
        setattr(found, name, getattr(found, name)[3:])
    agree(found, fresh)
    assert relative_error(found.latents, undisturbed().latents[:3]) > 1e-3


@RANKS
def test_a_prompt_is_encoded_on_rank_zero_and_travels(world_size):
    """One that the encoder refuses reaches nobody, and may come again under its identifier."""
    refused = Command(kind="prompt", id="a", values={"text": "Gr\N{LATIN SMALL LETTER U}\u00fcn"})
    prompt = Command(kind="prompt", id="a", values={"text": "fog"})
    found = together(world_size, {2: [refused, prompt]})
    assert found.taken == ["only ASCII letters, please", True]
    assert [(step, kind) for step, kind, _ in found.log] == [(2, "prompt")]
    assert found.encoded == 2
    embeddings = LetterEncoder(LetterEncoderConfig())(["fog"])
    given = Command(kind="prompt", tensors={"text": embeddings})
    alone = together(1, {2: [given]})
    assert alone.encoded == 0
    agree(found, alone)
    assert relative_error(found.latents[:2], undisturbed().latents[:2]) <= 1e-5
    assert relative_error(found.latents[2:], undisturbed().latents[2:]) > 1e-3


def end(world_size):
    """What the steps after an end raise, what submitting says, and a step of another session."""
    session = open_session(world_size)
    session.step()
    commands = [Command(kind="end"), keys("w"), Command(kind="end")]
    said, raised = submit(session, commands), []
    for _ in range(2):
        with pytest.raises(SessionEnded) as error:
            session.step()
        raised.append(str(error.value))
    said += submit(session, [keys("w")])
    kinds = [command.kind for _, command in session.log]
    with pytest.raises(ValueError, match="released after 1 AR steps"):
        session.pipeline.generate(1, session.cache, 0.0)
    return said, raised, kinds, session.ended, open_session(world_size).step().cache.latent


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_end_together(world_size):
    over = "Session 'session' has ended"
    for rank, found in enumerate(run_ranks(end, world_size, world_size)):
        said, raised, kinds, ended, latent = found
        assert said == ([True] + 3 * [f"{over}; start a new one."] if rank == 0 else [])
        assert raised == [f"{over}."] * 2 and kinds == ["end"] and ended
        assert relative_error([latent], undisturbed().latents[:1]) <= 1e-5


def refuse(world_size):
    session = open_session(world_size)
    commands = [
        keys("x"),
        Command(kind="control", values={"keys": float("nan")}),
        Command(kind="reset", values={"seed": -1}),
        Command(kind="prompt"),
        Command(kind="prompt", values={"text": 3}, tensors={"other": torch.zeros(1)}),
        Command(kind="end", values={"why": object()}),
    ]
    return submit(session, commands), session.step().cache.latent, session.log


def test_commands_that_cannot_be_carried_out_reach_nobody():
    for rank, (said, latent, log) in enumerate(run_ranks(refuse, 2, 2)):
        assert len(said) == (6 if rank == 0 else 0) and all(isinstance(x, str) for x in said)
        assert log == []
        assert relative_error([latent], undisturbed().latents[:1]) <= 1e-5


def played_live(world_size):
    """Keys from another thread while the session runs, and the log of when they acted."""
    session, over = open_session(world_size), threading.Event()

    def type_on():
        for letter in cycle("wlads"):
            if over.wait(0.01):
                return
            session.submit(keys(letter))

    typist = threading.Thread(target=type_on)
    if torch.distributed.get_rank() == 0:
        typist.start()
    latents = [session.step().cache.latent.clone() for _ in range(STEPS)]
    over.set()
    if typist.is_alive():
        typist.join()
    return latents, session.log


@RANKS
def test_the_log_of_a_live_session_is_a_plan_for_the_same_rollout(world_size):
    (latents, log), *others = run_ranks(played_live, world_size, world_size)
    for other, same_log in others:
        assert all(torch.equal(a, b) for a, b in zip(latents, other, strict=True))
        assert same_log == log
    plan = {}
    for step, command in log:
        plan.setdefault(step, []).append(command)
    assert len(plan) > 1
    assert relative_error(latents, together(1, plan).latents) <= 1e-5


def forgetful(world_size):
    """A rank that does not take what rank zero says: controls, and latents."""
    session = open_session(world_size)
    submit(session, [keys("w")])
    if torch.distributed.get_rank() == 1:
        exchange = session._channel.exchange
        session._channel.exchange = lambda message: exchange(message) and message
    steps = [session.step() for _ in range(3)]
    return [step.control for step in steps], session.cache.latent


def test_a_rank_that_is_not_told_is_seen():
    """Negative control. Under Ulysses the latents of the ranks are equal all the same: each rank
    embeds the control of its own tokens, and the output is gathered."""
    told = together(1, {0: [keys("w")]}, 3, "sea", 3)
    (controls, latent), (others, _) = run_ranks(forgetful, 2, 2)
    assert controls == told.controls != others
    assert relative_error([latent], told.latents[2:]) > 1e-3
