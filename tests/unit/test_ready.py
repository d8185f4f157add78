"""Batches that are ready before they are asked for: whose wait is whose, and what becomes of what nobody takes."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from shoal.streaming.ready import Awaited, Ready
from shoal.streaming.waits import Trace, Waits
from shoal.wire.stream_post import Cause
from tests.support.waiting import wait_for


class Steps:
    """Steps that are made when they are let, and a failure where `fails` says so."""

    def __init__(self, count: int, awaited: Awaited, fails: int = -1) -> None:
        self.count, self.awaited, self.fails = count, awaited, fails
        self.made = 0
        self.is_closed = False
        self.threads = set[str]()
        self.may_make = threading.Event()
        self.may_make.set()

    def __next__(self) -> tuple[int, int]:
        self.threads.add(threading.current_thread().name)
        begin = time.perf_counter()
        assert self.may_make.wait(20)
        if self.made == self.fails:
            raise ValueError("no such bytes")
        if self.made == self.count:
            raise StopIteration
        self.made += 1
        trace = Trace()
        trace.reading(begin, time.perf_counter(), {(Cause.ORIGIN, "n"): 1.0})
        self.awaited.waited(begin, time.perf_counter(), trace)
        return self.made, self.made

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def ready(count: int, depth: int, fails: int = -1) -> tuple[Ready, Steps]:
    awaited = Awaited()
    steps: Any = Steps(count, awaited, fails)
    return Ready(steps, awaited, lambda number, _: number, depth), steps  # type: ignore[arg-type, return-value]


def take(found: Ready, waits: Waits) -> Any:
    return found.take(time.perf_counter(), waits)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_batch_comes_once_in_order_and_then_none(depth: int) -> None:
    found, steps = ready(5, depth)
    assert [take(found, Waits()) for _ in range(6)] == [1, 2, 3, 4, 5, None]
    assert steps.threads == ({threading.current_thread().name} if not depth else {"shoal-batch_0"})
    found.close()
    wait_for(lambda: steps.is_closed)


def test_batches_are_made_while_the_consumer_computes() -> None:
    found, steps = ready(9, 2)
    wait_for(lambda: steps.made == 2)
    waits = Waits()
    assert take(found, waits) == 1
    wait_for(lambda: steps.made == 3)
    assert sum(waits.seconds.values()) == 0.0, "what was waited for before it was asked for kept nobody"
    found.close()
    wait_for(lambda: steps.is_closed)
    assert steps.made <= 4, "nothing more is begun"


def test_of_the_threads_waits_those_count_that_the_consumer_waited_too() -> None:
    awaited = Awaited()
    steps: Any = Steps(1, awaited)
    steps.may_make.clear()
    found = Ready(steps, awaited, lambda number, _: number, 1)  # type: ignore[arg-type, return-value]
    wait_for(lambda: bool(steps.threads))  # it waits already
    began = time.perf_counter()
    time.sleep(0.05)  # the consumer computes
    asked, waits = time.perf_counter(), Waits()
    threading.Timer(0.05, steps.may_make.set).start()
    assert found.take(asked, waits) == 1
    waited_s = waits.seconds[Cause.ORIGIN, "n"]
    assert 0.0 < waited_s <= time.perf_counter() - asked < time.perf_counter() - began
    found.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failure_comes_where_its_batch_would(depth: int) -> None:
    found, _ = ready(5, depth, fails=2)
    waits = Waits()
    assert [take(found, waits), take(found, waits)] == [1, 2]
    with pytest.raises(ValueError, match="no such bytes"):
        take(found, waits)
    found.close()


def test_closing_waits_for_nothing() -> None:
    found, steps = ready(5, 2)
    wait_for(lambda: steps.made == 2)
    steps.may_make.clear()
    assert take(found, Waits()) == 1
    found.close()
    assert not steps.is_closed, "the thread is within a step"
    steps.may_make.set()
    wait_for(lambda: steps.is_closed)
