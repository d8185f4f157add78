"""Batches made ready on a thread while the consumer computes, so that it finds the next one and waits for none.

The rule: what the thread waits for is the consumer's wait only while the consumer waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from shoal.streaming.lookahead import LookAhead
from shoal.streaming.plan import Reads
from shoal.streaming.runs import Rows, Want
from shoal.streaming.waits import Trace, Waits
from shoal.threads import Threads

#: Batches that are ready at most: one to take, and one for the step that is quicker than the others.
DEPTH = 2


class Awaited:
    """From when to when loads were waited for (`time.perf_counter`), with what these did meanwhile."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float, Trace]] = []

    def waited(self, begin: float, end: float, trace: Trace) -> None:
        self._found.append((begin, end, trace))

    def take(self) -> list[tuple[float, float, Trace]]:
        """What came since the last call."""
        found, self._found = self._found, []
        return found


@dataclass(frozen=True, slots=True)
class _Made:
    """A batch, None after the last one, and what was waited for to make it."""

    batch: pa.Table | None
    awaited: list[tuple[float, float, Trace]]


class Ready:
    """The batches of some steps. For one consumer thread.

    Args:
        ahead: of the steps; made with `awaited` for its waits. It is closed with this.
        depth: batches that are made before they are asked for; 0: none, and there is no thread.
    """

    def __init__(
        self,
        ahead: LookAhead,
        awaited: Awaited,
        batch_of: Callable[[Reads, Mapping[Want, Rows]], pa.Table],
        depth: int = DEPTH,
    ) -> None:
        self._ahead, self._awaited, self._batch_of = ahead, awaited, batch_of
        self._threads = Threads(1, "shoal-batch") if depth else None
        self._futures: deque[Future[_Made]] = deque(self._submit() for _ in range(depth))

    def take(self, asked: float, waits: Waits) -> pa.Table | None:
        """The next batch; None: there was none left. Adds what was waited for since it was `asked` for.

        Raises what a load raised; then there is nothing more to have.
        """
        if self._threads is None:
            made = self._make()
        else:
            made = self._futures.popleft().result()
            if made.batch is not None:
                self._futures.append(self._submit())
        now = time.perf_counter()
        for begin, end, trace in made.awaited:
            waits.waited(max(begin, asked), min(end, now), trace)
        return made.batch

    def close(self) -> None:
        """Let go of everything, what is being made as soon as that has ended. Waits for nothing."""
        self._ahead.stop()
        for future in self._futures:
            future.cancel()
        if self._threads is None:
            self._ahead.close()
        else:
            self._threads.submit(self._ahead.close)

    def _submit(self) -> Future[_Made]:
        assert self._threads is not None
        return self._threads.submit(self._make)

    def _make(self) -> _Made:
        step = next(self._ahead, None)
        return _Made(None if step is None else self._batch_of(*step), self._awaited.take())
