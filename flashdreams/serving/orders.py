"""Orders that rank zero sends to all ranks, one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from flashdreams.infra.session import Turn
from flashdreams.parallel.messages import Message

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
