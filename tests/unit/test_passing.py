"""Bytes that pass through: right, bounded however many readers there are and how slow, and no thread kept waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable

import pytest

from shoal.errors import OriginUnavailable, Overloaded
from shoal.origin import Sink
from shoal_cachenode import passing
from shoal_cachenode.passing import Passing

DATA = bytes(range(256)) * 16
PART = 512


class Recorded:
    """A source in memory that notes what it is asked for, and fails from some byte on."""

    needs_origin = True

    def __init__(self, fails_from: int = len(DATA)) -> None:
        self.asked: list[tuple[int, int]] = []
        self._fails_from = fails_from

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.asked.append((start, end))
        for at in range(start, end, 100):
            if at >= self._fails_from:
                raise OriginUnavailable("the origin is down")
            sink(memoryview(DATA)[at : min(at + 100, end)])


def run(scenario: Callable[[Passing], Awaitable[None]], **options: int) -> None:
    async def whole() -> None:
        node = Passing(PART, **options)
        await asyncio.wait_for(scenario(node), 30)
        assert node.readers == 0
        async with asyncio.timeout(30):
            while node.held_bytes:  # of threads whose readers left
                await asyncio.sleep(0.001)
        node.close()

    asyncio.run(whole())


async def collected(node: Passing, source: Recorded, start: int, end: int) -> bytes:
    return b"".join([piece async for piece in node.stream(source, start, end, dataset="set")])


@pytest.mark.parametrize(("start", "end"), [(0, len(DATA)), (1, 2), (511, 513), (100, 3000), (7, 7)])
def test_every_byte_once_in_steps_that_end_at_parts(start: int, end: int) -> None:
    async def scenario(node: Passing) -> None:
        source = Recorded()
        assert await collected(node, source, start, end) == DATA[start:end]
        assert all(first // PART == (last - 1) // PART for first, last in source.asked)

    run(scenario)


def test_what_came_before_a_failure_is_passed_on_and_the_failure_then() -> None:
    async def scenario(node: Passing) -> None:
        found = bytearray()
        with pytest.raises(OriginUnavailable, match="is down"):
            async for piece in node.stream(Recorded(fails_from=1024), 0, len(DATA), dataset="set"):
                found += piece
        assert bytes(found) == DATA[:1024]

    run(scenario)


def test_a_failure_after_a_reader_was_made_to_leave_at_once_is_no_error_of_the_loop() -> None:
    """It is cancelled, and again while it waits for the thread that reads for it."""

    async def scenario(node: Passing) -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        source = Blocked(fails_from=0)
        reader = asyncio.create_task(collected(node, source, 0, 100))
        await asyncio.to_thread(source.has_begun.wait, 20)
        for _ in range(2):
            reader.cancel()
            await asyncio.sleep(0.01)
        assert reader.cancelled()
        source.go.set()
        node.close()
        await asyncio.sleep(0.05)
        await asyncio.sleep(0)
        gc.collect()
        assert told == []

    run(scenario)


class Blocked(Recorded):
    """One that waits before it gives anything."""

    def __init__(self, fails_from: int) -> None:
        super().__init__(fails_from)
        self.has_begun, self.go = threading.Event(), threading.Event()

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.has_begun.set()
        assert self.go.wait(20)
        super().stream(start, end, sink)


def test_a_reader_that_stops_holds_two_steps_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "THREADS", 1)

    async def scenario(node: Passing) -> None:
        sources = [Recorded() for _ in range(20)]
        slow = [node.stream(source, 0, len(DATA), dataset="set") for source in sources]
        for stream in slow:
            assert await anext(stream) == DATA[:100]
        await asyncio.sleep(0.05)  # whatever they still read ahead, they do now
        assert await collected(node, Recorded(), 0, len(DATA)) == DATA, "the one thread is free"
        assert node.held_bytes <= 20 * 2 * PART
        assert all(source.asked[-1][1] <= 2 * PART for source in sources)
        for stream in slow:
            await stream.aclose()

    run(scenario)


def test_the_more_is_held_the_smaller_the_steps_and_then_the_next_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "MIN_STEP_BYTES", 64)

    async def scenario(node: Passing) -> None:
        assert node.step_bytes == PART
        slow = [node.stream(Recorded(), 0, len(DATA), dataset="set") for _ in range(64)]
        steps = []
        for stream in slow:
            await anext(stream)
            steps.append(node.step_bytes)
        assert steps == sorted(steps, reverse=True) and steps[0] == PART and steps[-1] < 150
        await asyncio.sleep(0.05)
        assert node.held_bytes <= 16384
        with pytest.raises(Overloaded, match="64 readers have bytes pass through"):
            await collected(node, Recorded(), 0, 1)
        await slow.pop().aclose()
        assert await collected(node, Recorded(), 0, len(DATA)) == DATA
        for stream in slow:
            await stream.aclose()

    run(scenario, limit_bytes=16384)


class Stalled(Recorded):
    """Gives a byte, and the rest when told to."""

    def __init__(self, begun: threading.Semaphore, go: threading.Event) -> None:
        super().__init__()
        self.end: BaseException | None = None
        self._begun = begun
        self._go = go

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.asked.append((start, end))
        sink(memoryview(DATA)[start : start + 1])
        self._begun.release()
        assert self._go.wait(20)
        try:
            sink(memoryview(DATA)[start + 1 : end])
        except BaseException as error:
            self.end = error
            raise


def test_a_reader_that_leaves_waits_for_no_thread_whose_bytes_count_until_it_ends() -> None:
    async def scenario(node: Passing) -> None:
        begun, go = threading.Semaphore(0), threading.Event()
        source = Stalled(begun, go)
        stream = node.stream(source, 0, len(DATA), dataset="set")
        assert await anext(stream) == DATA[:1]
        await asyncio.to_thread(begun.acquire)
        await stream.aclose()
        assert not go.is_set() and node.readers == 0
        assert node.held_bytes == PART - 1
        go.set()
        async with asyncio.timeout(20):
            while node.held_bytes:
                await asyncio.sleep(0.001)
        assert type(source.end) is passing._Abandoned, "the reading ended with its next piece"
        assert source.asked == [(0, PART)]

    run(scenario)


def test_what_a_reader_that_left_waited_for_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "THREADS", 1)

    async def scenario(node: Passing) -> None:
        begun, go = threading.Semaphore(0), threading.Event()
        first = node.stream(Stalled(begun, go), 0, PART, dataset="set")
        await anext(first)
        gone = [Recorded() for _ in range(3)]
        waiting = [asyncio.create_task(collected(node, source, 0, PART)) for source in gone]
        await asyncio.sleep(0)
        assert node.held_bytes == 4 * PART - 1
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert (node.readers, node.held_bytes) == (1, PART - 1)
        go.set()
        assert b"".join([piece async for piece in first]) == DATA[1:PART]
        assert await collected(node, Recorded(), 0, len(DATA)) == DATA
        assert [source.asked for source in gone] == [[], [], []]

    run(scenario)


def test_one_dataset_has_half_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "THREADS", 4)

    async def scenario(node: Passing) -> None:
        begun, go = threading.Semaphore(0), threading.Event()
        stalled = [Stalled(begun, go) for _ in range(10)]

        async def read(source: Recorded) -> bytes:
            return b"".join([piece async for piece in node.stream(source, 0, PART, dataset="stalled")])

        tasks = [asyncio.create_task(read(source)) for source in stalled]
        for _ in range(2):
            await asyncio.to_thread(begun.acquire)
        assert await collected(node, Recorded(), 0, len(DATA)) == DATA, "another dataset's"
        assert sum(len(source.asked) for source in stalled) == 2
        go.set()
        assert await asyncio.gather(*tasks) == [DATA[:PART]] * 10

    run(scenario)
