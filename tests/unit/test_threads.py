"""Threads that no exit waits for: what is submitted is done, in order and once, and nothing is left waiting."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import CancelledError

import pytest

from shoal.threads import Threads
from tests.support.waiting import wait_for


def test_as_many_as_there_is_work_for_and_no_more() -> None:
    threads, gate = Threads(3, "test"), threading.Event()
    assert threads.submit(threading.get_ident).result(20) != threading.get_ident()
    wait_for(lambda: threads._idle._value == 1)
    assert threads.submit(pow, 2, 5).result(20) == 32
    assert len(threads._threads) == 1, "an idle one is used again"
    futures = [threads.submit(gate.wait, 20) for _ in range(7)]
    assert len(threads._threads) == 3
    gate.set()
    assert all(future.result(20) for future in futures)
    threads.close()
    assert threads.join(20)


def test_errors_are_the_callers() -> None:
    threads = Threads(1, "test")
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(20)
    assert threads.submit(divmod, 7, 2).result(20) == (3, 1), "the thread goes on"


def test_closing_cancels_what_is_not_begun() -> None:
    threads, gate, begun = Threads(1, "test"), threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return gate.wait(20)

    first, second = threads.submit(hold), threads.submit(hold)
    assert begun.wait(20)
    threads.close()
    with pytest.raises(CancelledError):
        second.result(20)
    assert not threads.join(0)
    assert threads.submit(threading.get_ident).result(0) == threading.get_ident(), "on the calling thread"
    gate.set()
    assert first.result(20) and threads.join(20)


def test_threads_that_nobody_holds_end() -> None:
    threads = Threads(2, "test")
    for _ in range(4):
        threads.submit(len, ())
    started = threads._threads
    del threads
    gc.collect()
    wait_for(lambda: not any(thread.is_alive() for thread in started))


def test_a_forks_child_starts_its_own() -> None:
    threads, gate = Threads(1, "test"), threading.Event()
    held, waiting = threads.submit(gate.wait, 20), threads.submit(len, "four")
    threads._lock.acquire()  # as a thread may have it when another one forks
    pid = os.fork()
    if pid == 0:
        os._exit(threads.submit(len, "fork").result(20))
    threads._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    gate.set()
    assert held.result(20) and waiting.result(20) == 4


def test_what_is_cancelled_may_want_a_lock_that_somebody_holds_who_submits() -> None:
    threads, gate, theirs, begun = Threads(1, "test"), threading.Event(), threading.Lock(), threading.Event()
    threads.submit(gate.wait)
    cancelled = threads.submit(int)
    done: list[bool] = []

    def on_done(_: object) -> None:
        begun.set()
        with theirs:
            done.append(True)

    cancelled.add_done_callback(on_done)
    with theirs:
        closing = threading.Thread(target=threads.close)
        closing.start()
        assert begun.wait(20)
        assert threads.submit(int).result(20) == 0
    closing.join(20)
    assert done == [True] and cancelled.cancelled()
    gate.set()
