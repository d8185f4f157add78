"""Where a fill reads: peers in turn, then the origin, then once more the peers that only seemed dead."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest

from shoal.errors import NodeUnavailable, NotCached, OriginUnavailable, Overloaded, ShoalError
from shoal.origin import Sink
from shoal_cachenode.origin_budget import OriginBudget, OriginBusy, Rate
from shoal_cachenode.source import Counter, FirstThatHasIt, OriginSource

PLAIN = bytes(range(100))


@dataclass(frozen=True)
class Scripted:
    """Gives `gives` bytes and then raises `failure`; all of them where it has none, or is asked with patience."""

    name: str
    asked: list[str]
    gives: int = 0
    failure: Exception | None = None
    is_late: bool = False  # it is only late
    is_hasty: bool = True
    needs_origin: bool = field(default=False)

    @property
    def address(self) -> str:
        return self.name

    def stream(self, start: int, end: int, sink: Sink) -> None:
        self.asked.append(self.name if self.is_hasty else f"{self.name}, patiently")
        if self.failure is None or (self.is_late and not self.is_hasty):
            return sink(memoryview(PLAIN)[start:end])
        if self.gives:
            sink(memoryview(PLAIN)[start : start + self.gives])
        raise self.failure


def read(*sources: Scripted) -> bytes:
    received = bytearray()
    *peers, last = sources
    FirstThatHasIt(peers, last).stream(0, len(PLAIN), received.extend)  # type: ignore[arg-type]
    return bytes(received)


DOWN, SILENT = OriginUnavailable("the origin is down"), NodeUnavailable("no answer")


def test_bytes_come_from_one_after_the_other_each_once() -> None:
    asked: list[str] = []
    first, second = Scripted("a", asked, 10, SILENT), Scripted("b", asked, 5, NotCached("no"))
    assert read(first, second, Scripted("origin", asked)) == PLAIN
    assert asked == ["a", "b", "origin"]


@pytest.mark.parametrize("failure", [SILENT, Overloaded("later")])
def test_a_peer_that_seemed_dead_is_asked_patiently_before_the_origins_failure_is_told(failure: ShoalError) -> None:
    asked: list[str] = []
    holder = Scripted("a", asked, 10, failure, is_late=True)
    assert read(holder, Scripted("b", asked, failure=NotCached("no")), Scripted("origin", asked, 7, DOWN)) == PLAIN
    assert asked == ["a", "b", "origin", "a, patiently"], "who said that it has nothing is not asked again"


def test_the_origins_failure_is_told_where_nobody_else_has_the_bytes() -> None:
    asked: list[str] = []
    with pytest.raises(OriginUnavailable, match="the origin is down"):
        read(Scripted("a", asked, failure=SILENT), Scripted("origin", asked, failure=DOWN))
    assert asked == ["a", "origin", "a, patiently"]


def test_peers_that_got_the_shard_meanwhile_are_asked_where_the_origin_failed_and_first_from_then_on() -> None:
    asked: list[str] = []
    origin, late = Scripted("origin", asked, 7, DOWN), Scripted("late", asked)
    received = bytearray()

    def late_holders() -> list[Scripted]:
        asked.append("who has it?")
        return [Scripted("gone", asked, failure=NotCached("no")), late]

    source = FirstThatHasIt([], origin, late_holders)  # type: ignore[arg-type]
    for _ in range(2):
        received.clear()
        source.stream(0, len(PLAIN), received.extend)
        assert received == PLAIN
    assert asked == ["origin", "who has it?", "gone", "late", "late"]


def test_a_peer_that_stays_silent_is_asked_patiently_once_though_it_had_the_shard() -> None:
    asked: list[str] = []
    silent, origin = Scripted("a", asked, failure=SILENT), Scripted("origin", asked, failure=DOWN)
    source = FirstThatHasIt([silent], origin, lambda: [replace(silent, is_hasty=False)])  # type: ignore[arg-type, list-item]
    with pytest.raises(OriginUnavailable):
        source.stream(0, len(PLAIN), bytearray().extend)
    assert asked == ["a", "origin", "a, patiently"]


def test_parts_that_find_a_late_holder_together_ask_it_once_each_from_then_on() -> None:
    asked: list[str] = []
    origin, late = Scripted("origin", asked, failure=DOWN), Scripted("late", asked)
    both = threading.Barrier(2)

    def late_holders() -> list[Scripted]:
        both.wait()
        return [replace(late)]

    source = FirstThatHasIt([], origin, late_holders)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: source.stream(0, len(PLAIN), bytearray().extend), range(2)))
    assert source._peers == (late,)


def test_an_origin_without_room_for_now_is_not_one_that_failed() -> None:
    asked: list[str] = []
    with pytest.raises(OriginBusy):
        read(Scripted("a", asked, failure=SILENT), Scripted("origin", asked, failure=OriginBusy()))
    assert asked == ["a", "origin"]


class Left(Exception):
    """The reader has."""


def test_the_origin_is_not_asked_for_a_reader_that_left_while_its_turn_came() -> None:
    asked: list[str] = []

    def sink(data: memoryview) -> None:
        raise Left

    def source(*, waits: bool) -> OriginSource:
        budget = OriginBudget(1, Rate(), lambda: None)
        return OriginSource(Asked(asked), "a", "1", 0, Counter(), budget, waits)  # type: ignore[arg-type]

    with pytest.raises(Left):
        source(waits=True).stream(0, 10, sink)
    assert asked == []
    received = bytearray()
    source(waits=True).stream(0, 10, received.extend)
    assert (bytes(received), asked) == (PLAIN[:10], ["a"])
    with pytest.raises(Left):
        source(waits=False).stream(0, 10, sink)
    assert asked == ["a", "a"], "a fill's read begins at once or not at all"


class Asked:
    """An origin of one object that notes what is read."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        self._asked.append(path)
        sink(memoryview(PLAIN)[start:end])
