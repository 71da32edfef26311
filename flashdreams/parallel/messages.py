"""Messages from rank zero to all ranks: JSON values and CPU tensors over gloo."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashdreams.parallel.environment import group_rank

IDLE_PERIOD_S = 0.02
"""Seconds that an idle rank sleeps between checks of the store."""

_KEY = "message"
"""In the store: the number of the last message that rank zero has announced."""


@dataclass(frozen=True)
class Message:
    """A message from rank zero to the others."""

    value: Any
    """JSON: None, numbers, strings, lists and mappings with string keys."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name; they arrive on the CPU."""


class MessageChannel:
    """Broadcasts messages in order; every rank calls ``send`` or ``receive`` alike.

    Never pickle and never NCCL: messages are data, and rank zero gets the same as the others. Made
    by all ranks together. Without a process group nothing is sent, but the same checks apply.
    """

    def __init__(self, store: "dist.Store | None" = None) -> None:
        """Prepare; a collective call.

        Args:
            store: shared by all ranks, of this channel alone. With it, ranks that wait for an
                announced message wait outside of a collective, for as long as it takes.
        """
        self._store = store
        self._count = 0
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group: Any = None
        if not self._alone and "gloo" not in str(dist.get_backend_config()):
            self._group = dist.new_group(backend="gloo")

    def exchange(self, message: Message | None, *, idle: bool = False) -> Message:
        """Send rank zero's message to all ranks; a collective call.

        Args:
            message: on rank zero the message, elsewhere ignored.
            idle: all ranks know that rank zero may take long to call this.

        Returns:
            Rank zero's message, on every rank.

        Raises:
            ValueError: rank zero has no message, or it contains a number that is not finite.
            TypeError: its value is not JSON. Nothing was sent then, and rank zero may send another.
        """
        given = _Written(message) if group_rank() == 0 else None
        if given is not None and self._alone:
            return given.message
        self._count += 1
        if idle and self._store is not None:
            self._wait_for_rank_zero()
        return self._receive() if given is None else self._send(given)

    def _wait_for_rank_zero(self) -> None:
        store = self._store
        assert store is not None
        if group_rank() == 0:
            # One key for ever: a key of its own for each message would fill the store, and none
            # can be deleted before all ranks have seen it.
            store.set(_KEY, str(self._count))
            return
        # Waiting in the store would log each time-out.
        while not store.check([_KEY]) or int(store.get(_KEY)) < self._count:
            time.sleep(IDLE_PERIOD_S)

    def _send(self, given: "_Written") -> Message:
        length = torch.tensor([len(given.text)], dtype=torch.int64, device="cpu")
        dist.broadcast(length, 0, group=self._group)
        payload = torch.frombuffer(bytearray(given.text), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self._group)
        for x in given.message.tensors.values():
            if x.numel():
                dist.broadcast(x.view(-1).view(torch.uint8), 0, group=self._group)
        return given.message

    def _receive(self) -> Message:
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        dist.broadcast(length, 0, group=self._group)
        payload = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        dist.broadcast(payload, 0, group=self._group)
        value, described = json.loads(payload.numpy().tobytes())
        tensors = {}
        for name, dtype, shape in described:
            x = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            if x.numel():
                dist.broadcast(x.view(-1).view(torch.uint8), 0, group=self._group)
            tensors[name] = x
        return Message(value, tensors)


class _Written:
    """A message as text, and as received."""

    def __init__(self, message: Message | None) -> None:
        if message is None:
            raise ValueError("Rank zero must pass the message.")
        tensors = {name: x.detach().cpu().contiguous() for name, x in message.tensors.items()}
        described = [[name, str(x.dtype)[6:], list(x.shape)] for name, x in tensors.items()]
        text = json.dumps([message.value, described], allow_nan=False)
        self.text = text.encode()
        self.message = Message(json.loads(text)[0], tensors)
