"""Sessions: a rollout, its controller, and a log of its commands."""

import copy
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from flashdreams.infra.conditioning import AFTER_CUT
from flashdreams.infra.controller import Controller, Event
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.rollout import StreamInferencePipelineCache
from flashdreams.parallel.environment import OtherRankError, group_rank
from flashdreams.parallel.messages import Message, MessageChannel
from flashdreams.runtime.actions import KEYS, parse_actions

CommandKind = Literal["prompt", "control", "reset", "save", "fork", "rewind", "end"]

_NAME = re.compile(r"[\w-]{1,64}")

logger = logging.getLogger(__name__)

REMEMBERED_IDS = 4096
"""Number of command identifiers that a session remembers, to drop duplicates."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command to a session; plain values, the same on all ranks."""

    kind: CommandKind
    """``"prompt"``: another prompt from the next AR step on. ``"control"``: an event for the
    controller. ``"reset"``: restart, with the seed in ``values`` or the session's own.
    ``"save"``, ``"fork"``: keep the state under ``{"name": ...}``, in a snapshot or on the device.
    ``"rewind"``: continue from the state kept under that name. ``"end"``: end the rollout."""
    id: str = ""
    """Set by the sender; a second command with the same one is dropped. Empty: never dropped."""
    at_frame: int | None = None
    """Control: the pixel frame of the rollout from which it applies. None, or a frame that was
    already generated, is the start of the next chunk."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: what the controller accepts; ``{"text": ...}`` of a prompt."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors on the CPU: the embeddings ``text`` ``[B, S, text_dim]`` of a prompt, and
    ``text_after_cut`` likewise; see `StreamInferencePipeline.update_prompt`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(CommandKind):
            allowed = ", ".join(get_args(CommandKind))
            raise ValueError(f"Unknown command {self.kind!r}; allowed: {allowed}.")
        if self.at_frame is not None and type(self.at_frame) is not int:
            raise ValueError(f"at_frame={self.at_frame!r} must be a whole number of frames.")
        if not isinstance(self.id, str):
            raise ValueError(f"id={self.id!r} must be a string.")
        for name, x in self.tensors.items():
            if not isinstance(x, Tensor):
                raise ValueError(f"{name}: must be a tensor; got a {type(x).__name__}.")


@dataclass(frozen=True)
class Turn:
    """Message from rank zero to all ranks before an AR step."""

    session: str
    autoregressive_index: int
    """The AR step that follows, before commands such as a reset."""
    commands: tuple[Command, ...] = ()

    @property
    def jumps(self) -> bool:
        """Whether the session continues with another rollout, to which more turns may apply."""
        return bool(self.commands) and self.commands[-1].kind in ("reset", "rewind")

    def to_message(self) -> Message:
        """The turn as JSON and tensors."""
        rows = [[c.kind, c.id, c.at_frame, dict(c.values), list(c.tensors)] for c in self.commands]
        tensors = {f"{i}/{n}": x for i, c in enumerate(self.commands) for n, x in c.tensors.items()}
        return Message([self.session, self.autoregressive_index, rows], tensors)

    @classmethod
    def from_message(cls, message: Message) -> "Turn":
        """The inverse of ``to_message``."""
        session, index, rows = message.value
        commands = [
            Command(
                kind=kind,
                id=id,
                at_frame=at_frame,
                values=values,
                tensors={name: message.tensors[f"{i}/{name}"] for name in names},
            )
            for i, (kind, id, at_frame, values, names) in enumerate(rows)
        ]
        return cls(session, index, tuple(commands))


@dataclass(frozen=True)
class Step:
    """One AR step of a session."""

    autoregressive_index: int
    frames: range
    """The pixel frames of the chunk, counted from the beginning of the rollout."""
    control: Any
    """The control input, as the controller made it; None without a controller."""
    chunk: Tensor | None
    """``[B, F, 3, height, width]`` in [-1, 1]; None on a rank that leaves decoding to others."""
    cache: StreamInferencePipelineCache
    """The rollout."""


class Session:
    """A rollout that is controlled by commands while it runs::

        session = Session(pipeline, {"text": ["a forest"]}, controller=camera)
        session.submit(Command(kind="control", values={"keys": "w"}))
        step = session.step()

    On several ranks every rank creates a session and calls ``step``; commands are submitted on rank
    zero and are sent to the others with the turn of the next AR step. ``submit`` may be called from
    another thread. A command submitted during an AR step acts on the next one.
    """

    def __init__(
        self,
        pipeline: StreamInferencePipeline,
        conditions: Mapping[str, Any],
        *,
        seed: int = 0,
        controller: Controller | None = None,
        channel: MessageChannel | None = None,
        name: str = "session",
        cache: StreamInferencePipelineCache | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start the rollout; a collective call.

        Args:
            pipeline: loaded.
            conditions: keyword arguments of ``pipeline.initialize_cache``, the same on all ranks.
            seed: of the noise.
            controller: makes the control inputs; None: no control input.
            channel: to the other ranks; None makes one.
            name: of the session, in its turns.
            cache: a rollout to continue, such as a resumed one; None starts one.
            folder: of the snapshots of ``"save"``; None: the session refuses this command.
        """
        self.pipeline = pipeline
        self.conditions = dict(conditions)
        self.seed = seed
        self.controller = controller
        self.name = name
        self.log: list[tuple[int, Command]] = []
        """(AR step before which it was applied, command); without embeddings of a known text."""
        self.turns = 0
        """AR steps so far, including rewound ones."""
        self.forks: dict[str, StreamInferencePipelineCache] = {}
        """States kept by ``"fork"``, by name."""
        self.folder = folder
        self.on_turn: Callable[[int, Turn], None] | None = None
        """Called with the number of each turn and those of its commands that were carried out."""
        self._channel = channel or MessageChannel()
        self._waiting: list[Command] = []
        self._events: list[Event] = []  # of the AR step that comes next
        self._lock = threading.Lock()
        self._ids: dict[str, None] = {}
        self._closed = False
        self.ended = False
        """An ``"end"`` was applied; ``step`` raises from now on."""
        self.cache = cache or self._begin(seed)

    def submit(self, command: Command) -> bool:
        """Submit a command; call on rank zero.

        Prompts are encoded here, outside of the AR step.

        Returns:
            Whether it was accepted; False for a duplicate identifier.

        Raises:
            ValueError: the session has ended, or cannot carry out the command.
        """
        # A copy: the sender may change its own.
        command = replace(command, values=_plain(command.values))
        self._refuse(command)
        with self._lock:
            if self._closed:
                raise ValueError(f"Session {self.name!r} has ended; start a new one.")
            if command.id and command.id in self._ids:
                return False
            if command.id:
                self._ids[command.id] = None
                if len(self._ids) > REMEMBERED_IDS:
                    del self._ids[next(iter(self._ids))]
            self._closed = command.kind == "end"
        if command.kind == "prompt" and "text" not in command.tensors:
            try:
                text = [command.values["text"]] * self.cache.diffusion.batch_size
                encoded = self.pipeline.prompt_tensors(text)
            except BaseException:
                with self._lock:  # the sender may correct it
                    self._ids.pop(command.id, None)
                raise
            command = replace(command, tensors=encoded)
        with self._lock:
            self._waiting.append(command)
        return True

    def step(self, turn: Turn | None = None) -> Step:
        """One AR step: apply due commands, generate a chunk and finalize it; a collective call.

        If a command fails, the ones after it are carried out by the next call. If the AR step
        itself fails, the next call makes it again with the same events, as far as the rollout can
        go on; else only a ``"reset"`` or a ``"rewind"`` helps.

        Args:
            turn: rank zero's ``next_turn()``, if all ranks already have it; None: rank zero
                tells them.

        Raises:
            SessionEnded: an ``"end"`` is due or was applied; nothing is generated.
        """
        while True:
            due = turn or Turn.from_message(self._channel.exchange(self.next_turn().to_message()))
            self._apply(due)
            if turn is not None or not due.jumps:
                break
        cache, index = self.cache, self.cache.next_index
        frames = self.pipeline.pixel_frames(index)
        control, state = None, copy.deepcopy(cache.controller)
        if self.controller is not None:
            control = self.controller.advance(state, self._events, frames)
        chunk = self.pipeline.generate(autoregressive_index=index, cache=cache, input=control)
        cache.controller, self._events = state, []
        self.turns += 1
        self.pipeline.finalize(autoregressive_index=index, cache=cache)
        return Step(index, frames, control, chunk, cache)

    def _begin(self, seed: int) -> StreamInferencePipelineCache:
        cache = self.pipeline.initialize_cache(**self.conditions, seed=seed)
        cache.controller = None if self.controller is None else self.controller.new_state()
        return cache

    def next_turn(self) -> Turn:
        """Take the commands due before the next AR step; none on ranks other than zero.

        A reset or a rewind is the last one: frames of further commands are those of the rollout
        that it continues with.
        """
        index = self.cache.next_index
        if group_rank() != 0:
            return Turn(self.name, index)
        stop = self.pipeline.pixel_frames(index).stop
        due: list[Command] = []
        with self._lock:
            later: list[Command] = []
            while self._waiting:
                command = self._waiting.pop(0)
                if command.at_frame is not None and command.at_frame >= stop:
                    later.append(command)
                    continue
                due.append(command)
                if command.kind == "reset":
                    later.clear()  # meant for frames that are no longer generated
                if command.kind in ("reset", "rewind"):
                    break
            self._waiting[:0] = later
        return Turn(self.name, index, tuple(due))

    def _apply(self, turn: Turn) -> None:
        """Carry out the commands of a turn; after one that fails, the others wait again."""
        done: list[Command] = []
        rest = list(turn.commands)
        try:
            while rest:
                command = rest.pop(0)
                if self._carry_out(command):
                    done.append(command)
        finally:
            with self._lock:
                self._waiting[:0] = rest
            # The text of a prompt suffices; embeddings take megabytes.
            told = [replace(c, tensors={}) if "text" in c.values else c for c in done]
            self.log += [(turn.autoregressive_index, command) for command in told]
            if self.on_turn is not None:
                self.on_turn(self.turns, replace(turn, commands=tuple(done)))
        if self.ended:
            self.release()
            raise SessionEnded(f"Session {self.name!r} has ended.")

    def _carry_out(self, command: Command) -> bool:
        """Carry out a command; False if the session continues without it."""
        values = command.values
        if command.kind == "end":
            self.ended = True
        elif command.kind == "reset":
            self.reset(values.get("seed"))
        elif command.kind in ("save", "fork"):
            return self._try_to_keep(command.kind, values["name"])
        elif command.kind == "rewind":
            self.rewind(values["name"])
        elif command.kind == "prompt":
            cut = self.pipeline.begins_shot(values.get("text"))
            later = command.tensors.get(AFTER_CUT)
            self.pipeline.update_prompt(
                self.cache, command.tensors["text"], begins_shot=cut, text_after_cut=later
            )
        else:
            first = self.pipeline.pixel_frames(self.cache.next_index).start
            offset = 0 if command.at_frame is None else max(0, command.at_frame - first)
            self._events.append(Event(offset, values))
            self._events.sort(key=lambda event: event.frame)
        return True

    def reset(self, seed: int | None = None) -> None:
        """Restart the rollout, between AR steps; a collective call.

        Args:
            seed: of the noise; None is the session's own.
        """
        self.seed = self.seed if seed is None else seed
        self.cache.release()
        self.cache, self._events = self._begin(self.seed), []

    def keep(self, kind: CommandKind, name: str) -> None:
        """Keep the state under a name, between AR steps; a collective call.

        Args:
            kind: ``"fork"``: on the device, replacing an earlier fork of that name; ``"save"``:
                in the session's folder.
            name: of what is kept.

        Raises:
            ValueError: not enough memory, or a snapshot of that name exists.
            OSError: the snapshot cannot be written.
            OtherRankError: it failed on another rank.
        """
        if kind == "fork":
            kept = self.cache.fork(1)[0]
            if name in self.forks:
                self.forks[name].release()
            self.forks[name] = kept
        elif self.folder is not None:
            self.pipeline.save(self.cache, self.folder / name)
            if name in self.forks:  # a rewind takes the newest state of a name
                self.forks.pop(name).release()

    def rewind(self, name: str) -> None:
        """Continue from a kept state, between AR steps; a collective call.

        Raises:
            ValueError: no such state, or not enough memory.
            SnapshotError: the snapshot of that name is damaged; the session is unchanged.
        """
        if name in self.forks:
            earlier = self.forks[name].fork(1)[0]
        elif self.folder is not None:
            earlier = self.pipeline.resume(self.folder / name, controller=self.controller)
        else:
            raise ValueError(f"Session {self.name!r} has no kept state {name!r}.")
        self.cache.release()
        self.cache, self._events = earlier, []

    def release(self) -> None:
        """Free the memory of the rollout and of its forks, and end the session."""
        with self._lock:
            self._closed = self.ended = True
        for cache in (self.cache, *self.forks.values()):
            cache.release()
        self.forks.clear()

    def _try_to_keep(self, kind: CommandKind, name: str) -> bool:
        """Keep the state under a name. If memory does not suffice, the session continues."""
        try:
            self.keep(kind, name)
            return True
        except (OSError, ValueError, OtherRankError) as error:
            logger.warning("%s: %s of %r: %s The session continues.", self.name, kind, name, error)
            return False

    def _refuse(self, command: Command) -> None:
        values = command.values
        if command.kind == "control":
            if self.controller is None:
                raise ValueError(f"Session {self.name!r} has no controller and accepts no control.")
            self.controller.check(values)
        text = values.get("text")
        given = isinstance(text, str) or "text" in command.tensors
        if command.kind == "prompt" and not given:
            raise ValueError(f'A prompt needs values={{"text": "..."}}; got {dict(values)!r}.')
        if command.kind in ("save", "fork", "rewind"):
            name = values.get("name")
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f'A {command.kind} needs values={{"name": "..."}} of letters, digits, - and _; '
                    f"got {dict(values)!r}."
                )
            if command.kind == "save" and self.folder is None:
                raise ValueError(f"Session {self.name!r} has no folder for snapshots.")
        seed = values.get("seed", 0)
        if command.kind == "reset" and not (isinstance(seed, int) and 0 <= seed < 2**64):
            raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1.")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of JSON values."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The values of a command must be JSON: {error}.") from error


def key_commands(
    actions: str, keys: Mapping[str, str] = KEYS, first_frame: int = 1
) -> list[Command]:
    """Key presses such as ``"w8 l4 wl6"`` as commands for a controller, one where keys change.

    Args:
        actions: as for `flashdreams.runtime.actions.parse_actions`.
        keys: likewise.
        first_frame: pixel frame on which the first acts; a `KeyCamera` stands still in frame 0.
    """
    commands: list[Command] = []
    before: frozenset[str] = frozenset()
    frames = [*parse_actions(actions, keys), frozenset[str]()]
    for frame, held in enumerate(frames, start=first_frame):
        if held != before:
            values = {"keys": "".join(sorted(held))}
            commands.append(Command(kind="control", at_frame=frame, values=values))
        before = held
    return commands


class SessionEnded(RuntimeError):
    """The session was ended by an ``"end"`` command."""
