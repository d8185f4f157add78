"""Bytes that pass through: right, bounded however many readers there are and how slow, and no thread kept waiting."""

from __future__ import annotations

import asyncio
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
        assert (node.readers, node.held_bytes) == (0, 0)
        node.close()

    asyncio.run(whole())


async def collected(node: Passing, source: Recorded, start: int, end: int) -> bytes:
    return b"".join([piece async for piece in node.stream(source, start, end)])


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
            async for piece in node.stream(Recorded(fails_from=1024), 0, len(DATA)):
                found += piece
        assert bytes(found) == DATA[:1024]

    run(scenario)


def test_a_reader_that_stops_holds_two_steps_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "THREADS", 1)

    async def scenario(node: Passing) -> None:
        sources = [Recorded() for _ in range(20)]
        slow = [node.stream(source, 0, len(DATA)) for source in sources]
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
        slow = [node.stream(Recorded(), 0, len(DATA)) for _ in range(64)]
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


def test_a_reader_that_leaves_ends_the_reading() -> None:
    async def scenario(node: Passing) -> None:
        begun, go = threading.Event(), threading.Event()

        class Slow(Recorded):
            def stream(self, start: int, end: int, sink: Sink) -> None:
                sink(memoryview(DATA)[:1])
                begun.set()
                assert go.wait(20)
                sink(memoryview(DATA)[1:2])
                raise AssertionError("nobody wants the rest")

        stream = node.stream(Slow(), 0, PART)
        await anext(stream)
        await asyncio.to_thread(begun.wait, 20)
        closing = asyncio.ensure_future(stream.aclose())  # type: ignore[arg-type]
        await asyncio.sleep(0)
        go.set()
        await closing

    run(scenario)
