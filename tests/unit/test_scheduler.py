"""Which part is fetched next: fills that say what they are asked, and block until the test lets them go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from shoal.errors import OriginUnavailable
from shoal_cachenode.origin_budget import OriginBudget, Rate
from shoal_cachenode.pace import Pace
from shoal_cachenode.scheduler import Scheduler, Urgency

FETCHES = 4
DEMAND, REST, PREFETCH = Urgency.DEMAND, Urgency.REST, Urgency.PREFETCH


class Dataset:
    """A budget, and what its fetches do: wait for `go`, then read the origin, or raise `failure`."""

    def __init__(self, scheduler: Scheduler, *, most: int = FETCHES, open: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.scheduler = scheduler
        self.budget = OriginBudget(most, Rate(), lambda: loop.call_soon_threadsafe(scheduler.dispatch))
        self.go = threading.Event()
        if open:
            self.go.set()
        self.failure: Exception | None = None
        self.sick = range(1000)  # parts that it is raised for
        self.begun: list[int] = []

    def push(self, urgency: Urgency, part: int, *, from_peer: bool = False) -> Fake:
        fill = Fake(self, from_peer)
        self.scheduler.push(urgency, fill, part)
        return fill


class Fake:
    """One fill of one part."""

    def __init__(self, dataset: Dataset, from_peer: bool) -> None:
        self.budget = dataset.budget
        self.key = b"k"
        self.needs_origin = not from_peer
        self.errors: list[BaseException] = []
        self.has_arrived = self.is_taken = self.awaited = False
        self._dataset, self._from_peer = dataset, from_peer

    def size_of(self, part: int) -> int:
        return 10

    def will_seal(self) -> None:
        pass

    def seal_ended(self) -> None:
        pass

    def is_awaited(self, part: int) -> bool:
        return self.awaited

    def take(self, part: int) -> bool:
        if self.is_taken or self.errors:
            return False
        self.is_taken = True
        return True

    def fetch(self, part: int) -> bool:
        dataset = self._dataset
        if self._from_peer:
            dataset.begun.append(part)
            assert dataset.go.wait(20)
            return False
        with self.budget.read(1, waits=False):
            dataset.begun.append(part)
            assert dataset.go.wait(20)
            if dataset.failure is not None and part in dataset.sick:
                raise dataset.failure
        return False

    def seal(self) -> None: ...

    def arrived(self, part: int) -> None:
        self.has_arrived = True

    def landed(self, part: int) -> None:
        self.is_taken = False

    def finished(self) -> None: ...

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)


def scenario(run: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def whole() -> None:
        scheduler = Scheduler(FETCHES)
        try:
            await asyncio.wait_for(run(scheduler), 30)
            assert (scheduler.in_flight, scheduler.waiting) == (0, 0)
        finally:
            await scheduler.close()

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_the_most_urgent_first_whatever_came_before() -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=1)
        fills = [one.push(PREFETCH, 0)]
        await until(lambda: one.begun == [0])
        fills += [one.push(PREFETCH, 1), one.push(REST, 2), one.push(DEMAND, 3), one.push(PREFETCH, 4)]
        fills += [one.push(DEMAND, 5)]
        one.go.set()
        await until(lambda: all(fill.has_arrived for fill in fills))
        assert one.begun == [0, 3, 5, 2, 1, 4]

    scenario(run)


def test_what_streams_need_begins_gently_and_again_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal_cachenode.scheduler.REST_S", 0.05)

    async def run(scheduler: Scheduler) -> None:
        for first in (0, 100):
            one = Dataset(scheduler, most=100)
            scheduler._fetches = 100
            fills = [one.push(Urgency.NEED, first + part) for part in range(10)]
            await until(lambda one=one: len(one.begun) >= 2)  # type: ignore[misc]
            await asyncio.sleep(0)
            assert one.begun == [first, first + 1], "what is needed first gets all that the origin gives"
            fills.append(one.push(DEMAND, 50))
            await until(lambda one=one: 50 in one.begun)  # type: ignore[misc]
            one.go.set()
            await until(lambda fills=fills: all(fill.has_arrived for fill in fills))  # type: ignore[misc]
            await until(lambda: scheduler.in_flight == 0)
            (lane,) = scheduler._lanes.values()
            assert lane.needs_width == 2 + 10
            await asyncio.sleep(0.06)

    scenario(run)


def test_what_is_needed_much_later_holds_up_no_prefetch() -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=100)
        scheduler._fetches = 100
        fills = []
        for part in range(10):
            fills.append(Fake(one, False))
            scheduler.push(Urgency.NEED, fills[-1], part, time.monotonic() + 3600)
        fills += [one.push(PREFETCH, 50 + part) for part in range(3)]
        await until(lambda: sum(part >= 50 for part in one.begun) == 3)
        assert [part for part in one.begun if part < 50] == [0, 1], "a few go on all the same"
        one.go.set()
        await until(lambda: all(fill.has_arrived for fill in fills))

    scenario(run)


def test_prefetches_leave_a_place_for_a_reader_that_comes() -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler)
        fills = [one.push(PREFETCH, part) for part in range(6)]
        await until(lambda: len(one.begun) == 3)
        fills.append(one.push(DEMAND, 100))
        await until(lambda: 100 in one.begun)
        assert sorted(one.begun) == [0, 1, 2, 100], "while three prefetches hang"
        one.go.set()
        await until(lambda: all(fill.has_arrived for fill in fills))

    scenario(run)


def test_what_is_only_moved_keeps_the_pace_and_a_reader_does_not() -> None:
    async def whole() -> None:
        now = 100.0
        pace = Pace(100, waited=lambda: None, clock=lambda: now)  # a part has 10 bytes
        scheduler = Scheduler(FETCHES, pace)
        one = Dataset(scheduler, open=True)
        moved = [one.push(Urgency.REBALANCE, part, from_peer=True) for part in range(3)]
        await until(lambda: moved[0].has_arrived)
        read = one.push(DEMAND, 10)
        await until(lambda: read.has_arrived)
        assert one.begun == [0, 10]
        for part in (1, 2):
            now += 0.1
            scheduler.dispatch()
            await until(lambda part=part: moved[part].has_arrived)  # type: ignore[misc]
            assert one.begun == [0, 10, *range(1, part + 1)]
        await scheduler.close()

    asyncio.run(asyncio.wait_for(whole(), 30))


def test_an_origin_that_hangs_leaves_the_others_their_fetches() -> None:
    async def run(scheduler: Scheduler) -> None:
        hanging, well = Dataset(scheduler), Dataset(scheduler, open=True)
        stuck = [hanging.push(DEMAND, part) for part in range(100)]
        await until(lambda: len(hanging.begun) == FETCHES)
        served = [well.push(DEMAND, part) for part in range(50)]
        await until(lambda: all(fill.has_arrived for fill in served))
        assert len(hanging.begun) == FETCHES
        hanging.go.set()
        await until(lambda: all(fill.has_arrived for fill in stuck))

    scenario(run)


def test_what_peers_give_does_not_wait_for_the_origin() -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=1)
        from_origin = [one.push(DEMAND, 0)]
        await until(lambda: one.begun == [0])
        from_origin += [one.push(DEMAND, part) for part in (1, 2)]
        from_peer = [one.push(REST, 10, from_peer=True), one.push(REST, 11, from_peer=True)]
        await until(lambda: sorted(one.begun) == [0, 10, 11])
        one.go.set()
        await until(lambda: all(fill.has_arrived for fill in from_origin + from_peer))

    scenario(run)


def test_a_fetch_that_finds_no_room_queues_again_as_urgent_as_it_now_is() -> None:
    """It was thought to come from a peer, and needs the origin after all; meanwhile a reader came for it."""

    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=1)
        fills = [one.push(DEMAND, 0)]
        await until(lambda: one.begun == [0])
        fills.append(one.push(REST, 1))
        surprised = Fake(one, from_peer=False)
        surprised.needs_origin = False  # as far as anybody knows
        surprised.awaited = True
        scheduler.push(PREFETCH, surprised, 2)
        await until(lambda: scheduler.in_flight == 1 and scheduler.waiting == 2)
        one.go.set()
        await until(lambda: all(fill.has_arrived for fill in [*fills, surprised]))
        assert one.begun == [0, 2, 1]

    scenario(run)


@pytest.mark.parametrize("kind", [OriginUnavailable, ValueError])
def test_readers_behind_an_origin_that_is_down_are_told_with_the_first(kind: type[Exception]) -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=1)
        readers = [one.push(DEMAND, part) for part in range(9)]
        prefetch = one.push(PREFETCH, 9)
        await until(lambda: len(one.begun) == 1 and scheduler.waiting == 9)
        one.failure = kind("tried for long")
        one.go.set()
        await until(lambda: all(fill.errors for fill in [*readers, prefetch]))
        if kind is OriginUnavailable:
            assert len({id(reader.errors[0]) for reader in readers}) == 1
            assert one.begun[1:] == [9], "nobody waits for a prefetch: it has its own attempt"
        else:
            assert len(one.begun) == 10, "another error says nothing about the origin"

    scenario(run)


def test_a_failure_beside_successes_concerns_itself_alone() -> None:
    async def run(scheduler: Scheduler) -> None:
        one = Dataset(scheduler, most=1)
        one.failure, one.sick = OriginUnavailable("one object is sick"), range(1)
        fills = [one.push(DEMAND, part) for part in range(5)]
        await until(lambda: len(one.begun) == 1 and scheduler.waiting == 4)
        one.budget._succeeded(quietly=True)  # as a reader whose bytes pass through would have it
        one.go.set()
        await until(lambda: all(fill.has_arrived or fill.errors for fill in fills))
        assert [bool(fill.errors) for fill in fills] == [True, False, False, False, False]

    scenario(run)


def test_a_rate_is_kept_with_the_urgent_first() -> None:
    async def run(scheduler: Scheduler) -> None:
        loop = asyncio.get_running_loop()
        one = Dataset(scheduler, open=True)
        one.budget = OriginBudget(FETCHES, Rate(100), lambda: loop.call_soon_threadsafe(scheduler.dispatch))
        fills = [one.push(PREFETCH, part) for part in range(5)]
        fills.append(one.push(DEMAND, 100))
        await until(lambda: all(fill.has_arrived for fill in fills))
        assert one.begun.index(100) <= 1, "it waited for no more than the read that had begun"

    scenario(run)
