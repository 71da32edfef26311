"""Messages of rank zero over gloo: they arrive as they are, and waiting is no collective."""

import datetime
import json
import time

import pytest
import torch
import torch.distributed as dist

from flashdreams.parallel import messages
from flashdreams.parallel.messages import Message, MessageChannel
from tests.harness import meeting_point, run_ranks

VALUE = {"text": "Grün \N{SNOWMAN}", "seed": 2**64 - 1, "rate": 0.1, "none": None, "on": [True, {}]}
QUIET_S = 2.5
"""Longer than an idle rank looks at the store."""


def tensors():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 5, generator=draw)
    return {
        "float32": x,
        "bfloat16": x.bfloat16(),
        "float16": x.half(),
        "float64": x.double() / 3,
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": x > 0,
        "complex64": torch.complex(x, -x),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "0-dim": torch.tensor(7),
        "zero-size": torch.empty(2, 0, 3, dtype=torch.bfloat16),
        "transposed": x.transpose(0, 2),
        "expanded": x[:1].expand(3, 4, 5),
        "odd offset": torch.arange(9, dtype=torch.int16)[1::2],
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.sum() for x in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def receive():
    """Messages of every kind, in order, on one channel and on another one."""
    channel, other = MessageChannel(), MessageChannel()
    sent = [Message(VALUE, tensors()), Message(None), Message([1.5, "x"], {"": torch.ones(2)})]
    ours = dist.get_rank() == 0
    found = [channel.exchange(message if ours else None) for message in sent]
    return [*found, other.exchange(sent[1] if ours else Message("not of rank zero"))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_messages_arrive_unchanged_and_in_order(world_size):
    for first, empty, last, other in run_ranks(receive, world_size):
        assert first.value == VALUE and list(first.tensors) == list(tensors())
        for name, x in tensors().items():
            assert same(first.tensors[name], x), name
            assert first.tensors[name].device.type == "cpu"
        assert (empty.value, empty.tensors) == (None, {}) == (other.value, other.tensors)
        assert last.value == [1.5, "x"] and same(last.tensors[""], torch.ones(2))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0])), "the comparison sees bits"


REFUSED = [
    (Message({"when": datetime.date(2024, 1, 1)}), TypeError, "date is not JSON serializable"),
    (Message({"a set": {1}}), TypeError, "set is not JSON serializable"),
    (Message([torch.ones(1)]), TypeError, "Tensor is not JSON serializable"),
    (Message({"speed": float("nan")}), ValueError, "not JSON compliant"),
    (Message([float("-inf")]), ValueError, "not JSON compliant"),
    (None, ValueError, "Rank zero must pass the message"),
]


def refuse(port: int):
    """Rank zero sends what cannot be sent, then something that can; the others wait for that."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    channel = MessageChannel(store)
    for message, error, match in REFUSED if dist.get_rank() == 0 else ():
        with pytest.raises(error, match=match):
            channel.exchange(message, idle=True)
    found = channel.exchange(Message({1: (2, 3)}), idle=True)
    return found.value


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_json_is_refused_and_disturbs_nobody(world_size):
    """Keys and tuples become what JSON makes of them on rank zero too, lest ranks differ."""
    with meeting_point() as place:
        found = run_ranks(refuse, world_size, int(place["MASTER_PORT"]))
    assert found == [{"1": [2, 3]}] * world_size == [json.loads('{"1": [2, 3]}')] * world_size


def wait_for(port: int, idle: bool):
    """When rank zero announces a message, and when each rank enters its first collective."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    channel = MessageChannel(store)
    entered: list[float] = []
    broadcast = dist.broadcast

    def watched(*args, **kwargs):
        entered.append(time.monotonic())
        return broadcast(*args, **kwargs)

    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages.dist, "broadcast", watched)
        if dist.get_rank() == 0:
            time.sleep(QUIET_S)
        announced = time.monotonic()
        value = channel.exchange(Message("at last"), idle=idle).value
    return value, announced, entered[0]


@pytest.mark.parametrize("idle", [True, False])
def test_an_idle_rank_waits_outside_of_collectives(idle):
    """Negative control: a rank that does not know better is in the collective from the start."""
    assert messages.IDLE_PERIOD_S < QUIET_S / 2, "or the rank would not have to look again"
    with meeting_point() as place:
        found = run_ranks(wait_for, 2, int(place["MASTER_PORT"]), idle)
    assert [value for value, *_ in found] == ["at last"] * 2
    announced, entered = found[0][1], found[1][2]
    assert (entered >= announced) == idle


RESTS = 50


def rest_often(port: int):
    """Keys in the store after the first rest and after the last, and the messages after rests."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    channel, keys, found = MessageChannel(store), [], []
    for number in range(RESTS):
        channel.exchange(Message("rest"))
        found.append(channel.exchange(Message(number), idle=True).value)
        dist.barrier()
        keys.append(store.num_keys())
        dist.barrier()
    return keys, found


def test_rests_leave_nothing_in_the_store():
    """An idle server rests for days; a rank that looks late must not miss the announcement."""
    with meeting_point() as place:
        for keys, found in run_ranks(rest_often, 2, int(place["MASTER_PORT"])):
            assert keys == [keys[0]] * RESTS and keys[0] > 0
            assert found == list(range(RESTS))


def lose_the_store():
    """Rank one waits for rank zero, which ends the store and says nothing."""
    port = torch.zeros((), dtype=torch.int64)
    if dist.get_rank() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.broadcast(port.fill_(store.port), 0)
        dist.barrier()
        time.sleep(1.5 * messages.IDLE_PERIOD_S)
        del store
        return
    dist.broadcast(port, 0)
    channel = MessageChannel(dist.TCPStore("127.0.0.1", int(port), is_master=False))
    dist.barrier()
    with pytest.raises(dist.DistNetworkError):
        channel.exchange(None, idle=True)


def test_an_idle_rank_does_not_wait_for_a_store_that_is_gone():
    run_ranks(lose_the_store, 2, timeout_s=60.0)
