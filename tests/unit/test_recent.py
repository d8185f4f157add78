"""What passed through a moment ago: right, read once of the source, bounded, and never waited for in vain."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import OriginUnavailable
from shoal.origin import Sink
from shoal_cachenode import recent
from shoal_cachenode.recent import Recent
from tests.support.waiting import wait_for

DATA = bytes(range(256)) * 16


class Memory:
    """A source that gives pieces of 100 bytes, and where told waits, or fails, before byte `until`."""

    needs_origin = True

    def __init__(self, *, waits_at: int = -1, fails_at: int = -1) -> None:
        self.asked: list[tuple[int, int]] = []
        self.waits_at, self.fails_at = waits_at, fails_at
        self.is_waiting, self.go = threading.Event(), threading.Event()

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.asked.append((start, end))
        for at in range(start, end, 100):
            if at == self.waits_at:
                self.is_waiting.set()
                assert self.go.wait(20)
            if at == self.fails_at:
                raise OriginUnavailable("the origin is down")
            sink(memoryview(DATA)[at : min(at + 100, end)])


def read(kept: Recent, source: Memory, start: int, end: int, key: str = "shard") -> bytes:
    found = bytearray()
    kept.source(key, source).stream(start, end, found.extend)
    return bytes(found)


def test_a_second_reader_asks_the_source_for_nothing() -> None:
    kept, source = Recent(), Memory()
    assert read(kept, source, 100, 2000) == DATA[100:2000]
    assert read(kept, source, 100, 2000) == read(kept, source, 100, 2000) == DATA[100:2000]
    assert read(kept, source, 500, 700) == DATA[500:700]
    assert source.asked == [(100, 2000)]
    assert kept.given.value == 2 * 1900 + 200
    assert read(kept, source, 100, 2000, key="another") == DATA[100:2000]
    assert source.asked == [(100, 2000)] * 2


RANGES = st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))).map(sorted)


@given(st.lists(RANGES, max_size=30), st.integers(0, 2 * len(DATA)))
def test_any_ranges_are_right_and_within_the_bound(ranges: list[list[int]], limit: int) -> None:
    kept, source = Recent(limit), Memory()
    for start, end in ranges:
        assert read(kept, source, start, end) == DATA[start:end]
        assert kept.held_bytes <= limit
        assert kept.held_bytes == sum(len(block.data) for block in kept._blocks)
    asked = sum(end - start for start, end in source.asked)
    wanted = sum(end - start for start, end in ranges)
    assert asked + kept.given.value == wanted
    if limit >= len(DATA):
        assert asked == len({byte for start, end in ranges for byte in range(start, end)}), "each byte once"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recent, "KEPT_S", -1.0)
        kept.expire()
    assert kept.held_bytes == 0 and not kept._of_key and not kept._blocks


def test_many_readers_at_once_read_the_source_once() -> None:
    kept, source = Recent(), Memory(waits_at=1000)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(read, kept, source, 0, 4000)
        assert source.is_waiting.wait(20)
        others = [pool.submit(read, kept, source, start, 4000) for start in (0, 0, 500, 1500, 3999)]
        wait_for(lambda: next(iter(kept._blocks)).users == 6)
        source.go.set()
        assert first.result(20) == DATA[:4000]
        assert [each.result(20) for each in others] == [DATA[start:4000] for start in (0, 0, 500, 1500, 3999)]
    assert source.asked == [(0, 4000)]


def test_where_the_first_reader_leaves_the_next_one_goes_on_from_there() -> None:
    kept, source = Recent(), Memory(waits_at=1000)

    def leave(piece: memoryview) -> None:
        if source.go.is_set():
            raise InterruptedError("nobody wants the rest")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept.source("shard", source).stream, 0, 2000, leave)
        assert source.is_waiting.wait(20)
        second = pool.submit(read, kept, source, 0, 2000)
        wait_for(lambda: next(iter(kept._blocks)).users == 2)
        source.go.set()
        with pytest.raises(InterruptedError):
            first.result(20)
        assert second.result(20) == DATA[:2000]
    assert source.asked == [(0, 2000), (1100, 2000)], "the piece that came as it left was kept too"


@pytest.mark.parametrize("fails_at", [0, 1000])
def test_where_the_source_fails_each_reader_hears_it_of_the_source_itself(fails_at: int) -> None:
    kept, source = Recent(), Memory(waits_at=fails_at, fails_at=fails_at)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, kept, source, 0, 2000)
        assert source.is_waiting.wait(20)
        found = bytearray()
        second = pool.submit(kept.source("shard", source).stream, 0, 2000, found.extend)
        wait_for(lambda: next(iter(kept._blocks)).users == 2)
        source.go.set()
        for each in (first, second):
            with pytest.raises(OriginUnavailable):
                each.result(20)
    assert bytes(found) == DATA[:fails_at]
    assert source.asked == [(0, 2000), (fails_at, 2000)]
    source.fails_at = -1
    assert read(kept, source, 0, 2000) == DATA[:2000]


def test_a_reader_that_waits_for_anothers_bytes_may_leave() -> None:
    kept, source = Recent(), Memory(waits_at=0)

    def leave(piece: memoryview) -> None:
        raise InterruptedError("it has left")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, kept, source, 0, 2000)
        assert source.is_waiting.wait(20)
        with pytest.raises(InterruptedError):
            kept.source("shard", source).stream(0, 2000, leave)
        source.go.set()
        assert first.result(20) == DATA[:2000]
    assert next(iter(kept._blocks)).users == 0


def test_without_room_it_is_as_if_it_were_not_there() -> None:
    kept, source = Recent(1000), Memory(waits_at=500)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read, kept, source, 0, 1000)
        assert source.is_waiting.wait(20)
        assert read(kept, Memory(), 2000, 2500) == DATA[2000:2500], "what comes is not dropped for it"
        assert kept.held_bytes == 1000
        source.go.set()
        assert first.result(20) == DATA[:1000]
    assert read(kept, Memory(), 2000, 2500) == DATA[2000:2500]
    assert kept.held_bytes == 500, "now it was"


def test_what_nobody_wants_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, source = Recent(), Memory()
    read(kept, source, 0, 1000)
    kept.expire()
    assert kept.held_bytes == 1000
    monkeypatch.setattr(recent, "KEPT_S", -1.0)
    kept.expire()
    assert kept.held_bytes == 0
