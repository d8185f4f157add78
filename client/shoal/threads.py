"""Threads that wait for nodes, and for which nobody waits when the process ends.

Those of `concurrent.futures` are joined at exit, and a read of a shard that its origin does not give takes minutes. A
trainer that has left its loop, or failed, would stand there so long, and torch would kill a worker for it.

The rule: an exit waits for what computes, and a moment at most.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: An exit waits so long for functions under way. Those that decode are over by then; whoever is left waits in the
#: kernel for a node, where a thread may end with its process.
EXIT_S = 0.5

_Job = tuple[Future[Any], Callable[[], Any]]


class Threads:
    """Up to `count` daemon threads, each started when none is idle. Threads may share it.

    They end when it is closed, or when nobody holds it any more. A fork's child starts its own.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        self._count, self._name, self._initializer = count, name, initializer
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        """At the start, and in a fork's child: threads and jobs stayed in the parent."""
        self._lock = threading.Lock()  # guards _threads and _is_closed
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._finalizer = weakref.finalize(self, self._jobs.put, None)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `function` on one of the threads, in the order of submission. The result is the future's, or the error.

        After `close` it is called at once, on this thread.
        """
        job: tuple[Future[T], Callable[[], T]] = Future(), functools.partial(function, *args, **kwargs)
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._jobs.put(job)
                if not self._idle.acquire(blocking=False) and len(self._threads) < self._count:
                    self._start()
        if is_closed:
            _do(*job)
        return job[0]

    def _start(self) -> None:
        thread = threading.Thread(
            target=_run,
            args=(self._jobs, self._idle, self._initializer),
            name=f"{self._name}_{len(self._threads)}",
            daemon=True,
        )
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Cancel what is not begun. What is under way ends by itself."""
        left = []
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    left.append(self._jobs.get_nowait())
            self._jobs.put(None)
        for job in left:  # without the lock: callbacks may want one that somebody holds who submits
            if job is not None and job[0].cancel():
                job[0].set_running_or_notify_cancel()

    def join(self, timeout_s: float) -> bool:
        """After `close`: wait for what is under way; whether it was over in time."""
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _do(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whoever has the future is told, whatever it is
            future.set_exception(error)


def _run(
    jobs: queue.SimpleQueue[_Job | None], idle: threading.Semaphore, initializer: Callable[[], None] | None
) -> None:
    """A thread: it does not keep its `Threads` alive."""
    if initializer is not None:
        initializer()
    while (job := jobs.get()) is not None:
        _do(*job)
        del job  # what it holds is not kept while this waits
        idle.release()
    jobs.put(None)  # for the next thread


_all: weakref.WeakSet[Threads] = weakref.WeakSet()


def _at_exit() -> None:
    until = time.monotonic() + EXIT_S
    everyone = list(_all)
    for threads in everyone:
        threads.close()
    for threads in everyone:
        threads.join(until - time.monotonic())


def _after_fork_in_child() -> None:
    for threads in _all:
        threads._finalizer.detach()
        threads._forget()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
