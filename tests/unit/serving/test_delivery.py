"""In which order, and in which thread, listeners are told."""

import threading
from collections.abc import Callable

import pytest

from flashdreams.serving.delivery import Delivery


def test_what_takes_no_time_is_told_at_once_unless_others_are_before_it() -> None:
    delivery, told = Delivery(), list[tuple[str, bool]]()
    here, gate = threading.current_thread(), threading.Event()

    def tell(name: str) -> Callable[[], None]:
        return lambda: told.append((name, threading.current_thread() is here))

    delivery.call_here(tell("a"))
    assert told == [("a", True)]
    delivery.call(gate.wait, 20.0)
    delivery.call(tell("b"))
    delivery.call_here(tell("c"))
    assert told == [("a", True)], "nobody is waited for"
    gate.set()
    delivery.close()
    assert told == [("a", True), ("b", False), ("c", False)]


def test_two_threads_never_tell_at_the_same_time() -> None:
    delivery, told, inside = Delivery(), list[int](), threading.Lock()

    def tell(number: int) -> None:
        assert inside.acquire(blocking=False)
        told.append(number)
        inside.release()

    for number in range(0, 3000, 2):
        delivery.call(tell, number)
        delivery.call_here(lambda number=number + 1: tell(number))  # type: ignore[misc]
    delivery.close()
    assert told == list(range(3000))


def test_a_listener_that_fails_leaves_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    delivery, told = Delivery(), list[int]()

    def fail() -> None:
        raise RuntimeError("of a listener")

    delivery.call_here(fail)
    delivery.call_here(lambda: told.append(1))
    delivery.call(fail)
    delivery.call(told.append, 2)
    delivery.close()
    assert told == [1, 2]
    assert len(caplog.records) == 2 and "of a listener" in caplog.text
