"""The sessions of a server on one rank, and execution of the orders that all ranks receive."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flashdreams.infra.controller import Controller
from flashdreams.infra.finite import NotFiniteError
from flashdreams.infra.parked import ParkedRollout
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.run_log import command_to_json
from flashdreams.infra.runner import to_device
from flashdreams.infra.session import Command, Session, Step, Turn
from flashdreams.infra.snapshot_header import SnapshotError
from flashdreams.parallel.environment import OtherRankError, group_size
from flashdreams.parallel.messages import Message, MessageChannel
from flashdreams.runtime.stats import is_shortage
from flashdreams.runtime.text import reason_of
from flashdreams.serving.session_log import SessionLogs

RESTS_AFTER_S = 1.0
"""Idle time after which the other ranks are told to wait outside of collectives."""
MAX_LOGGED = 1024
"""Maximum number of commands kept for a session's snapshots; the last ones are kept."""


logger = logging.getLogger(__name__)

OrderKind = Literal[
    "open",
    "step",
    "save",
    "fork",
    "rewind",
    "reset",
    "snapshot",
    "park",
    "unpark",
    "resume",
    "close",
    "rest",
    "stop",
]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A task that all ranks execute together; plain values, the same on all ranks."""

    kind: OrderKind
    """``"open"``: start a session. ``"step"``: one AR step, with its `Turn`. ``"save"``, ``"fork"``
    and ``"rewind"``: as commands of a session, with ``{"name": ...}``; ``"reset"`` with
    ``{"seed": ...}``. ``"snapshot"``: write the session to ``{"folder": ...}``. ``"park"``: to host
    memory; ``"unpark"``: back; ``"resume"``: from ``{"folder": ...}``. ``"close"``: end a session.
    ``"rest"``: the next order may be late. ``"stop"``: it was the last."""
    session: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """On the CPU: the initial ``text`` and ``image`` of a session, or those of a turn."""

    @classmethod
    def of_turn(cls, turn: Turn) -> "Order":
        """The order for an AR step."""
        message = turn.to_message()
        return cls(
            kind="step",
            session=turn.session,
            values={"turn": message.value},
            tensors=message.tensors,
        )

    def turn(self) -> Turn:
        """Input of a session for its AR step."""
        return Turn.from_message(Message(self.values["turn"], self.tensors))

    def to_message(self) -> Message:
        """The order as JSON and tensors."""
        return Message([self.kind, self.session, dict(self.values)], self.tensors)

    @classmethod
    def from_message(cls, message: Message) -> "Order":
        """The inverse of ``to_message``."""
        kind, session, values = message.value
        return cls(kind=kind, session=session, values=values, tensors=message.tensors)


class OrderError(Exception):
    """An order could not be carried out on any rank; the message is for the client."""


def fails_alike(order: Order, error: BaseException) -> bool:
    """Whether an error on this rank implies that the order failed on all ranks."""
    kinds = ("open", "resume", "save", "fork", "rewind", "snapshot", "park", "unpark")
    return order.kind in kinds and isinstance(error, OSError | ValueError | OtherRankError)


@dataclass
class ParkedSession:
    """A session whose rollout and forks are in host memory."""

    session: Session
    rollout: ParkedRollout
    forks: dict[str, ParkedRollout]


class SessionEngine:
    """Executes orders; every rank has one, with the same sessions.

    Rank zero makes all decisions and sends them with `tell`; the other ranks run `follow`.
    """

    def __init__(
        self,
        pipeline: StreamInferencePipeline,
        conditions: Mapping[str, Any],
        new_controller: Callable[[], Controller | None],
        channel: MessageChannel,
        folder: Path,
        default_seed: int = 0,
    ) -> None:
        """Store the arguments; makes no collective call.

        Args:
            pipeline: loaded and warmed up.
            conditions: defaults for sessions without their own, the same on all ranks.
            new_controller: makes the controller of a session; None: no controls.
            channel: to the other ranks.
            folder: folder for everything that sessions keep on disk.
            default_seed: seed of sessions without their own.
        """
        self.pipeline = pipeline
        self.conditions = dict(conditions)
        self.new_controller = new_controller
        self.folder = folder
        self.default_seed = default_seed
        self.live: dict[str, Session] = {}
        """Sessions on the device."""
        self.parked: dict[str, ParkedSession] = {}
        """Sessions in host memory."""
        self.logs: SessionLogs | None = None
        """Logs of the sessions, on rank zero; None: no logs."""
        self._channel = channel
        self._idle = True
        self._active = time.monotonic()

    def tell(self, order: Order) -> Any:
        """Execute an order on all ranks; a collective call, on rank zero's main thread.

        Returns:
            The result of ``carry_out`` on this rank.

        Raises:
            OrderError: it failed in the same way on all ranks, or this is the only rank.
        """
        self._active = time.monotonic()
        try:
            return self.carry_out(self._exchange(order))
        except Exception as error:
            if group_size() > 1 and not fails_alike(order, error):
                raise
            hint = "; flashdreams-plan SLUG says how many sessions fit" * is_shortage(error)
            text = f"{error or type(error).__name__}{hint}"
            logger.warning("%s of a session failed: %s", order.kind, text, exc_info=_odd(error))
            raise OrderError(for_people(error)) from error

    def succeeds(self, order: Order) -> bool:
        """Execute an order as ``tell`` does; False: it failed, and the reason is logged."""
        try:
            self.tell(order)
            return True
        except OrderError:
            return False

    def rest(self) -> None:
        """Let the other ranks wait outside of collectives after a second without orders."""
        if not self._idle and time.monotonic() - self._active > RESTS_AFTER_S:
            self.tell(Order(kind="rest"))

    @property
    def parked_bytes(self) -> int:
        """Host memory of the parked sessions on this rank; any thread may ask."""
        parked = list(self.parked.values())
        return sum(x.nbytes for each in parked for x in (each.rollout, *each.forks.values()))

    def follow(self) -> None:
        """Execute rank zero's orders until the order to stop; called on all other ranks."""
        while (order := self._exchange(None)).kind != "stop":
            try:
                self.carry_out(order)
            except Exception as error:
                if not fails_alike(order, error):
                    raise
                if not isinstance(error, OtherRankError):
                    logger.warning("%s of a session failed: %s", order.kind, error)

    def carry_out(self, order: Order) -> Any:
        """Execute an order; a collective call.

        Returns:
            The `Step` of a ``"step"``; else None.
        """
        if order.kind in ("rest", "stop"):
            return None
        kept = order.kind in ("save", "fork", "rewind", "reset")
        return self._keep(order) if kept else getattr(self, f"_{order.kind}")(order)

    def _exchange(self, order: Order | None) -> Order:
        message = None if order is None else order.to_message()
        told = Order.from_message(self._channel.exchange(message, idle=self._idle))
        self._idle = told.kind == "rest"
        return told

    def _open(self, order: Order) -> None:
        self.live[order.session] = session = self._new_session(order)
        if self.logs is not None:
            self.logs.begin(session, order.values.get("prompt"), order.tensors)

    def _resume(self, order: Order) -> None:
        controller = self.new_controller()
        folder = Path(order.values["folder"])
        cache = self.pipeline.resume(folder, controller=controller)
        session = self._new_session(order, controller=controller, cache=cache)
        self.live[order.session] = session
        session.turns = order.values.get("turns", 0)
        if self.logs is not None:
            self.logs.resume(session)

    def _new_session(self, order: Order, **going_on: Any) -> Session:
        return Session(
            self.pipeline,
            {**self.conditions, **to_device(order.tensors, self.pipeline.target_device)},
            seed=order.values.get("seed", self.default_seed),
            channel=self._channel,
            name=order.session,
            folder=self.folder / order.session / "saves",
            **({"controller": self.new_controller()} | going_on),
        )

    def _step(self, order: Order) -> Step:
        session = self.live[order.session]
        step = session.step(order.turn())
        del session.log[:-MAX_LOGGED]
        if self.logs is not None:
            self.logs.note_step(session, step)
        return step

    def _keep(self, order: Order) -> None:
        session, kind, values = self.live[order.session], order.kind, dict(order.values)
        if kind == "reset":
            session.reset(values.get("seed"))
        elif kind == "rewind":
            session.rewind(values["name"])
        else:
            session.keep(kind, values["name"])  # type: ignore[arg-type]
        if self.logs is not None:
            self.logs.note(session, Command(kind=kind, values=values))  # type: ignore[arg-type]

    def _snapshot(self, order: Order) -> None:
        session = self.live[order.session]
        self.pipeline.save(
            session.cache,
            Path(order.values["folder"]),
            log=[[index, command_to_json(command)] for index, command in session.log],
            run=order.values["run"],
        )
        if self.logs is not None:
            self.logs.note_snapshot(session)

    def _park(self, order: Order) -> None:
        session = self.live[order.session]
        rollout = self.pipeline.park(session.cache)
        forks = {name: self.pipeline.park(fork) for name, fork in session.forks.items()}
        self.parked[order.session] = ParkedSession(session, rollout, forks)
        del self.live[order.session]
        for cache in (session.cache, *session.forks.values()):
            cache.release()
        session.forks.clear()

    def _unpark(self, order: Order) -> None:
        parked = self.parked[order.session]
        session, controller = parked.session, parked.session.controller
        cache = self.pipeline.unpark(parked.rollout, controller=controller)
        forks = {n: self.pipeline.unpark(f, controller=controller) for n, f in parked.forks.items()}
        session.cache = cache  # only now: without enough memory it stays parked
        session.forks.update(forks)
        self.live[order.session] = session
        del self.parked[order.session]

    def _close(self, order: Order) -> None:
        self.parked.pop(order.session, None)
        session = self.live.pop(order.session, None)
        if self.logs is not None:
            self.logs.close(order.session)
        if session is None:
            return
        for cache in (session.cache, *session.forks.values()):
            try:
                self.pipeline.check_values(cache)
            except NotFiniteError:  # the reason why it is closed; rank zero has it
                continue
        session.release()


def for_people(error: BaseException) -> str:
    """The text of an error for clients: no path, no traceback."""
    if is_shortage(error):
        return "The device has no memory left for this session."
    if isinstance(error, NotFiniteError):
        return str(error)
    if isinstance(error, SnapshotError):
        return "The snapshot is damaged, or was made by another method."
    if isinstance(error, OSError):
        return f"A file of the server failed: {reason_of(error)}."
    return f"It failed ({type(error).__name__}); see the server's log."


def _odd(error: BaseException) -> bool:
    """Whether the error is unexpected, so that the log needs a traceback."""
    return not (is_shortage(error) or isinstance(error, ValueError | OSError | ArithmeticError))
