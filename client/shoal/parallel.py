"""Several requests of one read at once, on threads that the process keeps.

Safe under fork, as `shoal.threads` is.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from shoal import provenance
from shoal.threads import Threads

T = TypeVar("T")
U = TypeVar("U")

#: Requests that one process has under way for one read.
MAX_PARALLEL = 16

_this_thread = threading.local()


def run_parallel(function: Callable[[T], U], arguments: Sequence[T]) -> list[U]:
    """Apply `function` to each argument, several at a time, and return the results in order.

    The first argument is done on the calling thread. All are over when this returns, also when it raises the first
    error, because their buffers are the caller's. Inside another such call the work is done in line: threads that wait
    for threads of their own pool would wait for ever.
    """
    if len(arguments) < 2 or getattr(_this_thread, "is_of_pool", False):
        return [function(argument) for argument in arguments]
    observation = provenance.current()
    there = function if observation is None else provenance.carried(function, observation)
    futures = [_threads.submit(there, argument) for argument in arguments[1:]]
    try:
        first = function(arguments[0])
    finally:
        concurrent.futures.wait(futures)
    return [first, *(future.result() for future in futures)]


def _mark_thread() -> None:
    _this_thread.is_of_pool = True


_threads = Threads(MAX_PARALLEL, "shoal-read", initializer=_mark_thread)
