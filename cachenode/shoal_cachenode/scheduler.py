"""Which part is fetched next, of all fills of a node, and how many at a time.

Parts queue in one lane a dataset. Of what may begin, the most urgent goes first; of what streams need
(`shoal_cachenode.streams`) what is needed first; then the dataset that has the fewest fetches under way, then who came
first. Three things hold a part back:

    its dataset has `fetches` under way     so an origin that hangs leaves as many to the others
    its origin's budget has no room         (`shoal_cachenode.origin_budget`); what peers give goes on meanwhile
    nobody waits for it, and a peer has it  then it keeps the pace of moves (`shoal_cachenode.pace`)

The rule: a part that waits holds no thread. Where the budget says no within a fetch, the part queues again, in its
place.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import heapq
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.errors import OriginUnavailable, ShoalError
from shoal.shards import Key
from shoal.threads import Threads
from shoal_cachenode.origin_budget import OriginBudget, OriginBusy
from shoal_cachenode.pace import Pace

log = logging.getLogger(__name__)

#: Datasets that may have all their fetches under way beside each other.
DATASETS_AT_A_TIME = 2
#: Of a dataset's fetches and its origin's window, what nobody waits for may have: a reader that comes finds room.
AHEAD_SHARE = 0.75
#: Fetches for streams at a time, after there were none for `REST_S`; each that ends well makes it one more (slow start,
#: RFC 5681, 3.1). An origin gives many at a time each a little: what is needed first would come as late as the rest.
NEEDS_AT_FIRST, REST_S = 2, 1.0
#: What is needed later than this is fetched by no more than these few: other nodes, which share the origin's bandwidth,
#: may be in need.
NEAR_S = 2.0
#: Threads that verify and sync finished shards, and finished shards that may wait for them.
SEALERS = 2
SEALS_WAITING = 64
#: Threads that fetch parts of shards that are only moved.
MOVERS = 3


class Urgency(enum.IntEnum):
    """Which part is fetched next: the smallest first."""

    DEMAND = 0  #: a reader waits for this part
    REST = 1  #: a reader wanted another part of this shard
    NEED = 2  #: a stream will read this shard, and has said when
    PREFETCH = 3  #: nobody waits yet
    REBALANCE = 4  #: a peer has it, and serves it meanwhile


class DiskFailed(Exception):
    """The data directory did not take the bytes: the read passes through instead."""


class Filling(Protocol):
    """What the scheduler knows of a fill (`shoal_cachenode.fill.Fill`). `fetch` and `seal` run in threads."""

    budget: OriginBudget

    @property
    def key(self) -> Key: ...

    @property
    def needs_origin(self) -> bool: ...

    def size_of(self, part: int) -> int: ...

    def is_awaited(self, part: int) -> bool: ...

    def take(self, part: int) -> bool: ...

    def fetch(self, part: int) -> bool: ...

    def seal(self) -> None: ...

    def arrived(self, part: int) -> None: ...

    def landed(self, part: int) -> None: ...

    def will_seal(self) -> None: ...

    def seal_ended(self) -> None: ...

    def finished(self) -> None: ...

    def failed(self, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True, order=True)
class _Waiting:
    """One part that waits, the most urgent first. `due`: when it is needed (`time.monotonic`), for `NEED` alone."""

    urgency: Urgency
    due: float
    sequence: int
    fill: Filling = field(compare=False)
    part: int = field(compare=False)


@dataclass(slots=True)
class _Lane:
    """The parts of one dataset: those that a peer may give, those that only the origin gives, and those under way.

    What streams need has queues of its own: where it is not to begin yet, what comes after it may.
    """

    budget: OriginBudget
    anywhere: list[_Waiting] = field(default_factory=list)
    anywhere_needs: list[_Waiting] = field(default_factory=list)
    origin: list[_Waiting] = field(default_factory=list)
    origin_needs: list[_Waiting] = field(default_factory=list)
    in_flight: int = 0
    needs: int = 0  # of these, for streams
    needs_width: int = NEEDS_AT_FIRST
    needs_ended_at: float = -math.inf

    def push(self, waiting: _Waiting, *, from_origin: bool) -> None:
        if waiting.urgency is Urgency.NEED:
            heapq.heappush(self.origin_needs if from_origin else self.anywhere_needs, waiting)
        else:
            heapq.heappush(self.origin if from_origin else self.anywhere, waiting)

    @property
    def waiting(self) -> int:
        """Parts that wait."""
        return len(self.anywhere) + len(self.anywhere_needs) + len(self.origin) + len(self.origin_needs)

    def room_in_s(self, waiting: _Waiting, fetches: int, *, from_origin: bool) -> float:
        """As `OriginBudget.room_in_s`; infinity where the dataset has enough under way."""
        share = AHEAD_SHARE if waiting.urgency >= Urgency.NEED else 1.0
        if self.in_flight >= max(1.0, share * fetches):
            return math.inf
        if waiting.urgency is Urgency.NEED:
            later_s = waiting.due - time.monotonic() - NEAR_S
            if self.needs >= (self.needs_width if later_s <= 0 else NEEDS_AT_FIRST):
                return later_s if 0 < later_s < math.inf and self.needs < self.needs_width else math.inf
        return self.budget.room_in_s(share) if from_origin else 0.0

    def begun(self, waiting: _Waiting) -> None:
        self.in_flight += 1
        if waiting.urgency is Urgency.NEED:
            if not self.needs and time.monotonic() - self.needs_ended_at > REST_S:
                self.needs_width = NEEDS_AT_FIRST
            self.needs += 1

    def ended(self, waiting: _Waiting, *, is_well: bool) -> None:
        self.in_flight -= 1
        if waiting.urgency is Urgency.NEED:
            self.needs -= 1
            self.needs_width += is_well
            self.needs_ended_at = time.monotonic()


class Scheduler:
    """Runs the part fetches of all fills. Lives on the event loop.

    Args:
        fetches: of one dataset at a time; of all together `DATASETS_AT_A_TIME` times as many.
        pace: of parts that are only moved; None: they are fetched as others are.
    """

    def __init__(self, fetches: int, pace: Pace | None = None) -> None:
        self._fetches = fetches
        self._pace = pace
        self._lanes: dict[OriginBudget, _Lane] = {}
        self._sequence = itertools.count()
        # They wait for origins and peers, and no exit for them: what was not recorded of a part is fetched again.
        self._threads = Threads(DATASETS_AT_A_TIME * fetches, "fill")
        # Nobody waits for a move: a peer serves the shard meanwhile.
        self._movers = Threads(MOVERS, "move", initializer=_yield_to_others)
        # Nobody waits for a seal but the end of a prefetch: it yields to readers and to the fetches they wait for.
        self._sealers = ThreadPoolExecutor(SEALERS, thread_name_prefix="seal", initializer=_yield_to_others)
        # Fetches wait when seals do not keep up: what is filled but not sealed is not safe on the drive.
        self._room_to_seal = asyncio.Semaphore(SEALS_WAITING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_again: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        """Parts that wait."""
        return sum(lane.waiting for lane in self._lanes.values())

    def push(self, urgency: Urgency, fill: Filling, part: int, due: float = 0.0) -> None:
        waiting = _Waiting(urgency, due, next(self._sequence), fill, part)
        self._lane(fill).push(waiting, from_origin=fill.needs_origin)
        self.dispatch()

    def _lane(self, fill: Filling) -> _Lane:
        lane = self._lanes.get(fill.budget)
        if lane is None:
            lane = self._lanes[fill.budget] = _Lane(fill.budget)
        return lane

    def dispatch(self) -> None:
        """Begin what may begin now."""
        if self._is_closed:
            return
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        while self.in_flight < DATASETS_AT_A_TIME * self._fetches:
            found = self._next()
            if found is None:
                break
            lane, waiting = found
            if waiting.fill.take(waiting.part):
                if self._pace is not None and waiting.urgency is Urgency.REBALANCE:
                    self._pace.spend(waiting.fill.size_of(waiting.part))
                self.in_flight += 1
                lane.begun(waiting)
                self._start(self._fetch(lane, waiting))

    def _next(self) -> tuple[_Lane, _Waiting] | None:
        """Take the next part out of its queue; None where none may begin, or nothing waits."""
        best: tuple[Urgency, float, int, int] | None = None
        chosen: tuple[_Lane, list[_Waiting]] | None = None
        soonest_s = math.inf
        for budget, lane in list(self._lanes.items()):
            if not lane.waiting:
                if not lane.in_flight and time.monotonic() - lane.needs_ended_at > REST_S:
                    del self._lanes[budget]
                continue
            for queue in filter(None, (lane.anywhere, lane.anywhere_needs, lane.origin, lane.origin_needs)):
                first = queue[0]
                from_origin = queue is lane.origin or queue is lane.origin_needs
                room_in_s = lane.room_in_s(first, self._fetches, from_origin=from_origin)
                if self._pace is not None and first.urgency is Urgency.REBALANCE:
                    room_in_s = max(room_in_s, self._pace.room_in_s())
                if room_in_s > 0:
                    soonest_s = min(soonest_s, room_in_s)
                    continue
                rank = first.urgency, first.due, lane.in_flight, first.sequence
                if best is None or rank < best:
                    best, chosen = rank, (lane, queue)
        if chosen is None:
            if soonest_s < math.inf:
                self._look_again = asyncio.get_running_loop().call_later(soonest_s, self.dispatch)
            return None
        lane, queue = chosen
        return lane, heapq.heappop(queue)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self._is_closed = True
        if self._look_again is not None:
            self._look_again.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.close()
        self._movers.close()
        self._sealers.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, lane: _Lane, waiting: _Waiting) -> None:
        fill, part = waiting.fill, waiting.part
        began, successes = next(self._sequence), lane.budget.successes
        again = is_well = False
        try:
            threads = self._movers if waiting.urgency is Urgency.REBALANCE else self._threads
            is_last = await asyncio.wrap_future(threads.submit(fill.fetch, part))
            is_well = True
            fill.arrived(part)
            if is_last:
                fill.will_seal()
                await self._room_to_seal.acquire()
                self._start(self._seal(fill))
        except asyncio.CancelledError:
            raise
        except OriginBusy:
            again = True
        except Exception as error:  # noqa: BLE001 - one shard's surprise must not end the fetches of all
            told = _told(fill, error)
            fill.failed(told)
            if isinstance(error, OriginUnavailable) and lane.budget.successes == successes:
                for other in self._as_long_waiting(lane, began):
                    other.failed(told)
        finally:
            fill.landed(part)
            self.in_flight -= 1
            lane.ended(waiting, is_well=is_well)
            if again:
                # A reader may have come meanwhile, and found the part under way.
                if fill.is_awaited(part):
                    waiting = _Waiting(Urgency.DEMAND, 0.0, waiting.sequence, fill, part)
                lane.push(waiting, from_origin=True)
            self.dispatch()

    def _as_long_waiting(self, lane: _Lane, began: int) -> Iterator[Filling]:
        """Fills whose readers waited while a fetch began and failed for good, and nothing else came from the origin.

        To let each of them find out by itself, one after the other, would keep the last reader for minutes.
        """
        for waiting in lane.origin:
            if waiting.urgency is Urgency.DEMAND and waiting.sequence < began:
                yield waiting.fill

    async def _seal(self, fill: Filling) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._sealers, fill.seal)
            fill.finished()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - as in `_fetch`
            fill.failed(_told(fill, error))
        finally:
            fill.seal_ended()
            self._room_to_seal.release()


def _told(fill: Filling, error: Exception) -> Exception:
    """`error` as those who wait for the fill are told of it."""
    if isinstance(error, ShoalError | DiskFailed):
        return error
    log.error("fill of %s failed", fill.key.hex(), exc_info=error)
    return ShoalError(f"internal error while filling: {error!r}")


def _yield_to_others() -> None:
    """Give this thread the processor's spare time (a thread has a priority of its own on Linux; sched(7))."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # refused, and a pool whose threads fail to begin would never seal again
        # Upwards only: a process that was started nicer than this may not come back.
        os.setpriority(os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread)))
