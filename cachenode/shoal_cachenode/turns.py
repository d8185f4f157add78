"""Threads that many datasets share, and none can take from the others.

Work waits here and not in the threads' own queue, so that it can be taken back: what nobody wants any more never
begins.

The rule: one dataset has its share of the threads at most, however much it waits for; those that are free go to the
datasets that wait in turn.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from shoal.threads import Threads


class Turns:
    """Lives on the event loop.

    Args:
        threads: of all datasets.
        share: of one dataset, at most.
        name: of the threads.
    """

    def __init__(self, threads: int, share: int, *, name: str) -> None:
        self._free = threads
        self._share = share
        self._threads = Threads(threads, name)  # they wait for origins, and no exit for them
        self._running = Counter[str]()
        #: By dataset, the one whose turn is next first; each in the order in which it came.
        self._waiting: dict[str, dict[asyncio.Future[None], Callable[[], None]]] = {}

    def begin(self, dataset: str, work: Callable[[], None]) -> asyncio.Future[None]:
        """Do `work` in a thread when its turn comes. The future has what it raised; it is not to be cancelled."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(dataset, {})[turn] = work
        self._go_on()
        return turn

    def withdraw(self, dataset: str, turn: asyncio.Future[None]) -> bool:
        """Whether the work never begins: it had not, and nobody wants it any more. Its future is cancelled then."""
        waiting = self._waiting.get(dataset, {})
        if waiting.pop(turn, None) is None:
            return False
        if not waiting:
            del self._waiting[dataset]
        return turn.cancel()

    def close(self) -> None:
        """What runs goes on, as long as the process does; nothing else begins."""
        for waiting in self._waiting.values():
            for turn in waiting:
                turn.cancel()
        self._waiting.clear()
        self._threads.close()

    def _go_on(self) -> None:
        while self._free:
            dataset = next((name for name in self._waiting if self._running[name] < self._share), None)
            if dataset is None:
                return
            waiting = self._waiting.pop(dataset)
            turn = next(iter(waiting))
            work = waiting.pop(turn)
            if waiting:
                self._waiting[dataset] = waiting  # last now: the next thread is another's
            self._free -= 1
            self._running[dataset] += 1
            job = asyncio.wrap_future(self._threads.submit(work))
            job.add_done_callback(partial(self._ended, dataset, turn))

    def _ended(self, dataset: str, turn: asyncio.Future[None], job: asyncio.Future[None]) -> None:
        self._free += 1
        self._running[dataset] -= 1
        if not self._running[dataset]:
            del self._running[dataset]
        if job.cancelled():  # by `close`, before a thread had it
            turn.cancel()
            return
        failure = job.exception()
        if failure is None:
            turn.set_result(None)
        else:
            turn.set_exception(failure)
        self._go_on()
